// What the warps that prepare a chunk with a gate per channel do (prepare_channel_sm90.cuh). e^{G_i - G_j}
// has a factor for each channel and does not split over 64 rows without overflow, so exponents are taken from
// rows between i and j, where no factor exceeds 1, however strong the gate. Rows are in blocks of 16. Pairs
// of different blocks I > J:
//   L_I = [k; q] e^{G_i - m_I} times R_J = k e^{m_(J+1) - G_j}, with m_I = G of the first row of block I,
// and e^{m_I - m_(J+1)} between them where the blocks are not neighbors. Pairs of the same block are grouped
// by the highest bit in which i and j differ (channel_levels.cuh). A thread owns two channels of 16 rows and
// has their e^g in registers: every decay is a running product along its rows, so there is one exponential
// per row and channel. L takes the place of K and Q.
#pragma once

#include "delta/channel_levels.cuh"
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
  static constexpr int kBlockRows = kLevelBlock, kBlocks = kRows / kBlockRows;
  static constexpr int kOwners = kBlocks * kHalves;         // warps that own rows and channels
  static constexpr int kPart = kBlockRows * kImageColumns;  // elements of the rows and channels of a warp
  static constexpr int kLevelWords = 64;                    // pairs of columns, all levels of a block
  static constexpr bool kLow = std::is_same_v<Tag, bf16>;
  // Diagonal blocks are products of float16, for its digits, with rows scaled for its exponents.
  static constexpr bool kScaled = !std::is_same_v<Element, cutlass::half_t>;
  using LevelElement = cutlass::half_t;

  struct Storage {                   // of a chunk
    alignas(1024) Element k[kTile];  // K, then the k of L: [K / 64][64][64]; block 0 R of block 0 for block 2
    alignas(1024) Element q[kTile];  // Q, then the q of L; block 0 R of block 0 for block 3
    union {
      alignas(1024) float first_gates[kRows * kImageColumns];  // as they came, of the first 64 channels
      // Rows of a level of a warp, [k; q] with its bit; then R. Block 3 has R of block 1 for block 3.
      alignas(1024) Element right[kTile];
    };
    alignas(1024) float more_gates[(kHalves > 1 ? kHalves - 1 : 1) * kRows * kImageColumns];  // of the others
    union {  // of a warp: k of a level without its bit; then sums of the levels over its channels, of A and P
      alignas(1024) Element without[kTile / 2];
      float2 level_sums[kOwners][2][kLevelWords];
      Element n[kImage];
    };
    union {
      alignas(1024) Element scaled_q[kTile];  // in float16, for the levels
      struct {
        alignas(1024) Element p[kImage];  // then what rounding N lost
        alignas(1024) Element p_low[kImage];
      };
    };
    SplitBlocks a;
    union {
      // Of a warp, for its 16 rows of K and of Q: powers of two that bring its part of a row to a norm of at
      // most 1, and back.
      struct {
        alignas(16) float scale[kOwners][2][kBlockRows], unscale[kOwners][2][kBlockRows];
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

// ---- Two channels of 16 rows: what a thread owns ----

struct alignas(16) Four {
  float x[4];
};
__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 exp2_fast(float2 x) { return {exp2_fast(x.x), exp2_fast(x.y)}; }

// The two channels of this lane in a row of an image of 64 columns in shared memory. `start`: where they are
// in the first of its rows, a multiple of 8. An exclusive or, the same for all tiles that begin at multiples
// of 1024 bytes, and an offset that is known when i is.
struct PairInShared {
  uint32_t at;
  __device__ __forceinline__ PairInShared(uint32_t start, int tile, int i)
      : at((start ^ (i % 8 * 16)) + tile + i * kImageColumns * 2) {}
  __device__ __forceinline__ operator uint32_t() const {
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at) : "memory");
    return pair;
  }
  __device__ __forceinline__ void operator=(uint32_t pair) const {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
  }
};
// Four 8 x 8 matrices from such tiles; `start`: this lane's row and, swizzled, its place among the first
// pieces.
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
// As PairInShared, in global memory, where that leaves the upper half of the address alone.
template <class Element>
__device__ __forceinline__ void put_pair_at(Element* image, int i, uint32_t pair) {
  constexpr int kRowBytes = kImageColumns * 2;
  const auto start = reinterpret_cast<uintptr_t>(image) + thread_now() % 32 * 4;
  __stcg(reinterpret_cast<unsigned int*>((start ^ (i % 8 * 16)) + i * kRowBytes), pair);
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

template <class Traits>
struct Columns {
  using Element = typename Traits::Element;
  static constexpr int kBlockRows = Traits::kBlockRows;
  int block, half;           // rows 16 block and following, channels 64 half + 2 lane and the next
  float2 decay[kBlockRows];  // e^g of the row after; before take_decays g in units of log2
  uint32_t k[kBlockRows];    // K; for the levels in float16, scaled

  __device__ __forceinline__ int channel() const { return 64 * half + 2 * (thread_now() % 32); }
  __device__ __forceinline__ float2 of(const float* channels) const {
    return *reinterpret_cast<const float2*>(channels + channel());
  }
  __device__ __forceinline__ void put(float* channels, float2 x) const {
    *reinterpret_cast<float2*>(channels + channel()) = x;
  }

  // Gates of the rows after each of the block, and their sum; of block 0 also the first row's. Rows past the
  // end have gate 0.
  __device__ __forceinline__ void load_gates(typename Traits::Storage& s, const ForwardInputsSm90& in,
                                             const ChunkPlace& place) {
    const int c = channel(), before = kBlockRows * block, valid = place.valid;
    const int count = c < in.key_dim ? valid - before : 0;
    const float* from =
        (half == 0 ? s.first_gates : s.more_gates) + before * kImageColumns + c % kImageColumns;
    const auto row = [&](int i) { return *reinterpret_cast<const float2*>(from + i * kImageColumns); };
    float2 head = row(0);
    CUTE_UNROLL
    for (int i = 0; i + 1 < kBlockRows; ++i) decay[i] = row(i + 1);
    decay[kBlockRows - 1] = block + 1 < Traits::kBlocks ? row(kBlockRows) : float2{0.f, 0.f};
    if (valid < kRows) {
      if (count <= 0) head = {0.f, 0.f};
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i)
        if (i + 1 >= count) decay[i] = {0.f, 0.f};
    }
    if (in.gate == Gate::kLog) {
      head = {in_log2(head.x), in_log2(head.y)};
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) decay[i] = {in_log2(decay[i].x), in_log2(decay[i].y)};
    } else {
      const Activation activation(in, place.head, c);
      if (block == 0 && count > 0) head = activation(in, head);
      // Each time the first two, which then become the last: the long way of a logarithm only once or twice
      // in the code.
      CUTE_NO_UNROLL
      for (int i = 0; i < kBlockRows; i += 2) {
        float2 first[2];
        CUTE_UNROLL
        for (int x = 0; x < 2; ++x)
          first[x] = i + x + 1 < count ? activation(in, decay[x]) : float2{0.f, 0.f};
        CUTE_UNROLL
        for (int x = 0; x + 2 < kBlockRows; ++x) decay[x] = decay[x + 2];
        decay[kBlockRows - 2] = first[0], decay[kBlockRows - 1] = first[1];
      }
    }
    float2 sum{0.f, 0.f};
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) sum = sum + decay[i];
    put(s.gates[block], sum);
    if (block == 0) put(s.first, head);
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
  __device__ __forceinline__ void put_G(const typename Traits::Storage& s, const PrepareArgs& args,
                                        int64_t index) const {
    constexpr int kKeyDim = Traits::kKeyDim;
    float* to = args.scratch.G + (index * kRows + kBlockRows * block) * kKeyDim;
    float2 G = start(s);
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) {
      put(to + i * kKeyDim, G);
      G = G + decay[i];
    }
  }
  __device__ __forceinline__ void take_decays() {
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) decay[i] = exp2_fast(decay[i]);
  }

  // What only this warp reads and writes of the tiles: 16 rows of an image.
  __device__ __forceinline__ int number() const { return half * Traits::kBlocks + block; }
  __device__ __forceinline__ Element* own(Element* tile) const { return tile + number() * Traits::kPart; }
  __device__ __forceinline__ PairInShared word(const typename Traits::Storage& s, const Element* tile, int i,
                                               int part = Traits::kPart) const {
    return {cast_smem_ptr_to_uint(&s) + number() * part * 2 + thread_now() % 32 * 4, bytes_to(s, tile), i};
  }
  // K to registers. Q stays in shared memory, or registers would be spilled. Rows past the end may hold
  // anything, and become 0.
  __device__ __forceinline__ void load_k(typename Traits::Storage& s, int valid) {
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) k[i] = word(s, s.k, i);
    if (valid == kRows) return;
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) {
      if (kBlockRows * block + i < valid) continue;
      k[i] = 0;
      word(s, s.k, i) = 0, word(s, s.q, i) = 0;
    }
    __syncwarp();
  }
};

// A warp: k . k, q . q and q . k of its rows over its channels, from the diagonals of products.
template <class Traits>
__device__ __forceinline__ void row_products(typename Traits::Storage& s, const Columns<Traits>& own) {
  const int lane = thread_now() % 32, matrix = lane / 8;
  // [k; q] of rows 0 to 7 and 8 to 15 times k, and times q.
  float of_k[2][4] = {}, of_q[2][4] = {};
  const uint32_t start = cast_smem_ptr_to_uint(&s) + own.number() * Traits::kPart * 2;
  const uint32_t left_start = start + matrix % 2 * bytes_to(s, s.q) + matrix_start(0, matrix / 2),
                 right_start = start + matrix / 2 * bytes_to(s, s.q) + matrix_start(0, matrix % 2);
  CUTE_UNROLL
  for (int piece = 0; piece < 8; piece += 2) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t left[4], right[4];
      load_matrices(left_start, h * 1024, piece, left);
      load_matrices(right_start, h * 1024, piece, right);
      warp_mma<typename Traits::Element>(of_k[h], left, right[0], right[1]);
      warp_mma<typename Traits::Element>(of_q[h], left, right[2], right[3]);
    }
  }
  const int row = lane / 4, odd = row % 2;
  if (lane % 4 == row / 2) {
    auto& to = s.products[own.half];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int at = Traits::kBlockRows * own.block + 8 * h + row;
      to[0][at] = odd ? of_k[h][1] : of_k[h][0];
      to[1][at] = odd ? of_q[h][3] : of_q[h][2];
      to[2][at] = odd ? of_k[h][3] : of_k[h][2];
    }
  }
}

// ---- Diagonal blocks: each warp its channels ----

// A warp: its rows of K and Q to float16, scaled, after its row_products.
template <class Traits>
__device__ __forceinline__ void scale_for_levels(typename Traits::Storage& s, Columns<Traits>& own) {
  if constexpr (Traits::kScaled) {
    using Element = typename Traits::Element;
    const int lane = thread_now() % 32, row = lane % Traits::kBlockRows, of_q = lane / Traits::kBlockRows;
    __syncwarp();
    const float squares = s.products[own.half][of_q][Traits::kBlockRows * own.block + row];
    const int power = (static_cast<int>(__float_as_uint(squares) >> 23 & 255) - 125) >> 1;
    s.scale[own.number()][of_q][row] = __uint_as_float((127 - power) << 23);
    s.unscale[own.number()][of_q][row] = __uint_as_float((127 + power) << 23);
    __syncwarp();
    const auto scaled = [](uint32_t pair, float factor) {
      const float2 x = unpack<Element>(pair);
      return pack<cutlass::half_t>(x.x * factor, x.y * factor);
    };
    CUTE_UNROLL
    for (int first = 0; first < Traits::kBlockRows; first += 4) {
      const Four k = *reinterpret_cast<const Four*>(&s.scale[own.number()][0][first]),
                 q = *reinterpret_cast<const Four*>(&s.scale[own.number()][1][first]);
      uint32_t words[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = own.word(s, s.q, first + i);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        own.k[first + i] = scaled(own.k[first + i], k.x[i]);
        own.word(s, s.scaled_q, first + i) = scaled(words[i], q.x[i]);
      }
    }
  }
}

// Two channels times their decays in float16. In float16 itself, of which more is asked, the decays are not
// rounded.
template <bool kRounded>
struct LevelDecay {
  float2 e;
  uint32_t half;
  __device__ __forceinline__ LevelDecay(float2 e) : e(e), half(pack<cutlass::half_t>(e.x, e.y)) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t pair) const {
    if constexpr (kRounded) {
      uint32_t product;
      asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(half));
      return product;
    } else {
      const float2 x = unpack<cutlass::half_t>(pair) * e;
      return pack<cutlass::half_t>(x.x, x.y);
    }
  }
};

// As in channel_levels.cuh, with rows and decays in float16.
template <int kLevel, class Traits>
__device__ __forceinline__ float4 diagonal_level(typename Traits::Storage& s, const Columns<Traits>& own) {
  constexpr int kStep = 1 << kLevel;
  const int lane = thread_now() % 32;
  const uint32_t start = cast_smem_ptr_to_uint(&s);
  const auto put_with = [&](int row, uint32_t pair) { own.word(s, s.right, row) = pair; };
  const auto put_without = [&](int row, uint32_t pair) {
    own.word(s, s.without, row, Traits::kPart / 2) = pair;
  };
  __syncwarp();
  uint32_t q[8];  // before they would wait for stores
  CUTE_UNROLL
  for (int i = 0; i < kLevelBlock; ++i)
    if (i & kStep) q[number_of<kLevel>(i)] = own.word(s, Traits::kScaled ? s.scaled_q : s.q, i);
  for_rows_of_level<kLevel>(
      own.decay,
      [&](int m) {
        put_with(number_of<kLevel>(m), own.k[m]);
        put_with(8 + number_of<kLevel>(m), q[number_of<kLevel>(m)]);
      },
      [&](int i, float2 e) {
        const LevelDecay<Traits::kScaled> times(e);
        put_with(number_of<kLevel>(i), times(own.k[i]));
        put_with(8 + number_of<kLevel>(i), times(q[number_of<kLevel>(i)]));
      },
      [&](int i, float2 e) { put_without(number_of<kLevel>(i), LevelDecay<Traits::kScaled>(e)(own.k[i])); });
  __syncwarp();
  float sums[2][4] = {};  // a product waits for the last of the same sum
  CUTE_UNROLL
  for (int piece = 0; piece < 8; piece += 4) {
    uint32_t right[4];
    load_matrices(start + own.number() * Traits::kPart + matrix_start(0, lane / 8), bytes_to(s, s.without),
                  piece, right);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t left[4];
      load_matrices(start + own.number() * Traits::kPart * 2 + matrix_start(lane / 8 % 2, lane / 16),
                    bytes_to(s, s.right), piece + 2 * h, left);
      warp_mma<typename Traits::LevelElement>(sums[h], left, right[2 * h], right[2 * h + 1]);
    }
  }
  return {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]};
}

// Where this lane's pairs of a level are among the sums of all levels; -1: they are of no use.
__device__ __forceinline__ int place_of_sums(int level) {
  const int row = thread_now() % 32 / 4, pair = thread_now() % 4;
  if (level == 3) return thread_now() % 32;
  if (level == 2) return row / 4 == pair / 2 ? 32 + 2 * row + pair % 2 : -1;
  return row / 2 == pair ? (level == 1 ? 48 : 56) + row : -1;
}

// The levels of a diagonal block over a warp's channels.
template <class Traits>
__device__ __forceinline__ void diagonal_levels(typename Traits::Storage& s, const Columns<Traits>& own) {
  float4 sums[kLevels] = {diagonal_level<0>(s, own), diagonal_level<1>(s, own), diagonal_level<2>(s, own),
                          diagonal_level<3>(s, own)};
  __syncwarp();
  auto& to = s.level_sums[own.number()];
  const auto& [k, q] = s.unscale[own.number()];
  const int row = thread_now() % 32 / 4, column = thread_now() % 4 * 2;
  CUTE_UNROLL
  for (int level = 0; level < kLevels; ++level) {
    const int at = place_of_sums(level);
    if (at < 0) continue;
    float4& sum = sums[level];
    if constexpr (Traits::kScaled) {
      const int i = without_bit(level, row) | 1 << level;
      const float2 of_column{k[without_bit(level, column)], k[without_bit(level, column + 1)]};
      sum.x = sum.x * k[i] * of_column.x, sum.y = sum.y * k[i] * of_column.y;
      sum.z = sum.z * q[i] * of_column.x, sum.w = sum.w * q[i] * of_column.y;
    }
    to[0][at] = {sum.x, sum.y};
    to[1][at] = {sum.z, sum.w};
  }
}

// Calls f(row, column, sums) for the pairs of columns of diagonal block w of A or of P that this lane has:
// the column and the next. Next to what has level 0 alone is the diagonal, of which the sums are not here.
template <bool kOfP, class Traits, class F>
__device__ __forceinline__ void for_block(typename Traits::Storage& s, int w, const F& f) {
  const int lane = thread_now() % 32;
  CUTE_UNROLL
  for (int at = lane; at < Traits::kLevelWords; at += 32) {
    float2 sums{0.f, 0.f};
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half)
      sums = sums + s.level_sums[half * Traits::kBlocks + w][kOfP][at];
    // As place_of_sums has them: row number and column of levels 3, and 2, 1, 0.
    int i = 8 + lane / 4, j = lane % 4 * 2;
    if (at >= 32) {
      const int row = lane < 16 ? lane / 2 : lane % 8, level = lane < 16 ? 2 : lane < 24 ? 1 : 0;
      i = without_bit(level, row) | 1 << level;
      j = (row >> level << (level + 1)) + (lane < 16 ? lane % 2 * 2 : 0);
      if (lane >= 24 && row % 2 != 0) sums.x = sums.y;
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
  }
  __syncwarp();
}

// Kh, scale Qh and Kt to scratch; L and R.
template <class Traits>
__device__ __forceinline__ void scale_rows(typename Traits::Storage& s, const PrepareArgs& args,
                                           int64_t index, Columns<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows, kLast = Traits::kBlocks - 1;
  if constexpr (Traits::kScaled) {
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) own.k[i] = own.word(s, s.k, i);
  }
  const int first = kBlockRows * own.block;
  const auto to = [&](void* scratch) {
    return own.own(static_cast<Element*>(scratch) + index * Traits::kTile);
  };
  auto *Kh = to(args.scratch.Kh), *Qh = to(args.scratch.Qh), *Kt = to(args.scratch.Kt);
  const auto four = [&](const float (&of)[kRows], int i) {
    return *reinterpret_cast<const Four*>(&of[first + i / 4 * 4]);
  };
  const auto rounded = [](float2 x) { return pack<Element>(x.x, x.y); };
  const auto put_scaled = [&](Element* image, int i, float2 x, float2 e, float factor) {
    put_pair_at(image, i, rounded(x * (float2{factor, factor} * e)));
  };
  Four k_norm, q_norm;
  // L, which nobody needs of the first block.
  const float2 start = own.start(s), from_start = exp2_fast(start);
  if (own.block == kLast)
    own.put(args.scratch.decay + index * Traits::kKeyDim, exp2_fast(start + own.of(s.gates[own.block])));
  constexpr int kTogether = 8;  // rows whose loads are not to wait for stores
  uint32_t q_words[kTogether];
  float2 e{1.f, 1.f};
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) {
    if (i % kTogether == 0) {
      CUTE_UNROLL
      for (int x = 0; x < kTogether; ++x) q_words[x] = own.word(s, s.q, i + x);
    }
    if (i % 4 == 0) k_norm = four(s.k_norm, i), q_norm = four(s.p_row, i);
    const float2 k = unpack<Element>(own.k[i]) * e, q = unpack<Element>(q_words[i % kTogether]) * e;
    if (own.block > 0) own.word(s, s.k, i) = rounded(k), own.word(s, s.q, i) = rounded(q);
    put_scaled(Kh, i, k, from_start, k_norm.x[i % 4]);
    put_scaled(Qh, i, q, from_start, q_norm.x[i % 4]);
    e = e * own.decay[i];
  }
  // R, which nobody needs of the last block; also for blocks that are not the next.
  const float2 to_end = exp2_fast(own.after(s));
  float2 far[2] = {};
  if (own.block < 2) far[0] = exp2_fast(own.of(s.gates[own.block + 1]));
  if (own.block == 0) far[1] = exp2_fast(own.of(s.gates[1]) + own.of(s.gates[2]));
  const Element* far_tile = own.block == 0 ? s.k : s.right + (kLast - 1) * Traits::kPart;
  e = {1.f, 1.f};
  CUTE_UNROLL
  for (int i = kBlockRows - 1; i >= 0; --i) {
    if (i % 4 == 3) k_norm = four(s.k_norm, i);
    e = e * own.decay[i];
    const float2 k = unpack<Element>(own.k[i]) * e;
    if (own.block < kLast) own.word(s, s.right, i) = rounded(k);
    if (own.block < 2) own.word(s, far_tile, i) = rounded(k * far[0]);
    if (own.block == 0) own.word(s, s.q, i) = rounded(k * far[1]);
    put_scaled(Kt, i, k, to_end, k_norm.x[i % 4]);
  }
}

// What rounding Kt lost, to scratch. K, gates and Kt come from memory again: hard chunks are few.
template <class Traits>
__device__ __forceinline__ void put_Kt_low(typename Traits::Storage& s, const PrepareArgs& args,
                                           const ChunkPlace& place, const Columns<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows;
  const ForwardInputsSm90& in = args.in;
  const int c = own.channel(), first = kBlockRows * own.block;
  const auto to = [&](void* scratch) {
    return own.own(static_cast<Element*>(scratch) + place.index * Traits::kTile);
  };
  auto *Kt = to(args.scratch.Kt), *Kt_low = to(args.scratch.Kt_low);
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
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const float2 k_norm = *reinterpret_cast<const float2*>(&s.k_norm[16 * J + 8 * n + 2 * t]);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h + lane / 4, i = 16 * I + row;
        const auto scaled = [&](const float (&c)[4], float factor) -> float2 {
          return {factor * k_norm.x * c[2 * h], factor * k_norm.y * c[2 * h + 1]};
        };
        const float2 a = scaled(of_k[n], s.a_row[i]), p = scaled(of_q[n], s.p_row[i]);
        uint32_t high, low;
        split_pair(a.x, a.y, high, low);
        const int at = block_piece_at(row, n) + 2 * t;
        *reinterpret_cast<uint32_t*>(&s.a.high[block][at]) = high;
        *reinterpret_cast<uint32_t*>(&s.a.low[block][at]) = low;
        high = pack<Element>(p.x, p.y);
        *reinterpret_cast<uint32_t*>(image_piece(s.p, i, 2 * J + n) + 2 * t) = high;
        if constexpr (Traits::kLow) {
          *reinterpret_cast<uint32_t*>(image_piece(s.p_low, i, 2 * J + n) + 2 * t) =
              pack_low<Element>(p.x, p.y, high);
        }
      }
    }
  }
};

// A warp: diagonal block w of P, and zeros right of it; in what P lost to rounding only above the diagonal.
template <class Traits>
__device__ __forceinline__ void put_diagonal_of_P(typename Traits::Storage& s, int w) {
  using Element = typename Traits::Element;
  const int lane = thread_now() % 32;
  const auto zero = [&](Element* image, int row, int piece) {
    *reinterpret_cast<uint4*>(image_piece(image, 16 * w + row, piece)) = uint4{0, 0, 0, 0};
  };
  for (int piece = 2 * w + lane / 16; piece < 8; piece += 2) zero(s.p, lane % 16, piece);
  if constexpr (Traits::kLow) zero(s.p_low, lane % 16, 2 * w + lane / 16);
  __syncwarp();
  const auto put = [&](int i, int j, float2 p) {
    const float factor = s.p_row[i];
    const float2 k_norm = *reinterpret_cast<const float2*>(&s.k_norm[j]);
    p = p * (float2{factor, factor} * k_norm);
    const uint32_t high = pack<Element>(p.x, p.y);
    const auto at = [&](Element* image) {
      return reinterpret_cast<uint32_t*>(image_piece(image, i, j / 8) + j % 8);
    };
    *at(s.p) = high;
    if constexpr (Traits::kLow) *at(s.p_low) = pack_low<Element>(p.x, p.y, high);
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
