// What the warps that prepare a chunk with a gate per channel do (prepare_channel_sm90.cuh). e^{G_i - G_j}
// has a factor for each channel and does not split over 64 rows without overflow, so exponents are taken from
// rows between i and j, where no factor exceeds 1, however strong the gate. Rows are in blocks of 16. Pairs
// of different blocks I > J:
//   L_I = [k; q] e^{G_i - m_I} times R_J = k e^{m_(J+1) - G_j}, with m_I = G of the first row of block I,
// and e^{m_I - m_(J+1)} between them where the blocks are not neighbors. Pairs of the same block are grouped
// by the highest bit in which i and j differ. A warp owns 16 rows and 64 channels, as the fragments of
// products that they are from beginning to end; exponents are products as well, of zeros and ones with gates.
// L takes the place of K and Q.
#pragma once

#include "delta/prepare_steps_sm90.cuh"
#include "nearfield/matrices.cuh"

namespace nearfield::delta {

// The thread, read anew: what follows from it would otherwise stay in registers from a chunk to the next, of
// which there are too few.
__device__ __forceinline__ uint32_t thread_now() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct PrepareChannelTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kChunkThreads = 256;
  static constexpr int kSender = 128, kFinder = 224;  // of the warps that do not invert
  static constexpr int kTile = kKeyDim * kRows;       // elements
  static constexpr int kHalves = kKeyDim / kImageColumns;
  static constexpr int kBlockRows = 16, kBlocks = kRows / kBlockRows;
  static constexpr int kOwners = kBlocks * kHalves;         // warps that own rows and channels
  static constexpr int kPart = kBlockRows * kImageColumns;  // elements of the rows and channels of a warp
  static constexpr int kLevelWords = 64;                    // pairs of columns of a diagonal block
  static constexpr bool kLow = std::is_same_v<Tag, bf16>;
  // Diagonal blocks are products of float16, for its digits, with rows scaled for its exponents.
  static constexpr bool kScaled = !std::is_same_v<Element, cutlass::half_t>;

  struct Storage {                   // of a chunk
    alignas(1024) Element k[kTile];  // K, then the k of L: [K / 64][64][64]; block 0 R of block 0 for block 2
    alignas(1024) Element q[kTile];  // Q, then the q of L; block 0 R of block 0 for block 3
    union {
      alignas(1024) float first_gates[kRows * kImageColumns];  // as they came, of the first 64 channels
      alignas(1024) Element right[kTile];                      // R; block 3 has R of block 1 for block 3
    };
    union {
      alignas(
          1024) float more_gates[(kHalves > 1 ? kHalves - 1 : 1) * kRows * kImageColumns];  // of the others
      alignas(1024) Element staged_k[kTile];  // Kh, then Kt on their way out
    };
    union {
      alignas(1024) float2 level_sums[kOwners][2][kLevelWords];  // over a warp's channels, of A and P
      Element n[kImage];                                         // N once more, beside what rounding lost
    };
    union {
      alignas(1024) Element staged_q[kTile];  // scale Qh on its way out
      struct {
        // P^T on and above the diagonal, N below it; then what rounding N lost.
        alignas(1024) Element np[kImage];
        alignas(1024) Element p_low[kImage];
      };
    };
    SplitBlocks a;
    alignas(16) uint4 between[6][32];  // of a lane, see put_betweens
    union {
      // Of a warp and its channels: decays from the chunk's start, to its end, and to blocks that are not the
      // next one.
      struct {
        alignas(16) float from_start[kOwners][kImageColumns], to_end[kOwners][kImageColumns];
        float to_block[kOwners][2][kImageColumns];
      };
      TriangularScratch triangular;
    };
    alignas(16) float gates[kBlocks][kKeyDim];  // sums over the rows after each of a block, in log2
    alignas(16) float first[kKeyDim];           // gate of the first row
    float products[kHalves][3][kRows];          // k . k, q . q and q . k of a row
    alignas(16) float raw_beta[kRows];          // of this chunk, then of the next
    alignas(128) float beta[kRows];
    alignas(16) float k_norm[kRows], q_norm[kRows];
    alignas(16) float a_row[kRows], p_row[kRows];  // beta k_norm and scale q_norm
    alignas(16) float2 k_log[kBlocks][8][2];       // log2 of k_norm of rows r and r + 8 of a block, twice
    float q_row[kRows];                            // what of p_row is not in L
    float q_k[kRows];
    float squares[4];
    uint64_t arrived, free;  // K, Q and gates are there; gates have been read, and what was sent before
    uint32_t next;           // where to look for the chunk after those found
    ChunkPlace places[4];    // of each turn, found two turns ahead; none is valid behind the last
    struct {
      uint32_t index;
      bool hard;
    } sent;  // the last chunk whose results are on their way
  };
  struct Pair {
    Storage half[2];
  };
  static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two CTAs share an SM");
  static_assert(sizeof(Pair) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// ---- 16 rows and 64 channels: what a warp owns ----

__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 exp2_fast(float2 x) { return {exp2_fast(x.x), exp2_fast(x.y)}; }

// Four 8 x 8 matrices from tiles that begin at multiples of 1024 bytes; `start`: this lane's row and,
// swizzled, its place among the first pieces. An exclusive or, the same for all tiles.
__device__ __forceinline__ void load_matrices(uint32_t start, int tile, int piece, uint32_t (&to)[4]) {
  nearfield::load_matrices((start ^ (piece * 16)) + tile, to);
}
// Matrices of rows `down` times 8 and pieces `right`.
__device__ __forceinline__ uint32_t matrix_start(int down, int right) {
  const int row = thread_now() % 8;
  return (8 * down + row) * kImageColumns * 2 + (right ^ row) * 16;
}
template <class Storage, class T>
__device__ __forceinline__ int bytes_to(const Storage& s, const T* member) {
  return static_cast<int>(reinterpret_cast<const char*>(member) - reinterpret_cast<const char*>(&s));
}

// Raw gates of two channels of a head to log2 of their decays.
struct Activation {
  float rate;
  float2 bias;

  __device__ __forceinline__ Activation(const ForwardInputsSm90& in, int64_t head, int c) {
    rate = in.A_log != nullptr ? expf(in.A_log[head]) : 1.f;
    const float* from = in.dt_bias + head * in.key_dim + c;
    bias = in.dt_bias != nullptr && c < in.key_dim ? float2{from[0], from[1]} : float2{0.f, 0.f};
  }
  __device__ __forceinline__ float2 operator()(const ForwardInputsSm90& in, float2 a) const {
    return {log2_decay(in, a.x + bias.x, rate), log2_decay(in, a.y + bias.y, rate)};
  }
};

// One thread: what it has sent is in memory.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Four registers of a product that the compiler keeps as they are: what it could make again, it would, each
// time, and in the wrong registers.
template <class T>
__device__ __forceinline__ void load_four(const void* from, T (&to)[4]) {
  uint32_t words[4];
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(cast_smem_ptr_to_uint(from))
               : "memory");
  CUTE_UNROLL
  for (int x = 0; x < 4; ++x) to[x] = reinterpret_cast<const T&>(words[x]);
}

// The left operands of products with gates: row i has ones for the gates between it and its anchor, which is
// the first row of the block, the row after the block, whose first row so has all, or that of a level.
constexpr int kFromFirst = 0, kToNext = 1, kOfLevel = 2;

// One warp. Word 0 has rows r and columns 2 t and the next, word 1 rows r + 8, the others columns 8 further
// on.
template <class Storage>
__device__ __forceinline__ void put_betweens(Storage& s, uint32_t ones) {
  const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
  // Of 8 x 8 the columns before the row, and the others.
  const uint32_t below = (2 * t < r ? ones & 0xffff : 0) | (2 * t + 1 < r ? ones & 0xffff0000 : 0),
                 rest = ones ^ below;
  const auto put = [&](int which, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    s.between[which][lane] = {a, b, c, d};
  };
  put(kFromFirst, below, ones, 0, below);
  put(kToNext, rest, 0, ones, rest);
  const uint32_t of_level[3] = {t == r / 2 && r % 2 == 0 ? ones & 0xffff : 0,
                                t != r / 2 ? 0
                                : (r & 2)  ? below
                                           : rest,
                                t / 2 != r / 4 ? 0
                                : (r & 4)      ? below
                                               : rest};
  for (int level = 0; level < 3; ++level) put(kOfLevel + level, of_level[level], 0, 0, of_level[level]);
  put(kOfLevel + 3, rest, 0, 0, below);
}

// A warp's rows of a block, lane (r, t) = (lane / 4, lane % 4). Exponents are products of a matrix of zeros
// and ones with the gates of the rows after: row i has ones for what lies between it and its anchor. Lane (r,
// t) gets them for rows r and r + 8 and channels 2 t and the next of eight, as it has K and Q.
template <class Traits>
struct OwnRows {
  using Element = typename Traits::Element;
  static constexpr int kBlockRows = Traits::kBlockRows;
  static constexpr int kSteps = kImageColumns / 16;  // of products over channels
  // Gates are float16: of what they lose to rounding, a relative 2^-12, bfloat16 would show nothing; else
  // they have a second half. Times kGateUnit, so that small ones have all digits, too.
  static constexpr bool kGateLow = std::is_same_v<Element, cutlass::half_t>;
  static constexpr float kGateUnit = 256;
  static constexpr uint32_t kOnes = 0x1c001c00;  // of float16, over kGateUnit
  int block, half;  // rows 16 block and following, channels 64 half and following
  // Gates of the rows after, in units of log2, as right operands: channel 8 j + r of rows 2 t, 2 t + 1 and
  // the same plus 8.
  uint32_t high[8][2], low[8][2];

  __device__ __forceinline__ int number() const { return half * Traits::kBlocks + block; }
  // Of the two channels that are the lane's where rows do not matter.
  __device__ __forceinline__ int channel() const { return 64 * half + 2 * (thread_now() % 32); }
  __device__ __forceinline__ float2 of(const float* channels) const {
    return *reinterpret_cast<const float2*>(channels + channel());
  }
  __device__ __forceinline__ void put(float* channels, float2 x) const {
    *reinterpret_cast<float2*>(channels + channel()) = x;
  }

  // Where this row of gates has a channel of the half: in tiles of 32 channels, their pieces swizzled.
  __device__ __forceinline__ float* gate_at(typename Traits::Storage& s, int row, int channel) const {
    return (half == 0 ? s.first_gates : s.more_gates) + channel / 32 * (kRows * 32) + row * 32 +
           ((channel % 32 / 4 ^ row % 8) * 4 + channel % 4);
  }
  // Raw gates of the rows to log2 of their decays, in their place.
  __device__ __forceinline__ void activate_gates(typename Traits::Storage& s, const ForwardInputsSm90& in,
                                                 const ChunkPlace& place) const {
    const int c = channel();
    const Activation activation(in, place.head, c);
    CUTE_NO_UNROLL
    for (int row = kBlockRows * block; row < kBlockRows * (block + 1); ++row) {
      auto& gates = *reinterpret_cast<float2*>(gate_at(s, row, c % kImageColumns));
      gates = row < place.valid && c < in.key_dim ? activation(in, gates) : float2{0.f, 0.f};
    }
  }

  // Gates and their sum; of block 0 also the first row's. Rows past the end have gate 0.
  __device__ __forceinline__ void load_gates(typename Traits::Storage& s, const ForwardInputsSm90& in,
                                             int valid) {
    const int lane = thread_now() % 32, r = lane / 4, t = lane % 4, before = kBlockRows * block;
    const float unit = in.gate == Gate::kLog ? static_cast<float>(kLog2e) : 1.f;
    const auto in_unit = [&](float g) {
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(g) : "f"(g * unit), "f"(kLowestGate));
      return g;
    };
    // Of row 2 t and the next, which are after rows 2 t - 1 and 2 t.
    const uint32_t start[2] = {cast_smem_ptr_to_uint(gate_at(s, before + 2 * t + 1, r)),
                               cast_smem_ptr_to_uint(gate_at(s, before + 2 * t + 2, r))};
    const bool cut = before + kBlockRows >= valid;
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      CUTE_UNROLL
      for (int x = 0; x < 2; ++x) {
        float g[2];
        CUTE_UNROLL
        for (int e = 0; e < 2; ++e) {
          asm volatile("ld.shared.f32 %0, [%1];"
                       : "=f"(g[e])
                       : "r"((start[e] ^ (j % 4 * 32)) + j / 4 * (kRows * 128) + x * 1024)
                       : "memory");
        }
        if (cut) {
          CUTE_UNROLL
          for (int e = 0; e < 2; ++e)
            if (before + 2 * t + 8 * x + e + 1 >= valid) g[e] = 0.f;
        }
        if constexpr (kGateLow) {
          g[0] = kGateUnit * in_unit(g[0]), g[1] = kGateUnit * in_unit(g[1]);
          high[j][x] = pack<cutlass::half_t>(g[0], g[1]);
          low[j][x] = pack_low<cutlass::half_t>(g[0], g[1], high[j][x]);
        } else {
          const float to_half = kGateUnit * unit;
          constexpr uint32_t kLowest = 0xfa40fa40;  // kGateUnit * kLowestGate
          asm("max.NaN.f16x2 %0, %1, %2;"
              : "=r"(high[j][x])
              : "r"(pack<cutlass::half_t>(g[0] * to_half, g[1] * to_half)), "r"(kLowest));
        }
      }
    }
    uint32_t next[4];
    load_between(s, kToNext, next);
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      float sum[4] = {};
      add_exponents(next, j, sum);
      if (lane < 4) {
        *reinterpret_cast<float2*>(&s.gates[block][kImageColumns * half + 8 * j + 2 * lane]) = {sum[0],
                                                                                                sum[1]};
      }
    }
    if (block == 0) {
      const float2 head = *reinterpret_cast<const float2*>(gate_at(s, 0, 2 * lane));
      put(s.first, {in_unit(head.x), in_unit(head.y)});
    }
  }

  __device__ __forceinline__ void load_between(const typename Traits::Storage& s, int which,
                                               uint32_t (&left)[4]) const {
    load_four(&s.between[which][thread_now() % 32], left);
  }
  // Adds sums of gates of eight channels: of row r, then of row r + 8.
  __device__ __forceinline__ void add_exponents(const uint32_t (&left)[4], int j, float (&sums)[4]) const {
    if constexpr (kGateLow) warp_mma<cutlass::half_t>(sums, left, low[j][0], low[j][1]);
    warp_mma<cutlass::half_t>(sums, left, high[j][0], high[j][1]);
  }
  // Decays of 16 channels, in the order of the words of K; times 2 to the power of what the lane's rows have.
  __device__ __forceinline__ void decays(const uint32_t (&left)[4], int step, float2 (&e)[4],
                                         const float (&of_rows)[4] = {0.f, 0.f, 0.f, 0.f}) const {
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      float sums[4] = {of_rows[0], of_rows[1], of_rows[2], of_rows[3]};
      add_exponents(left, 2 * step + n, sums);
      e[2 * n] = exp2_fast(float2{sums[0], sums[1]});
      e[2 * n + 1] = exp2_fast(float2{sums[2], sums[3]});
    }
  }

  // G of the first row of the block, and what the gates after the block add to its last one's.
  __device__ __forceinline__ float2 start(const typename Traits::Storage& s) const {
    float2 sum = of(s.first);
    CUTE_UNROLL
    for (int b = 0; b < Traits::kBlocks - 1; ++b)
      if (b < block) sum = sum + of(s.gates[b]);
    return sum;
  }
  __device__ __forceinline__ float2 after(const typename Traits::Storage& s) const {
    float2 sum{0.f, 0.f};
    CUTE_UNROLL
    for (int b = 1; b < Traits::kBlocks; ++b)
      if (b > block) sum = sum + of(s.gates[b]);
    return sum;
  }

  // G of every row to scratch, once the sums of all blocks are there.
  __device__ __forceinline__ void put_G(typename Traits::Storage& s, const PrepareArgs& args,
                                        int64_t index) const {
    const int lane = thread_now() % 32, c = lane % 4 * 2;
    float* to = args.scratch.G + (index * kRows + kBlockRows * block + lane / 4) * Traits::kKeyDim +
                kImageColumns * half + c;
    float* const of_first = s.from_start[number()];
    *reinterpret_cast<float2*>(of_first + 2 * lane) = start(s);
    __syncwarp();
    uint32_t left[4];
    load_between(s, kFromFirst, left);
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 first = *reinterpret_cast<const float2*>(of_first + c + 8 * j);
      float sums[4] = {};
      add_exponents(left, j, sums);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(to + 8 * h * Traits::kKeyDim + 8 * j) =
            first + float2{sums[2 * h], sums[2 * h + 1]};
      }
    }
    __syncwarp();
  }

  // What only this warp reads and writes of the tiles: 16 rows of an image.
  __device__ __forceinline__ Element* own(Element* tile) const { return tile + number() * Traits::kPart; }
  // Where this lane points for the words of 16 channels of such rows.
  __device__ __forceinline__ uint32_t words_at(const typename Traits::Storage& s, const Element* tile,
                                               int step) const {
    const uint32_t lane = thread_now() % 32;
    const uint32_t start =
        cast_smem_ptr_to_uint(&s) + number() * (Traits::kPart * 2) + matrix_start(lane / 8 % 2, lane / 16);
    return (start ^ (step * 32)) + bytes_to(s, tile);
  }
  __device__ __forceinline__ void load(const typename Traits::Storage& s, const Element* tile, int step,
                                       uint32_t (&words)[4]) const {
    nearfield::load_matrices(words_at(s, tile, step), words);
  }
  __device__ __forceinline__ void store(const typename Traits::Storage& s, const Element* tile, int step,
                                        const uint32_t (&words)[4]) const {
    store_matrices(words_at(s, tile, step), words[0], words[1], words[2], words[3]);
  }
  // To scratch, by the copy engine.
  __device__ __forceinline__ void send(void* scratch, int64_t index, Element* staged) const {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread_now() % 32 != 0) return;
    copy_out(own(static_cast<Element*>(scratch) + index * Traits::kTile), own(staged), Traits::kPart * 2);
    tma_store_arrive();
  }
  // Rows past the end of K and Q may hold anything, and become 0.
  __device__ __forceinline__ void clear_rows(typename Traits::Storage& s, int valid) const {
    const int lane = thread_now() % 32;
    CUTE_NO_UNROLL
    for (int i = max(valid - kBlockRows * block, 0); i < kBlockRows; ++i) {
      for (Element* tile : {s.k, s.q})
        *reinterpret_cast<uint32_t*>(own(tile) + i * kImageColumns + 2 * lane) = 0;
    }
    __syncwarp();
  }
};

// K and Q of a warp's rows as left operands of 8 rows of each: [16 channels][rows 8 h + r][k, q of channels
// 2 t and the next; the same of channels 8 further on].
using KeysAndQueries = uint32_t[4][2][4];
template <class Traits>
__device__ __forceinline__ void load_keys_and_queries(const typename Traits::Storage& s,
                                                      const OwnRows<Traits>& own, KeysAndQueries& kq) {
  const int lane = thread_now() % 32;
  const uint32_t start = cast_smem_ptr_to_uint(&s) + own.number() * (Traits::kPart * 2) +
                         lane / 8 % 2 * bytes_to(s, s.q) + matrix_start(0, lane / 16);
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) load_matrices(start, h * 1024, 2 * step, kq[step][h]);
  }
}

// A warp: k . k, q . q and q . k of its rows over its channels, from the diagonals of products.
template <class Traits>
__device__ __forceinline__ void row_products(typename Traits::Storage& s, const OwnRows<Traits>& own,
                                             const KeysAndQueries& kq) {
  const int lane = thread_now() % 32, row = lane / 4, odd = row % 2;
  auto& to = s.products[own.half];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    float of_k[4] = {}, of_q[4] = {};  // [k; q] times k, and times q
    CUTE_UNROLL
    for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
      const uint32_t (&rows)[4] = kq[step][h];
      warp_mma<typename Traits::Element>(of_k, rows, rows[0], rows[2]);
      warp_mma<typename Traits::Element>(of_q, rows, rows[1], rows[3]);
    }
    if (lane % 4 == row / 2) {
      const int at = Traits::kBlockRows * own.block + 8 * h + row;
      to[0][at] = odd ? of_k[1] : of_k[0];
      to[1][at] = odd ? of_q[3] : of_q[2];
      to[2][at] = odd ? of_k[3] : of_k[2];
    }
  }
  __syncwarp();
}

// ---- Diagonal blocks: each warp its channels ----

// The power of two that brings a row of so many squares to a norm of at most 1, and back.
__device__ __forceinline__ float scale_for_levels(float squares) {
  const int power = (static_cast<int>(__float_as_uint(squares) >> 23 & 255) - 125) >> 1;
  return __uint_as_float((127 - power) << 23);
}
__device__ __forceinline__ float inverse_of_power(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

// Two channels times their decays in float16. In float16 itself, of which more is asked, the decays are not
// rounded.
template <bool kRounded>
__device__ __forceinline__ uint32_t decayed(uint32_t word, float2 e) {
  if constexpr (kRounded) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(word), "r"(pack<cutlass::half_t>(e.x, e.y)));
    return product;
  } else {
    const float2 x = unpack<cutlass::half_t>(word) * e;
    return pack<cutlass::half_t>(x.x, x.y);
  }
}

// Where the pair of columns 2 t and the next of row r of 8 x 8 is among those below the diagonal, all of
// which take 16 places; negative: it is not.
__device__ __forceinline__ int place_of_sums(int r, int t) { return 2 * t < r ? r * r / 4 + t : -1; }

// Pairs of a diagonal block over a warp's channels, grouped by the highest bit l in which i and j differ:
// between them lies a row m, the first with this bit set, and the decays from j to m and from m to i are at
// most 1, however strong the gate. For each level all rows are multiplied by their decay to the nearest such
// m; of its products those count whose m is the same. Takes K and Q.
template <class Traits>
__device__ __forceinline__ void diagonal_levels(typename Traits::Storage& s, const OwnRows<Traits>& own,
                                                KeysAndQueries& kq) {
  using Element = typename Traits::Element;
  constexpr bool kScaled = Traits::kScaled;
  constexpr int kSteps = OwnRows<Traits>::kSteps;
  const int lane = thread_now() % 32, r = lane / 4, t = lane % 4, first = Traits::kBlockRows * own.block;
  const auto& squares = s.products[own.half];
  if constexpr (kScaled) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int of_q = 0; of_q < 2; ++of_q) {
        const float scale = scale_for_levels(squares[of_q][first + 8 * h + r]);
        const uint32_t twice = __byte_perm(__float_as_uint(scale), 0, 0x3232);  // in bfloat16
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          CUTE_UNROLL
          for (int x = of_q; x < 4; x += 2) {
            uint32_t& word = kq[step][h][x];
            asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(twice));
            const float2 y = unpack<Element>(word);
            word = pack<cutlass::half_t>(y.x, y.y);
          }
        }
      }
    }
  }
  const auto decay = [&](const uint32_t (&left)[4], int step, uint32_t (&rows)[2][4]) {
    float2 e[4];
    own.decays(left, step, e);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) rows[h][x] = decayed<kScaled>(kq[step][h][x], e[x / 2 * 2 + h]);
    }
  };
  uint32_t left[4], rows[2][4];
  float far[4] = {},
        near[2][4] = {};  // rows 8 to 15 with those before; rows 0 to 7, and 8 to 15, with each other
  own.load_between(s, kOfLevel + 3, left);
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    decay(left, step, rows);
    warp_mma<cutlass::half_t>(far, rows[1], rows[0][0], rows[0][2]);
  }
  CUTE_NO_UNROLL
  for (int level = 2; level >= 0; --level) {
    own.load_between(s, kOfLevel + level, left);
    float sums[2][4] = {};
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      decay(left, step, rows);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) warp_mma<cutlass::half_t>(sums[h], rows[h], rows[h][0], rows[h][2]);
    }
    // Rows and columns of the same group of this level.
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x)
        if ((r ^ (2 * t + x % 2)) < 2 << level) near[h][x] = sums[h][x];
    }
  }
  auto& to = s.level_sums[own.number()];
  const auto put = [&](int at, const float (&sum)[4], int row, int column) {
    float2 of_row[2] = {{1.f, 1.f}, {1.f, 1.f}};
    if constexpr (kScaled) {
      const auto back = [&](int x, int i) {
        return inverse_of_power(scale_for_levels(squares[x][first + i]));
      };
      const float2 of_column{back(0, column), back(0, column + 1)};
      CUTE_UNROLL
      for (int x = 0; x < 2; ++x) of_row[x] = float2{back(x, row), back(x, row)} * of_column;
    }
    CUTE_UNROLL
    for (int x = 0; x < 2; ++x) to[x][at] = float2{sum[2 * x], sum[2 * x + 1]} * of_row[x];
  };
  put(lane, far, 8 + r, 2 * t);
  const int at = place_of_sums(r, t);
  if (at >= 0) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) put(32 + 16 * h + at, near[h], 8 * h + r, 8 * h + 2 * t);
  }
}

// Calls f(row, column, sums) for the pairs of columns of diagonal block w of A or of P that this lane has:
// the column and the next, which may be on the diagonal, of which the sums are not here.
template <bool kOfP, class Traits, class F>
__device__ __forceinline__ void for_block(typename Traits::Storage& s, int w, const F& f) {
  const int lane = thread_now() % 32;
  CUTE_UNROLL
  for (int at = lane; at < Traits::kLevelWords; at += 32) {
    float2 sums{0.f, 0.f};
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half)
      sums = sums + s.level_sums[half * Traits::kBlocks + w][kOfP][at];
    int i = 8 + lane / 4, j = lane % 4 * 2;
    if (at >= 32) {  // as place_of_sums has them
      const int place = lane % 16, row = 0x7777666555443321ull >> (4 * place) & 7, down = lane / 16 * 8;
      i = down + row, j = down + 2 * (place - row * row / 4);
    }
    f(Traits::kBlockRows * w + i, Traits::kBlockRows * w + j, sums);
  }
}

// ---- Rows ----

// A warp: norms and factors of its rows, from the products of all channels. Warps that share rows write the
// same.
template <class Traits>
__device__ __forceinline__ void put_factors(typename Traits::Storage& s, const ForwardInputsSm90& in,
                                            int block, int valid) {
  const int lane = thread_now() % 32, row = Traits::kBlockRows * block + lane;
  if (lane < Traits::kBlockRows) {
    const bool inside = row < valid;
    float sums[3] = {};
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half) {
      CUTE_UNROLL
      for (int x = 0; x < 3; ++x) sums[x] += s.products[half][x][row];
    }
    const auto norm = [&](float squares) {
      if (!inside) return 0.f;
      return in.qk_l2norm ? rsqrtf(squares + static_cast<float>(kNormEps)) : 1.f;
    };
    const float k_norm = norm(sums[0]), q_norm = norm(sums[1]),
                beta = inside ? activated_beta(in, s.raw_beta[row]) : 0.f;
    s.k_norm[row] = k_norm;
    s.q_norm[row] = q_norm;
    s.beta[row] = beta;
    s.a_row[row] = beta * k_norm;
    s.p_row[row] = static_cast<float>(in.scale) * q_norm;
    s.q_k[row] = sums[2];
    // Rows of L and R are times the norm of k, in bfloat16 those of q, too, so that one decay serves both.
    s.k_log[block][lane % 8][lane / 8] = {__log2f(k_norm), __log2f(k_norm)};
    s.q_row[row] = !inside ? 0.f : Traits::kScaled ? __fdividef(s.p_row[row], k_norm) : s.p_row[row];
  }
  __syncwarp();
}

// Kh, scale Qh and Kt to scratch; L and R.
template <class Traits>
__device__ __forceinline__ void scale_rows(typename Traits::Storage& s, const PrepareArgs& args,
                                           int64_t index, const OwnRows<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kLast = Traits::kBlocks - 1;
  const int number = own.number(), lane = thread_now() % 32, row = Traits::kBlockRows * own.block + lane / 4;
  {  // the lane's channels
    const float2 start = own.start(s);
    const auto put = [&](float* channels, float2 x) {
      *reinterpret_cast<float2*>(channels + 2 * lane) = exp2_fast(x);
    };
    put(s.from_start[number], start);
    put(s.to_end[number], own.after(s));
    if (own.block < 2) put(s.to_block[number][0], own.of(s.gates[own.block + 1]));
    if (own.block == 0) put(s.to_block[number][1], own.of(s.gates[1]) + own.of(s.gates[2]));
    if (own.block == kLast)
      own.put(args.scratch.decay + index * Traits::kKeyDim, exp2_fast(start + own.of(s.gates[own.block])));
  }
  __syncwarp();
  float k_log[4];
  load_four(&s.k_log[own.block][lane / 4], k_log);
  const float q_row[2] = {s.q_row[row], s.q_row[row + 8]};
  // Of word x of K or Q: rows + 8 (x % 2), channels + 8 (x / 2).
  const auto of_channels = [&](const float* channels, int step, int x) {
    return *reinterpret_cast<const float2*>(channels + 16 * step + x / 2 * 8 + lane % 4 * 2);
  };
  const auto rounded = [](float2 x) { return pack<Element>(x.x, x.y); };
  uint32_t anchor[4];
  own.load_between(s, kFromFirst, anchor);
  uint32_t k[OwnRows<Traits>::kSteps][4];
  // L, which nobody needs of the first block.
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
    uint32_t q[4], Kh[4], Qh[4], L[4];
    own.load(s, s.k, step, k[step]);
    own.load(s, s.q, step, q);
    const float2 from_start[2] = {of_channels(s.from_start[number], step, 0),
                                  of_channels(s.from_start[number], step, 2)};
    float2 e[4];
    own.decays(anchor, step, e, k_log);
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const float2 y = unpack<Element>(k[step][x]) * e[x];
      L[x] = rounded(y);
      Kh[x] = rounded(y * from_start[x / 2]);
    }
    if (own.block > 0) own.store(s, s.k, step, L);
    if constexpr (!Traits::kScaled) own.decays(anchor, step, e);
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const float2 y = unpack<Element>(q[x]) * e[x];
      L[x] = rounded(y);
      Qh[x] = rounded(y * (float2{q_row[x % 2], q_row[x % 2]} * from_start[x / 2]));
    }
    if (own.block > 0) own.store(s, s.q, step, L);
    own.store(s, s.staged_k, step, Kh);
    own.store(s, s.staged_q, step, Qh);
  }
  own.send(args.scratch.Kh, index, s.staged_k);
  own.send(args.scratch.Qh, index, s.staged_q);
  // R, which nobody needs of the last block; also for blocks that are not the next. K becomes Kt.
  own.load_between(s, kToNext, anchor);
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
    float2 e[4];
    own.decays(anchor, step, e, k_log);
    uint32_t R[4];
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      e[x] = unpack<Element>(k[step][x]) * e[x];
      R[x] = rounded(e[x]);
      k[step][x] = rounded(e[x] * of_channels(s.to_end[number], step, x));
    }
    if (own.block < kLast) own.store(s, s.right, step, R);
    const auto put_far = [&](const Element* tile, const float* to_block) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) R[x] = rounded(e[x] * of_channels(to_block, step, x));
      own.store(s, tile, step, R);
    };
    if (own.block < 2)
      put_far(own.block == 0 ? s.k : s.right + (kLast - 1) * Traits::kPart, s.to_block[number][0]);
    if (own.block == 0) put_far(s.q, s.to_block[number][1]);
  }
  if (lane == 0) tma_store_wait<1>();  // Kh has been read
  __syncwarp();
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) own.store(s, s.staged_k, step, k[step]);
  own.send(args.scratch.Kt, index, s.staged_k);
  if (lane == 0) tma_store_wait<1>();  // and Qh, whose place P takes
}

// What rounding Kt lost, to scratch. K, gates and Kt come from memory again: hard chunks are few.
template <class Traits>
__device__ __forceinline__ void put_Kt_low(typename Traits::Storage& s, const PrepareArgs& args,
                                           const ChunkPlace& place, const OwnRows<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows;
  const ForwardInputsSm90& in = args.in;
  const int c = own.channel(), first = kBlockRows * own.block;
  const auto to = [&](void* scratch) {
    return own.own(static_cast<Element*>(scratch) + place.index * Traits::kTile);
  };
  auto *Kt = to(args.scratch.Kt), *Kt_low = to(args.scratch.Kt_low);
  if (thread_now() % 32 == 0) wait_for_stores();
  __syncwarp();
  const auto* K = static_cast<const Element*>(in.k.data) + place.batch * in.k.batch +
                  place.head_k * in.k.head + place.token * in.k.token + c;
  const float2 to_end = exp2_fast(own.after(s));
  const Activation activation(in, place.head, c);
  const float* g = in.g + place.token_head(in, 0) * in.key_dim + c;
  float2 e{1.f, 1.f};
  CUTE_NO_UNROLL
  for (int i = kBlockRows - 1; i >= 0; --i) {
    const int row = first + i;
    if (row + 1 < place.valid && c < in.key_dim) {
      const float2 raw = *reinterpret_cast<const float2*>(g + (row + 1) * in.token_heads * in.key_dim);
      e = e * exp2_fast(activation(in, raw));
    }
    const bool inside = row < place.valid && c < in.key_dim;
    float2 x = unpack<Element>(inside ? *reinterpret_cast<const uint32_t*>(K + row * in.k.token) : 0u) * e;
    x = x * (float2{s.k_norm[row], s.k_norm[row]} * to_end);
    const auto at = [&](Element* image) {
      return reinterpret_cast<uint32_t*>(image_piece(image, i, c % kImageColumns / 8) + c % 8);
    };
    *at(Kt_low) = pack_low<Element>(x.x, x.y, __ldcg(at(Kt)));
  }
}

// ---- Pairs of different blocks ----

// A warp: [k; q] of block I times k of block J, all channels.
template <class Traits>
struct BlockProduct {
  float of_k[2][4] = {}, of_q[2][4] = {};  // columns 0 to 7 and 8 to 15

  __device__ __forceinline__ BlockProduct(typename Traits::Storage& s, int I, int J) {
    const int lane = thread_now() % 32;
    const int tile = bytes_to(s, I == J + 2 && J == 0 ? s.k
                                 : I == J + 3         ? s.q
                                                      : s.right),
              place = I == J + 2 && J == 1 ? I : J;
    const auto start = [&](int block) { return cast_smem_ptr_to_uint(&s) + block * Traits::kPart * 2; };
    const uint32_t left_start = start(I) + matrix_start(lane / 8 % 2, lane / 16),
                   right_start = start(place) + tile + matrix_start(lane / 16, lane / 8 % 2);
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half) {
      CUTE_UNROLL
      for (int piece = 0; piece < 8; piece += 2) {
        uint32_t k[4], q[4], right[4];
        load_matrices(right_start, half * kImageBytes, piece, right);
        load_matrices(left_start, bytes_to(s, s.k + half * kImage), piece, k);
        load_matrices(left_start, bytes_to(s, s.q + half * kImage), piece, q);
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          warp_mma<typename Traits::Element>(of_k[n], k, right[2 * n], right[2 * n + 1]);
          warp_mma<typename Traits::Element>(of_q[n], q, right[2 * n], right[2 * n + 1]);
        }
      }
    }
  }

  // Its part of A and of P.
  __device__ __forceinline__ void put(typename Traits::Storage& s, int I, int J) const {
    using Element = typename Traits::Element;
    const int lane = thread_now() % 32, t = lane % 4, block = SplitBlocks::index(I, J);
    uint32_t words[2][2];  // of P
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h + lane / 4, i = 16 * I + row;
        const auto scaled = [&](const float (&c)[4], float factor) -> float2 {
          return {factor * c[2 * h], factor * c[2 * h + 1]};
        };
        const float2 a = scaled(of_k[n], s.beta[i]), p = scaled(of_q[n], s.q_row[i]);
        uint32_t high, low;
        split_pair(a.x, a.y, high, low);
        const int at = block_piece_at(row, n) + 2 * t;
        *reinterpret_cast<uint32_t*>(&s.a.high[block][at]) = high;
        *reinterpret_cast<uint32_t*>(&s.a.low[block][at]) = low;
        words[n][h] = pack<Element>(p.x, p.y);
        if constexpr (Traits::kLow) {
          *reinterpret_cast<uint32_t*>(image_piece(s.p_low, i, 2 * J + n) + 2 * t) =
              pack_low<Element>(p.x, p.y, words[n][h]);
        }
      }
    }
    SM90_U16x8_STSM_T::copy(words[0][0], words[0][1], words[1][0], words[1][1],
                            matrices_at<false>(s.np, 16 * J, 2 * I));
  }
};

// A warp: diagonal block w of P; in what P lost to rounding also zeros above the diagonal.
template <class Traits>
__device__ __forceinline__ void put_diagonal_of_P(typename Traits::Storage& s, int w) {
  using Element = typename Traits::Element;
  const int lane = thread_now() % 32;
  if constexpr (Traits::kLow) {
    *reinterpret_cast<uint4*>(image_piece(s.p_low, 16 * w + lane % 16, 2 * w + lane / 16)) =
        uint4{0, 0, 0, 0};
    __syncwarp();
  }
  const auto put = [&](int i, int j, float2 p) {
    const float factor = s.p_row[i];
    const float2 k_norm = *reinterpret_cast<const float2*>(&s.k_norm[j]);
    p = p * (float2{factor, factor} * k_norm);
    const uint32_t high = pack<Element>(p.x, p.y);
    CUTE_UNROLL
    for (int e = 0; e < 2; ++e) {
      *reinterpret_cast<uint16_t*>(image_piece(s.np, j + e, i / 8) + i % 8) =
          static_cast<uint16_t>(high >> 16 * e);
    }
    if constexpr (Traits::kLow)
      *reinterpret_cast<uint32_t*>(image_piece(s.p_low, i, j / 8) + j % 8) =
          pack_low<Element>(p.x, p.y, high);
  };
  if (lane < 8) {
    const int i = 16 * w + 2 * lane;
    put(i, i, {s.q_k[i], 0.f});
  }
  for_block<true, Traits>(s, w, [&](int i, int j, float2 sums) {
    if (j + 1 == i) sums.y = s.q_k[i];
    put(i, j, sums);
  });
}

}  // namespace nearfield::delta
