// Preparing a chunk with a gate per channel. e^{G_i - G_j} has a factor for each channel and does not split
// over 64 rows without overflow. So pairs are grouped by the highest bit in which i and j differ, bit l:
// between them lies a row m, the first with this bit set, and both e^{G_i - G_m} and e^{G_m - G_j} are at
// most 1, however strong the gate. A level has as many rows with the bit as without: one product
//   [k e^{G - G_m}; q e^{G - G_m}] (rows with the bit) times k e^{G_m - G} (rows without)
// gives its part of A and of P. Two warpgroups: the first makes the diagonal 16 x 16 blocks, levels 0 to 3,
// in registers, and then N; the second makes levels 4 and 5 and scale Qh, and then Kh and Kt.
#pragma once

#include "delta/prepare_steps_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct PrepareChannelTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kThreads = 256;
  static constexpr int kTile = kKeyDim * kRows;      // elements
  static constexpr int kPieces = kKeyDim / 8;        // of 16 bytes in a row
  static constexpr int kParts = kThreads / kKeyDim;  // parts of the cumulative sum
  static constexpr int kPartRows = kRows / kParts;
  static constexpr int kHalfRows = kRows / 2;
  // A level: all rows that have its bit, as k and as q, times all that have it not.
  using Mma =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float,
                                                   cute::Shape<Int<kRows>, Int<kHalfRows>, Int<kKeyDim>>>()));
  using LayoutRight = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                             cute::Shape<Int<kHalfRows>, Int<kKeyDim>>{}));

  // Groups of four channels, the even ones before the odd ones, so that lanes that read eight channels each
  // read different banks; rows that follow each other begin 8 banks apart.
  static constexpr int kOdd = kKeyDim / 2 + 8, kGateRow = kKeyDim + 8;
  static __device__ __forceinline__ int gate_at(int c) { return c / 4 % 2 * kOdd + c / 8 * 4 + c % 4; }

  // Q and the scaled rows die with the last product: N and P take the place of Q, A, split in halves, that
  // of the scaled rows.
  struct Storage {
    alignas(1024) Element k[kTile];
    union {
      alignas(1024) Element q[kTile];
      struct {
        alignas(1024) Element n[kImage];
        alignas(1024) Element p[kImage];
      };
    };
    union {
      struct {
        alignas(1024) Element left[kTile];       // [K / 64][32 of k, 32 of q][64]
        alignas(1024) Element right[kTile / 2];  // [K / 64][32][64]
      };
      struct {
        SplitBlocks a;
        alignas(1024) Element n_low[kImage];
      };
    };
    alignas(1024) Element p_low[kImage];
    alignas(128) float G[kRows][kGateRow];  // channel c at gate_at(c)
    alignas(128) float decay[kKeyDim];
    alignas(128) ChunkRows rows;
    float part[kParts][kKeyDim];  // sums of the parts
    float q_k[kRows];             // q_i . k_i
    TriangularScratch triangular;
    float squares[4];
    uint64_t arrived;
  };
  static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two CTAs share an SM");
};

// ---- Rows ----

struct Eight {
  float x[8];
};

// Channels 8 piece and following of a row of G.
template <class Traits>
__device__ __forceinline__ Eight load_gates(const float (&G)[kRows][Traits::kGateRow], int row, int piece) {
  const float4 a = *reinterpret_cast<const float4*>(&G[row][4 * piece]);
  const float4 b = *reinterpret_cast<const float4*>(&G[row][Traits::kOdd + 4 * piece]);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

template <class Element>
__device__ __forceinline__ Eight load_row(Element* images, int row, int piece) {
  const uint4 words =
      *reinterpret_cast<const uint4*>(image_piece(images + piece / 8 * kImage, row, piece % 8));
  const float2 a = unpack<Element>(words.x), b = unpack<Element>(words.y), c = unpack<Element>(words.z),
               d = unpack<Element>(words.w);
  return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
}

template <class Element>
__device__ __forceinline__ uint4 scaled(const Eight& from, const Eight& factor, float common) {
  const auto word = [&](int i) {
    return pack<Element>(common * from.x[i] * factor.x[i], common * from.x[i + 1] * factor.x[i + 1]);
  };
  return {word(0), word(2), word(4), word(6)};
}

// e^{a - b}, in units of log2
__device__ __forceinline__ Eight decay_between(const Eight& a, const Eight& b) {
  Eight e;
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) e.x[i] = exp2_fast(a.x[i] - b.x[i]);
  return e;
}

// Two threads per row: sums of squares of k and q, and their product.
template <class Traits>
__device__ __forceinline__ float3 row_sums(typename Traits::Storage& s, int row, int half) {
  float3 sum{0.f, 0.f, 0.f};
  CUTE_UNROLL
  for (int p = 0; p < Traits::kPieces / 2; ++p) {
    const Eight k = load_row(s.k, row, 2 * p + half), q = load_row(s.q, row, 2 * p + half);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) {
      sum.x += k.x[i] * k.x[i];
      sum.y += q.x[i] * q.x[i];
      sum.z += q.x[i] * k.x[i];
    }
  }
  return {sum.x + __shfl_xor_sync(0xffffffffu, sum.x, 1), sum.y + __shfl_xor_sync(0xffffffffu, sum.y, 1),
          sum.z + __shfl_xor_sync(0xffffffffu, sum.z, 1)};
}

// ---- Cumulative gates ----

// All threads: a channel of one part of the rows each, with all its loads in flight at once.
template <class Traits>
__device__ __forceinline__ void sum_channel_gates(typename Traits::Storage& s, const PrepareArgs& args,
                                                  const ChunkPlace& place) {
  constexpr int kKeyDim = Traits::kKeyDim, kPartRows = Traits::kPartRows;
  const InputsSm90& in = args.in;
  const int c = threadIdx.x % kKeyDim, part = threadIdx.x / kKeyDim, first = part * kPartRows;
  const bool inside = c < in.key_dim;
  const int count = inside ? place.valid - first : 0;
  const float* from = in.g + place.token_head(in, first) * in.key_dim + c;
  const int64_t stride = in.value_heads * in.key_dim;
  float g[kPartRows];
  CUTE_UNROLL
  for (int i = 0; i < kPartRows; ++i) g[i] = i < count ? from[i * stride] : 0.f;
  const float rate = in.A_log != nullptr ? expf(in.A_log[place.head]) : 1.f;
  const float bias = in.dt_bias != nullptr && inside ? in.dt_bias[place.head * in.key_dim + c] : 0.f;
  float sum = 0.f;
  const auto sum_up = [&](const auto& decay_of) {
    CUTE_UNROLL
    for (int i = 0; i < kPartRows; ++i) {
      if (i < count) sum += decay_of(g[i]);
      g[i] = sum;
    }
  };
  if (in.gate == Gate::kLog) {
    sum_up([](float a) { return in_log2(a); });
  } else {
    sum_up([&](float a) { return log2_decay(in, a + bias, rate); });
  }
  s.part[part][c] = sum;
  __syncthreads();
  float before = 0.f;
  for (int p = 0; p < part; ++p) before += s.part[p][c];
  const int at = Traits::gate_at(c);
  CUTE_UNROLL
  for (int i = 0; i < kPartRows; ++i) s.G[first + i][at] = before + g[i];
  if (part == Traits::kParts - 1) s.decay[c] = exp2_fast(before + sum);
  if (args.scratch.G != nullptr) {
    float* to = args.scratch.G + (place.index * kRows + first) * kKeyDim + c;
    CUTE_UNROLL
    for (int i = 0; i < kPartRows; ++i) to[i * kKeyDim] = before + g[i];
  }
}

// ---- Diagonal blocks: a warp each, in registers ----

// Row number x (0 to 7) of those of a block that have not bit l.
template <int kLevel>
__device__ __forceinline__ int without_bit(int x) {
  return x >> kLevel << (kLevel + 1) | (x & ((1 << kLevel) - 1));
}

// The tensor cores drop the low 13 bits; this makes it rounding.
__device__ __forceinline__ uint32_t to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// Level l of a diagonal block. Lane (r, t), r = lane / 4: pairs[e] is A of row number r with the bit and row
// number 2 t + e without it, pairs[2 + e] the same of P; of use where both agree above the bit. No factors of
// norm or beta yet. The factors of the product are rounded to tf32, of which the exponents suffice.
template <class Traits, int kLevel>
__device__ __forceinline__ void diagonal_level(typename Traits::Storage& s, int warp, float (&pairs)[4]) {
  using Mma = SM80_16x8x8_F32TF32TF32F32_TN;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int below = 16 * warp + without_bit<kLevel>(lane / 4), row = below | 1 << kLevel;
  const int anchor = row >> kLevel << kLevel;
  CUTE_UNROLL
  for (int x = 0; x < 4; ++x) pairs[x] = 0.f;
#pragma unroll 2
  for (int piece = t; piece < Traits::kPieces; piece += 4) {
    const Eight G = load_gates<Traits>(s.G, row, piece);
    const Eight G_m = kLevel > 0 ? load_gates<Traits>(s.G, anchor, piece) : G;
    const Eight e_below = decay_between(G_m, load_gates<Traits>(s.G, below, piece));
    Eight k = load_row(s.k, row, piece), q = load_row(s.q, row, piece), k_below = load_row(s.k, below, piece);
    if constexpr (kLevel > 0) {
      const Eight e = decay_between(G, G_m);
      CUTE_UNROLL
      for (int i = 0; i < 8; ++i) k.x[i] *= e.x[i], q.x[i] *= e.x[i];
    }
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) k_below.x[i] *= e_below.x[i];
    CUTE_UNROLL
    for (int i = 0; i < 8; i += 2) {  // which channel is which of the contraction does not matter
      Mma::fma(pairs[0], pairs[1], pairs[2], pairs[3], to_tf32(k.x[i]), to_tf32(q.x[i]), to_tf32(k.x[i + 1]),
               to_tf32(q.x[i + 1]), to_tf32(k_below.x[i]), to_tf32(k_below.x[i + 1]), pairs[0], pairs[1],
               pairs[2], pairs[3]);
    }
  }
}

// Calls f(row, column, A, P) for what this lane holds of a level.
template <int kLevel, class F>
__device__ __forceinline__ void for_level(int warp, const float (&pairs)[4], const F& f) {
  const int x = threadIdx.x % 32 / 4;
  CUTE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int y = threadIdx.x % 4 * 2 + e;
    if (x >> kLevel == y >> kLevel)
      f(16 * warp + (without_bit<kLevel>(x) | 1 << kLevel), 16 * warp + without_bit<kLevel>(y), pairs[e],
        pairs[2 + e]);
  }
}

// ---- Levels 4 and 5, and the scaled rows: the second warpgroup ----

// Where the eight channels `piece` of a row are in an image of so many rows.
template <class Element>
__device__ __forceinline__ uint4* piece_at(Element* images, int rows, int row, int piece) {
  return reinterpret_cast<uint4*>(image_piece(images + piece / 8 * rows * kImageColumns, row, piece % 8));
}

// Rows of a level scaled to its anchors; with level 5 also scale Qh of every row, to scratch.
template <class Traits, int kLevel>
__device__ __forceinline__ void scale_level(typename Traits::Storage& s, const PrepareArgs& args,
                                            const ChunkPlace& place) {
  using Element = typename Traits::Element;
  constexpr int kHalfRows = Traits::kHalfRows;
  const int thread = threadIdx.x - 128, piece = thread % Traits::kPieces;
  auto* Qh = static_cast<Element*>(args.scratch.Qh) + place.index * Traits::kTile;
#pragma unroll 2
  for (int row = thread / Traits::kPieces; row < kRows; row += 128 / Traits::kPieces) {
    const Eight k = load_row(s.k, row, piece), q = load_row(s.q, row, piece);
    const Eight G = load_gates<Traits>(s.G, row, piece);
    const Eight G_m = load_gates<Traits>(s.G, (row >> kLevel | 1) << kLevel, piece);
    const int number = (row >> (kLevel + 1) << kLevel) | (row & ((1 << kLevel) - 1));
    if (row >> kLevel & 1) {
      const Eight e = decay_between(G, G_m);
      *piece_at(s.left, kRows, number, piece) = scaled<Element>(k, e, 1.f);
      *piece_at(s.left, kRows, kHalfRows + number, piece) = scaled<Element>(q, e, 1.f);
    } else {
      *piece_at(s.right, kHalfRows, number, piece) = scaled<Element>(k, decay_between(G_m, G), 1.f);
    }
    if constexpr (kLevel == 5) {
      const float factor = static_cast<float>(args.in.scale) * s.rows.q_norm[row];
      *piece_at(Qh, kRows, row, piece) =  // rows past the end may hold anything, and become 0
          row < place.valid ? scaled<Element>(q, decay_between(G, Eight{}), factor) : uint4{};
    }
  }
}

// Kh and Kt, to scratch; or what rounding Kt lost.
template <class Traits, bool kLow>
__device__ __forceinline__ void scale_keys(typename Traits::Storage& s, const PrepareArgs& args,
                                           const ChunkPlace& place) {
  using Element = typename Traits::Element;
  const int thread = threadIdx.x - 128, piece = thread % Traits::kPieces;
  auto* Kh = static_cast<Element*>(args.scratch.Kh) + place.index * Traits::kTile;
  auto* Kt =
      static_cast<Element*>(kLow ? args.scratch.Kt_low : args.scratch.Kt) + place.index * Traits::kTile;
  const Eight G_end = load_gates<Traits>(s.G, kRows - 1, piece);
#pragma unroll 2
  for (int row = thread / Traits::kPieces; row < kRows; row += 128 / Traits::kPieces) {
    const bool inside = row < place.valid;
    const float norm = s.rows.k_norm[row];
    Eight k = load_row(s.k, row, piece);
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) k.x[i] *= norm;
    const Eight G = load_gates<Traits>(s.G, row, piece);
    const Eight e = decay_between(G_end, G);
    uint4 w = scaled<Element>(k, e, 1.f);
    if constexpr (kLow) {
      const auto lost = [&](int i, uint32_t high) {
        return pack_low<Element>(k.x[i] * e.x[i], k.x[i + 1] * e.x[i + 1], high);
      };
      w = {lost(0, w.x), lost(2, w.y), lost(4, w.z), lost(6, w.w)};
    } else {
      *piece_at(Kh, kRows, row, piece) =
          inside ? scaled<Element>(k, decay_between(G, Eight{}), 1.f) : uint4{};
    }
    *piece_at(Kt, kRows, row, piece) = inside ? w : uint4{};
  }
}

// ---- Kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    prepare_channel_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim, kHalfRows = Traits::kHalfRows;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  ChunkPlace place;
  if (!place.find(in, blockIdx.x / in.value_heads, blockIdx.x % in.value_heads)) return;
  const int valid = place.valid;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, t = lane % 4;
  const float scale = static_cast<float>(in.scale);
  const bool with_low = args.scratch.hard != nullptr;
  const auto p_piece = [&](int row, int piece) { return image_piece(s.p, row, piece); };
  const auto low_piece = [&](int row, int piece) { return image_piece(s.p_low, row, piece); };

  if (thread == 0) {
    Barrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
    Barrier::arrive_and_expect_tx(&s.arrived, 2 * Traits::kTile * 2);
    load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
    load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
  }
  if (warp == 7) put_betas(in, s.rows, place, load_betas(in, place));
  sum_channel_gates<Traits>(s, args, place);
  __syncthreads();
  Barrier::wait(&s.arrived, 0);
  asm volatile("" ::: "memory");

  // A_ij = beta_i k_i . k_j e^{G_i - G_j}, P_ij = scale q_i . k_j e^{G_i - G_j}. Selected, not multiplied by
  // 0: rows past the end may hold anything.
  const auto a_of = [&](int i, int j, float a) {
    return i < valid ? s.rows.beta[i] * s.rows.k_norm[i] * s.rows.k_norm[j] * a : 0.f;
  };
  const auto p_of = [&](int i, int j, float p) {
    return i < valid ? scale * s.rows.q_norm[i] * s.rows.k_norm[j] * p : 0.f;
  };
  if (warp < 4) {
    float pairs[4][4];
    diagonal_level<Traits, 0>(s, warp, pairs[0]);
    diagonal_level<Traits, 1>(s, warp, pairs[1]);
    diagonal_level<Traits, 2>(s, warp, pairs[2]);
    diagonal_level<Traits, 3>(s, warp, pairs[3]);
    __syncthreads();  // Q and the scaled rows are free, the rows complete
    for (int x = lane; x < 16 * 8; x += 32) {
      if (x % 8 < 2 * warp) continue;
      *reinterpret_cast<uint4*>(p_piece(16 * warp + x / 8, x % 8)) = uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(low_piece(16 * warp + x / 8, x % 8)) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
    if (lane < 16) {
      const int i = 16 * warp + lane;
      const float p = p_of(i, i, s.q_k[i]);
      p_piece(i, i / 8)[i % 8] = static_cast<Element>(p);
      low_piece(i, i / 8)[i % 8] = low_half<Element>(p);
    }
    const auto put = [&](int i, int j, float a, float p) {
      s.triangular.diagonal[warp][j % 16][i % 16] = a_of(i, j, a);
      p = p_of(i, j, p);
      p_piece(i, j / 8)[j % 8] = static_cast<Element>(p);
      low_piece(i, j / 8)[j % 8] = low_half<Element>(p);
    };
    for_level<0>(warp, pairs[0], put);
    for_level<1>(warp, pairs[1], put);
    for_level<2>(warp, pairs[2], put);
    for_level<3>(warp, pairs[3], put);
  } else {
    const int row = (thread - 128) / 2;
    const float3 sums = row_sums<Traits>(s, row, thread % 2);
    const auto norm = [&](float squares) {
      if (row >= valid) return 0.f;
      return in.qk_l2norm ? rsqrtf(squares + static_cast<float>(kNormEps)) : 1.f;
    };
    if (thread % 2 == 0) {
      s.rows.G[row] = 0.f;
      s.rows.k_norm[row] = norm(sums.x);
      s.rows.q_norm[row] = norm(sums.y);
      s.rows.k_read[row] = s.rows.k_write[row] = s.rows.q_read[row] = row < valid ? 1.f : 0.f;
      s.q_k[row] = sums.z;
    }
    cutlass::arch::NamedBarrier::sync(128, 2);
    typename Traits::Mma mma;
    const auto thread_mma = mma.get_slice(thread - 128);
    Tensor left =
        thread_mma.partition_fragment_A(make_tensor(make_smem_ptr(s.left), LayoutByRow<Element, kKeyDim>{}));
    Tensor right =
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(s.right), typename Traits::LayoutRight{}));
    Tensor far = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kHalfRows>>{});   // level 5
    Tensor near = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kHalfRows>>{});  // level 4
    scale_level<Traits, 5>(s, args, place);
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 2);
    issue_gemm<true>(mma, left, right, far);
    warpgroup_wait<0>();
    cutlass::arch::NamedBarrier::sync(128, 2);
    scale_level<Traits, 4>(s, args, place);
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 2);
    issue_gemm<true>(mma, left, right, near);
    warpgroup_wait<0>();
    __syncthreads();  // as above

    // Warps 0 and 1 of the products hold A, 2 and 3 P; of level 4 the pairs that agree in bit 5 are kept.
    const int second = warp % 2;
    const auto put = [&](int i, int piece, float x0, float x1) {
      const int j = 8 * piece + 2 * t;
      if (warp < 6) {
        put_pair(s.a, s.triangular, i, piece, a_of(i, j, x0), a_of(i, j + 1, x1));
      } else {
        x0 = p_of(i, j, x0), x1 = p_of(i, j + 1, x1);
        const uint32_t high = pack<Element>(x0, x1);
        *reinterpret_cast<uint32_t*>(p_piece(i, piece) + 2 * t) = high;
        *reinterpret_cast<uint32_t*>(low_piece(i, piece) + 2 * t) = pack_low<Element>(x0, x1, high);
      }
    };
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + lane / 4;
      CUTE_UNROLL
      for (int n = 0; n < 4; ++n) put(32 + 16 * second + row, n, far(4 * n + 2 * h), far(4 * n + 2 * h + 1));
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int x = 4 * n + 2 * h;
        put(16 + 32 * second + row, 4 * second + n, second ? near(x + 8) : near(x),
            second ? near(x + 9) : near(x + 1));
      }
    }
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (warp < 4) {
    put_squares(s.squares, invert<false>(s.a, s.triangular, s.n, s.n));
    cutlass::arch::fence_view_async_shared();
  } else {
    scale_keys<Traits, false>(s, args, place);
  }
  __syncthreads();
  const auto to = [&](void* scratch) { return static_cast<Element*>(scratch) + place.index * kImage; };
  const bool hard = with_low && is_hard(s.squares, valid);
  if (thread == 0) {
    copy_out(args.scratch.rows + place.index, &s.rows, sizeof(ChunkRows));
    copy_out(to(args.scratch.N), s.n, kImageBytes);
    copy_out(to(args.scratch.P), s.p, kImageBytes);
    copy_out(args.scratch.decay + place.index * kKeyDim, s.decay, kKeyDim * 4);
    if (with_low) args.scratch.hard[place.index] = hard ? 1.f : 0.f;
    tma_store_arrive();
    tma_store_wait<0>();
  }
  if (!hard) return;
  __syncthreads();  // the results have been read
  if (warp < 4) {
    invert<true>(s.a, s.triangular, s.n, s.n_low);
    cutlass::arch::fence_view_async_shared();
  } else {
    scale_keys<Traits, true>(s, args, place);
  }
  __syncthreads();
  if (thread == 0) {
    copy_out(to(args.scratch.N_low), s.n_low, kImageBytes);
    copy_out(to(args.scratch.P_low), s.p_low, kImageBytes);
    tma_store_arrive();
    tma_store_wait<0>();
  }
}

}  // namespace nearfield::delta
