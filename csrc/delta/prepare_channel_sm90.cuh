// Preparing a chunk with a gate per channel. e^{G_i - G_j} has a factor for each channel and does not split
// over 64 rows without overflow. So pairs are grouped by the highest bit in which i and j differ, bit l:
// between them lies a row m, the first with this bit set, and both e^{G_i - G_m} and e^{G_m - G_j} are at
// most 1, however strong the gate. A level has as many rows with the bit as without: one product
//   [k e^{G - G_m}; q e^{G - G_m}] (rows with the bit) times k e^{G_m - G} (rows without)
// gives its part of A and of P. A thread owns two channels of 16 rows, k, q and e^g, in registers: every
// decay is a running product along its rows, so there is one exponential per row and channel. Levels 0 to 3,
// the diagonal 16 x 16 blocks, need nothing of other warps; levels 4 and 5 are products of a warpgroup.
#pragma once

#include "delta/channel_levels.cuh"
#include "delta/prepare_steps_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct PrepareChannelTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kChunkThreads = 256;
  static constexpr int kSender = 128;            // of the warps that do not invert
  static constexpr int kTile = kKeyDim * kRows;  // elements
  static constexpr int kHalves = kKeyDim / kImageColumns;
  static constexpr int kBlockRows = kLevelBlock, kBlocks = kRows / kBlockRows;
  static constexpr int kOwners = kBlocks * kHalves;            // warps that own rows and channels
  static constexpr int kFrontRows = 4 / kHalves * kBlockRows;  // of the first warpgroup
  static constexpr bool kLow = std::is_same_v<Tag, bf16>;
  static constexpr int kHalfRows = kRows / 2;
  // A level: all rows that have its bit, as k and as q, times all that have it not.
  using Mma =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float,
                                                   cute::Shape<Int<kRows>, Int<kHalfRows>, Int<kKeyDim>>>()));
  using LayoutRight = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                             cute::Shape<Int<kHalfRows>, Int<kKeyDim>>{}));

  struct Level {
    alignas(1024) Element left[kTile];       // [K / 64][32 of k, 32 of q][64]
    alignas(1024) Element right[kTile / 2];  // [K / 64][32][64]
  };
  struct Storage {  // of a chunk
    // Where the K of a warp was in registers it leaves its sums of the levels of a diagonal block.
    union {
      alignas(1024) Element k[kTile];
      struct {
        alignas(1024) Element n[kImage];
        alignas(1024) Element kt_low_front[kFrontRows * kKeyDim];  // [K / 64][rows][64]
      };
    };
    union {
      alignas(1024) Element q[kTile];
      struct {
        alignas(1024) Element p[kImage];
        alignas(1024) Element p_low[kImage];
      };
    };
    union {
      alignas(1024) float stage[kOwners][kStageRows * kImageColumns];
      Level level[2];  // 4 and 5
      struct {
        alignas(1024) Element n_low[kImage];
        alignas(1024) Element kt_low_back[kTile / 2];
      };
    };
    SplitBlocks a;
    alignas(128) ChunkRows rows;
    alignas(16) float gates[kBlocks][kKeyDim];     // sums over the rows after each of a block, in log2
    alignas(16) float first[kKeyDim];              // gate of the first row
    float products[kHalves][3][kRows];             // k . k, q . q and q . k of a row
    float beta[kRows];                             // while those of the chunk before are on their way out
    alignas(16) float a_row[kRows], p_row[kRows];  // beta k_norm and scale q_norm
    float q_k[kRows];
    TriangularScratch triangular;
    float squares[4];
    uint64_t arrived;
    struct {
      uint32_t index;  // of the chunk, as in ChunkPlace
      int valid;
      uint32_t turn;
    } now;  // read anew each time: registers are short
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

// Where the two channels of this lane are in row i of those after `first`, a multiple of 8 rows, of an image
// of 64 columns. In shared memory: an exclusive or and an offset that is known when i is.
template <class Element>
__device__ __forceinline__ uint32_t* pair_at(Element* images, int first, int i) {
  constexpr int kRowBytes = kImageColumns * 2;
  const int lane = threadIdx.x % 32;
  const int at = (first * kRowBytes + 4 * lane) ^ (i % 8 * 16);
  return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(images) + at + i * kRowBytes);
}
// The same in global memory, where that leaves the upper half of the address alone.
template <class Element>
__device__ __forceinline__ void put_pair_at(Element* image, int i, uint32_t pair) {
  constexpr int kRowBytes = kImageColumns * 2;
  const auto start = reinterpret_cast<uintptr_t>(image) + threadIdx.x % 32 * 4;
  __stcg(reinterpret_cast<unsigned int*>((start ^ (i % 8 * 16)) + i * kRowBytes), pair);
}

template <class Traits>
struct Columns {
  using Element = typename Traits::Element;
  static constexpr int kBlockRows = Traits::kBlockRows;
  int block, half;           // rows 16 block and following, channels 64 half + 2 lane and the next
  float2 decay[kBlockRows];  // e^g of the row after; before take_decays g in units of log2
  uint32_t k[kBlockRows], q[kBlockRows];

  __device__ __forceinline__ int channel() const { return 64 * half + 2 * (threadIdx.x % 32); }
  __device__ __forceinline__ float2 of(const float* channels) const {
    return *reinterpret_cast<const float2*>(channels + channel());
  }
  __device__ __forceinline__ void put(float* channels, float2 x) const {
    *reinterpret_cast<float2*>(channels + channel()) = x;
  }

  // Gates of the rows after each of the block, with all loads in flight at once, and their sum; of block 0
  // also the first row's. Rows past the end have gate 0.
  __device__ __forceinline__ void load_gates(typename Traits::Storage& s, const PrepareArgs& args,
                                             const ChunkPlace& place) {
    const ForwardInputsSm90& in = args.in;
    const int c = channel(), before = kBlockRows * block;
    const bool inside = c < in.key_dim;
    const int count = inside ? place.valid - before : 0;
    const float* from = in.g + place.token_head(in, before) * in.key_dim + c;
    const int64_t stride = in.value_heads * in.key_dim;
    float2 head{0.f, 0.f};
    if (block == 0 && count > 0) head = *reinterpret_cast<const float2*>(from);
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) {
      from += stride;
      decay[i] = i + 1 < count ? *reinterpret_cast<const float2*>(from) : float2{0.f, 0.f};
    }
    if (in.gate == Gate::kLog) {
      head = {in_log2(head.x), in_log2(head.y)};
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) decay[i] = {in_log2(decay[i].x), in_log2(decay[i].y)};
    } else {
      const float rate = in.A_log != nullptr ? expf(in.A_log[place.head]) : 1.f;
      const bool biased = in.dt_bias != nullptr && inside;
      const float* bias = in.dt_bias + place.head * in.key_dim + c;
      const float2 b{biased ? bias[0] : 0.f, biased ? bias[1] : 0.f};
      const auto activated = [&](float2 a, int i) {
        return i < count ? float2{log2_decay(in, a.x + b.x, rate), log2_decay(in, a.y + b.y, rate)}
                         : float2{0.f, 0.f};
      };
      head = activated(head, 0);
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) decay[i] = activated(decay[i], i + 1);
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

  // From gates to decays, once the sums of all blocks are there; G of every row, and e^{G_C}, to scratch.
  __device__ __forceinline__ void take_decays(const typename Traits::Storage& s, const PrepareArgs& args,
                                              int64_t index) {
    constexpr int kKeyDim = Traits::kKeyDim;
    if (args.scratch.G != nullptr) {
      float* to = args.scratch.G + (index * kRows + kBlockRows * block) * kKeyDim;
      float2 G = start(s);
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) {
        put(to + i * kKeyDim, G);
        G = G + decay[i];
      }
    }
    if (block == Traits::kBlocks - 1)
      put(args.scratch.decay + index * kKeyDim, exp2_fast(start(s) + of(s.gates[block])));
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) decay[i] = exp2_fast(decay[i]);
  }

  // What only this warp reads of the tiles: 16 rows of an image.
  __device__ __forceinline__ Element* own(Element* tile) const {
    return tile + half * kImage + kBlockRows * block * kImageColumns;
  }
  // K to registers. Q stays in shared memory for the levels, or registers would be spilled.
  __device__ __forceinline__ void load_k(typename Traits::Storage& s, int valid) {
    const int first = first_row();
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) k[i] = *pair_at(s.k, first, i);
    shared_q = s.q;
    if (valid == kRows) return;  // rows past the end may hold anything, and become 0
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i)
      if (kBlockRows * block + i >= valid) k[i] = *pair_at(s.q, first, i) = 0;
  }
  // Q, too, before P takes its place.
  __device__ __forceinline__ void load_q() {
    CUTE_UNROLL
    for (int i = 0; i < kBlockRows; ++i) q[i] = *pair_at(shared_q, first_row(), i);
    shared_q = nullptr;
  }

  __device__ __forceinline__ float2 k_of(int i) const { return unpack<Element>(k[i]); }
  __device__ __forceinline__ float2 q_of(int i) const {
    if (shared_q == nullptr) return unpack<Element>(q[i]);
    return unpack<Element>(*const_cast<const volatile uint32_t*>(pair_at(shared_q, first_row(), i)));
  }

 private:
  Element* shared_q;  // null once Q is in registers; known when the code is compiled
  __device__ __forceinline__ int first_row() const { return half * kImageRows + kBlockRows * block; }
};

// A warp: k . k, q . q and q . k of its rows over its channels, from the diagonals of products.
template <class Traits>
__device__ __forceinline__ void row_products(typename Traits::Storage& s, const Columns<Traits>& own) {
  using Element = typename Traits::Element;
  using Mma = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, SM80_16x8x16_F32F16F16F32_TN,
                                 SM80_16x8x16_F32BF16BF16F32_TN>;
  const int lane = threadIdx.x % 32;
  float of_k[2][4] = {}, of_q[2][4] = {};  // of rows 0 to 7 and 8 to 15
  const auto product = [](float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
    Mma::fma(c[0], c[1], c[2], c[3], a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]);
  };
  CUTE_UNROLL
  for (int piece = 0; piece < 8; piece += 2) {
    uint32_t k[4], q[4];
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(own.own(s.k), 0, piece), k[0], k[1], k[2], k[3]);
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(own.own(s.q), 0, piece), q[0], q[1], q[2], q[3]);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      product(of_k[h], k[h], q[h], k[h + 2], q[h + 2], k[h], k[h + 2]);  // [k; q] of 8 rows times k
      product(of_q[h], q[h], q[h], q[h + 2], q[h + 2], q[h], q[h + 2]);
    }
  }
  const int row = lane / 4, odd = row % 2;
  if (lane % 4 == row / 2) {
    auto& to = s.products[own.half];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int at = Traits::kBlockRows * own.block + 8 * h + row;
      to[0][at] = odd ? of_k[h][1] : of_k[h][0];
      to[1][at] = odd ? of_q[h][1] : of_q[h][0];
      to[2][at] = odd ? of_k[h][3] : of_k[h][2];
    }
  }
}

// ---- Diagonal blocks: each warp its channels, in registers ----

// The levels of a diagonal block over a warp's channels, left in place of its K.
template <class Traits>
__device__ __forceinline__ void diagonal_levels(typename Traits::Storage& s, const Columns<Traits>& own) {
  const int warp = own.block * Traits::kHalves + own.half, lane = threadIdx.x % 32;
  auto* to = reinterpret_cast<float4*>(own.own(s.k));
  to[lane] = diagonal_level<0>(s.stage[warp], own);
  to[32 + lane] = diagonal_level<1>(s.stage[warp], own);
  to[64 + lane] = diagonal_level<2>(s.stage[warp], own);
  to[96 + lane] = diagonal_level<3>(s.stage[warp], own);
}

// Calls f(row, column, A, P) for what this lane holds of level l of diagonal block w, which it reads where
// the owners of the block have left it.
template <class Traits, class F>
__device__ __forceinline__ void for_level(typename Traits::Storage& s, int level, int w, const F& f) {
  constexpr int kBlockRows = Traits::kBlockRows;
  float4 pairs{};
  CUTE_UNROLL
  for (int half = 0; half < Traits::kHalves; ++half) {
    const auto* from = reinterpret_cast<const float4*>(s.k + half * kImage + kBlockRows * w * kImageColumns);
    const float4 part = from[32 * level + threadIdx.x % 32];
    pairs.x += part.x, pairs.y += part.y, pairs.z += part.z, pairs.w += part.w;
  }
  for_level(level, pairs,
            [&](int i, int j, float a, float p) { f(kBlockRows * w + i, kBlockRows * w + j, a, p); });
}

// ---- Levels 4 and 5, and the scaled rows ----

// Rows of levels 4 and 5 scaled to their anchors.
template <class Traits>
__device__ __forceinline__ void scale_levels(typename Traits::Storage& s, const Columns<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows;
  CUTE_NO_UNROLL
  for (int level = 4; level < 6; ++level) {  // a loop: code that is only run once has to be fetched each time
    auto& to = s.level[level - 4];
    const int first = kBlockRows * (level == 5 ? own.block % 2 : own.block / 2);
    const int left = own.half * kImageRows + first, right = own.half * Traits::kHalfRows + first;
    // Of level 5 blocks 0 and 3 have another block between them and row 32.
    const bool beyond = level == 5 && own.block % 3 == 0;
    float2 e{1.f, 1.f};
    if (beyond) e = exp2_fast(own.of(s.gates[own.block == 0 ? 1 : 2]));
    const auto scaled = [&](float2 x) {
      x = x * e;
      return pack<Element>(x.x, x.y);
    };
    if (own.block >> (level - 4) & 1) {
      CUTE_UNROLL
      for (int i = 0; i < kBlockRows; ++i) {
        *pair_at(to.left, left, i) = scaled(own.k_of(i));
        *pair_at(to.left, left + Traits::kHalfRows, i) = scaled(own.q_of(i));
        e = e * own.decay[i];
      }
    } else {
      CUTE_UNROLL
      for (int i = kBlockRows - 1; i >= 0; --i) {
        e = e * own.decay[i];
        *pair_at(to.right, right, i) = scaled(own.k_of(i));
      }
    }
  }
}

// Kh, scale Qh and Kt, to scratch, and what rounding Kt lost, to shared memory.
template <class Traits>
__device__ __forceinline__ void scale_rows(typename Traits::Storage& s, const PrepareArgs& args,
                                           int64_t index, const Columns<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows;
  const int first = kBlockRows * own.block;
  const auto to = [&](void* scratch) {
    return own.own(static_cast<Element*>(scratch) + index * Traits::kTile);
  };
  auto *Kh = to(args.scratch.Kh), *Qh = to(args.scratch.Qh), *Kt = to(args.scratch.Kt);
  const auto scaled = [](float2 x, float2 e, float factor) { return x * (float2{factor, factor} * e); };
  const auto four = [&](const float (&of)[kRows], int i) {
    return *reinterpret_cast<const Four*>(&of[first + i / 4 * 4]);
  };
  float2 e = exp2_fast(own.start(s));
  Four k_norm, q_norm;
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) {
    if (i % 4 == 0) k_norm = four(s.rows.k_norm, i), q_norm = four(s.p_row, i);
    const float2 k = scaled(own.k_of(i), e, k_norm.x[i % 4]);
    const float2 q = scaled(own.q_of(i), e, q_norm.x[i % 4]);
    put_pair_at(Kh, i, pack<Element>(k.x, k.y));
    put_pair_at(Qh, i, pack<Element>(q.x, q.y));
    e = e * own.decay[i];
  }
  e = exp2_fast(own.after(s));
  constexpr int kFront = Traits::kFrontRows;
  auto* low = first < kFront ? s.kt_low_front : s.kt_low_back;
  const int low_row = own.half * (first < kFront ? kFront : kRows - kFront) + first % kFront;
  CUTE_UNROLL
  for (int i = kBlockRows - 1; i >= 0; --i) {
    if (i % 4 == 3) k_norm = four(s.rows.k_norm, i);
    e = e * own.decay[i];
    const float2 k = scaled(own.k_of(i), e, k_norm.x[i % 4]);
    const uint32_t high = pack<Element>(k.x, k.y);
    put_pair_at(Kt, i, high);
    if constexpr (Traits::kLow) *pair_at(low, low_row, i) = pack_low<Element>(k.x, k.y, high);
  }
}

// ---- A chunk ----

// By eight warps, which `barrier` and the two after it are for; `turn` counts their chunks. One thread asks
// for the tiles, sends the results away and, beside the state pass, announces those of the chunk before while
// others invert. Returns the next turn.
template <class Traits, bool kBeside>
__device__ __forceinline__ uint32_t prepare_channel_chunk(typename Traits::Storage& s, const TokenMaps& maps,
                                                          const PrepareArgs& args, const ChunkPlace& place,
                                                          uint32_t turn, uint32_t barrier) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim, kHalfRows = Traits::kHalfRows;
  const ForwardInputsSm90& in = args.in;
  const auto now_index = [&] {
    return kBeside ? static_cast<int64_t>(*const_cast<const volatile uint32_t*>(&s.now.index)) : place.index;
  };
  const auto now_valid = [&] {
    return kBeside ? *const_cast<const volatile int*>(&s.now.valid) : place.valid;
  };
  const int thread = kBeside ? threadIdx.x % Traits::kChunkThreads : threadIdx.x,
            warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, t = lane % 4;
  const float scale = static_cast<float>(in.scale);
  const bool with_low = args.scratch.hard != nullptr;
  const bool owns = warp < Traits::kOwners;
  const bool sends = thread == Traits::kSender;
  const auto sync = [&] {
    if constexpr (kBeside) {
      cutlass::arch::NamedBarrier::sync(Traits::kChunkThreads, barrier);
    } else {
      __syncthreads();
    }
  };
  const auto p_piece = [&](int row, int piece) { return image_piece(s.p, row, piece); };
  const auto low_piece = [&](int row, int piece) { return image_piece(s.p_low, row, piece); };

  if (sends) {
    tma_store_wait<0>();  // what was sent of the chunk before has been read
    Barrier::arrive_and_expect_tx(&s.arrived, 2 * Traits::kTile * 2);
    load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
    load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
  }
  if (warp == 7) put_betas(in, s.beta, place, load_betas(in, place));
  Columns<Traits> own;
  own.block = warp / Traits::kHalves, own.half = warp % Traits::kHalves;
  if (owns) own.load_gates(s, args, place);
  if (kBeside && sends)
    s.now.index = static_cast<uint32_t>(place.index), s.now.valid = place.valid, s.now.turn = turn;
  sync();
  Barrier::wait(&s.arrived, turn % 2);
  asm volatile("" ::: "memory");
  if (owns) {
    row_products<Traits>(s, own);
    own.take_decays(s, args, now_index());
    own.load_k(s, now_valid());
    diagonal_levels<Traits>(s, own);
  }
  sync();  // K is in registers, the sums of levels 0 to 3 in its place
  if (thread >= 128 && thread < 128 + kRows) {
    const int row = thread - 128;
    const bool inside = row < now_valid();
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
    s.rows.G[row] = 0.f;
    s.rows.k_norm[row] = norm(sums[0]);
    s.rows.q_norm[row] = norm(sums[1]);
    s.rows.k_read[row] = s.rows.k_write[row] = s.rows.q_read[row] = inside ? 1.f : 0.f;
    s.rows.beta[row] = s.beta[row];
    s.a_row[row] = s.beta[row] * s.rows.k_norm[row];
    s.p_row[row] = scale * s.rows.q_norm[row];
    s.q_k[row] = inside ? sums[2] : 0.f;
  }
  if (owns) {
    scale_levels<Traits>(s, own);
    own.load_q();
  }
  cutlass::arch::fence_view_async_shared();
  sync();  // levels 4 and 5 and the rows are there

  // A_ij = beta_i k_i . k_j e^{G_i - G_j}, P_ij = scale q_i . k_j e^{G_i - G_j}.
  if (warp < 4) {
    for (int x = lane; x < 16 * 8; x += 32) {
      if (x % 8 < 2 * warp) continue;
      *reinterpret_cast<uint4*>(p_piece(16 * warp + x / 8, x % 8)) = uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(low_piece(16 * warp + x / 8, x % 8)) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
    const auto put_p = [&](int i, int j, float p) {
      const uint32_t high = pack<Element>(p, 0.f);
      *reinterpret_cast<uint16_t*>(p_piece(i, j / 8) + j % 8) = static_cast<uint16_t>(high);
      if constexpr (Traits::kLow)
        *reinterpret_cast<uint16_t*>(low_piece(i, j / 8) + j % 8) =
            static_cast<uint16_t>(pack_low<Element>(p, 0.f, high));
    };
    if (lane < 16) {
      const int i = 16 * warp + lane;
      put_p(i, i, s.p_row[i] * s.rows.k_norm[i] * s.q_k[i]);
    }
    const auto put = [&](int i, int j, float a, float p) {
      const float k_norm = s.rows.k_norm[j];
      s.triangular.diagonal[warp][j % 16][i % 16] = s.a_row[i] * k_norm * a;
      put_p(i, j, s.p_row[i] * k_norm * p);
    };
    CUTE_NO_UNROLL
    for (int level = 0; level < 4; ++level) for_level<Traits>(s, level, warp, put);
  } else {
    typename Traits::Mma mma;
    const auto thread_mma = mma.get_slice(thread - 128);
    const auto left = [&](typename Traits::Level& level) {
      return thread_mma.partition_fragment_A(
          make_tensor(make_smem_ptr(level.left), LayoutByRow<Element, kKeyDim>{}));
    };
    const auto right = [&](typename Traits::Level& level) {
      return thread_mma.partition_fragment_B(
          make_tensor(make_smem_ptr(level.right), typename Traits::LayoutRight{}));
    };
    Tensor left_4 = left(s.level[0]), left_5 = left(s.level[1]);
    Tensor right_4 = right(s.level[0]), right_5 = right(s.level[1]);
    Tensor far = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kHalfRows>>{});   // level 5
    Tensor near = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kHalfRows>>{});  // level 4
    issue_gemm<true>(mma, left_5, right_5, far);
    issue_gemm<true>(mma, left_4, right_4, near);
    warpgroup_wait<0>();

    // Warps 0 and 1 of the products hold A, 2 and 3 P; of level 4 the pairs that agree in bit 5 are kept.
    const int second = warp % 2;
    const auto for_pairs = [&](const float (&factor)[kRows], const auto& put) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h + lane / 4;
        const auto scaled = [&](int i, int piece, float x0, float x1) {
          const float2 k_norm = *reinterpret_cast<const float2*>(&s.rows.k_norm[8 * piece + 2 * t]);
          put(i, piece, factor[i] * k_norm.x * x0, factor[i] * k_norm.y * x1);
        };
        CUTE_UNROLL
        for (int n = 0; n < 4; ++n)
          scaled(32 + 16 * second + row, n, far(4 * n + 2 * h), far(4 * n + 2 * h + 1));
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          const int x = 4 * n + 2 * h;
          scaled(16 + 32 * second + row, 4 * second + n, second ? near(x + 8) : near(x),
                 second ? near(x + 9) : near(x + 1));
        }
      }
    };
    if (warp < 6) {
      for_pairs(s.a_row, [&](int i, int piece, float x0, float x1) {
        uint32_t high, low;
        split_pair(x0, x1, high, low);
        const int block = SplitBlocks::index(i / 16, piece / 2),
                  at = SplitBlocks::piece_at(i % 16, piece % 2) + 2 * t;
        *reinterpret_cast<uint32_t*>(&s.a.high[block][at]) = high;
        *reinterpret_cast<uint32_t*>(&s.a.low[block][at]) = low;
      });
    } else {
      for_pairs(s.p_row, [&](int i, int piece, float x0, float x1) {
        const uint32_t high = pack<Element>(x0, x1);
        *reinterpret_cast<uint32_t*>(p_piece(i, piece) + 2 * t) = high;
        if constexpr (Traits::kLow)
          *reinterpret_cast<uint32_t*>(low_piece(i, piece) + 2 * t) = pack_low<Element>(x0, x1, high);
      });
    }
  }
  // The sums of levels 0 to 3 and the operands of levels 4 and 5 have been read, by the same warpgroup.
  cutlass::arch::NamedBarrier::sync(128, barrier + 1 + warp / 4);
  if (owns) scale_rows<Traits>(s, args, now_index(), own);
  cutlass::arch::fence_view_async_shared();
  sync();  // A and P are there
  if (warp < 4) {
    put_squares(s.squares, invert<false>(s.a, s.triangular, s.n, s.n, barrier + 1));
    cutlass::arch::fence_view_async_shared();
  } else if (kBeside && sends && s.now.turn > 0) {
    announce(args, s.sent.index, s.sent.hard);  // while it would only wait
  }
  const int valid = now_valid();
  const uint32_t next_turn = kBeside ? s.now.turn + 1 : 0;
  sync();
  const int64_t index = now_index();
  const auto to = [&](void* scratch) { return static_cast<Element*>(scratch) + index * kImage; };
  const bool hard = with_low && is_hard(s.squares, valid);
  if (sends) {
    copy_out(args.scratch.rows + index, &s.rows, sizeof(ChunkRows));
    copy_out(to(args.scratch.N), s.n, kImageBytes);
    copy_out(to(args.scratch.P), s.p, kImageBytes);
    if (with_low) args.scratch.hard[index] = hard ? 1.f : 0.f;
    tma_store_arrive();
    if (kBeside) s.sent.index = static_cast<uint32_t>(index), s.sent.hard = hard;
    if (hard) tma_store_wait<0>();
  }
  if (!hard) return next_turn;
  sync();  // the results have been read
  if (warp < 4) {
    invert<true>(s.a, s.triangular, s.n, s.n_low, barrier + 1);
    cutlass::arch::fence_view_async_shared();
  }
  sync();
  if (sends) {
    copy_out(to(args.scratch.N_low), s.n_low, kImageBytes);
    copy_out(to(args.scratch.P_low), s.p_low, kImageBytes);
    constexpr int kFront = Traits::kFrontRows * kImageColumns, kBack = static_cast<int>(kImage) - kFront;
    auto* Kt_low = static_cast<Element*>(args.scratch.Kt_low) + index * Traits::kTile;
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half) {
      copy_out(Kt_low + half * kImage, s.kt_low_front + half * kFront, kFront * 2);
      if constexpr (kBack > 0)
        copy_out(Kt_low + half * kImage + kFront, s.kt_low_back + half * kBack, kBack * 2);
    }
    tma_store_arrive();
  }
  return next_turn;
}

// ---- Kernels ----

// A chunk and no more.
template <class Traits>
__global__ void __launch_bounds__(Traits::kChunkThreads, 2)
    prepare_channel_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  auto& s = shared_storage<typename Traits::Storage>();
  ChunkPlace place;
  const auto heads = static_cast<uint32_t>(args.in.value_heads);
  if (!place.find(args.in, blockIdx.x / heads, blockIdx.x % heads)) return;
  if (threadIdx.x == Traits::kSender) {
    cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  prepare_channel_chunk<Traits, false>(s, maps, args, place, 0, 1);
  if (threadIdx.x == Traits::kSender) tma_store_wait<0>();
}

// Beside the state pass: a CTA has an SM, and each half of it prepares chunk after chunk.
template <class Traits>
__global__ void __launch_bounds__(2 * Traits::kChunkThreads, 1)
    prepare_channel_beside_kernel(const __grid_constant__ TokenMaps maps,
                                  const __grid_constant__ PrepareArgs args) {
  // The state pass takes the other SMs once all of these CTAs have theirs.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const uint32_t half = threadIdx.x / Traits::kChunkThreads;
  auto& s = shared_storage<typename Traits::Pair>().half[half];
  if (threadIdx.x % Traits::kChunkThreads == 0) {
    cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  ChunkPlace place;
  uint32_t turn = 0;
  while (place.find_for_walks(args.in, 2 * (turn * gridDim.x + blockIdx.x) + half))
    turn = prepare_channel_chunk<Traits, true>(s, maps, args, place, turn, 1 + 3 * half);
  if (turn > 0 && threadIdx.x % Traits::kChunkThreads == Traits::kSender)
    announce(args, s.sent.index, s.sent.hard);
}

}  // namespace nearfield::delta
