// What a warp that prepares a chunk with a gate per channel owns: 16 rows and 64 channels, as the fragments
// of products that they are from beginning to end; exponents are products as well, of zeros and ones with
// gates.
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
  static constexpr int kHalves = kKeyDim / kImageColumns, kHalfGates = kRows * kImageColumns;
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
      alignas(1024) float first_gates[kHalfGates];  // as they came, of the first 64 channels
      alignas(1024) Element right[kTile];           // R; block 3 has R of block 1 for block 3
    };
    union {
      alignas(1024) float more_gates[(kHalves > 1 ? kHalves - 1 : 1) * kHalfGates];  // of the others
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

}  // namespace nearfield::delta
