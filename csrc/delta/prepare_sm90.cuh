// Everything of a chunk that does not depend on the state, for all chunks at once: gates and their cumulative
// sum, write strengths, norms, N = T - I and P. One warpgroup per (slot, value head); several CTAs share an
// SM and hide each other's latencies.
#pragma once

#include "delta/chunk_sm90.cuh"
#include "nearfield/triangular.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_, bool kWithP_>
struct PrepareTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kWithP = kWithP_;
  static constexpr int kThreads = 128;
  static constexpr int kTile = kKeyDim * kRows;  // elements
  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kRows>, Int<kRows>, Int<kKeyDim>>>()));

  // K and Q die with the products K K^T and Q K^T; A, split in halves, takes the place of K, the results that
  // of Q.
  struct Storage {
    union {
      alignas(1024) Element k[kTile];
      alignas(1024) cutlass::bfloat16_t a[2][kImage];
    };
    union {
      alignas(1024) Element q[kTile];
      struct {
        alignas(1024) Element n[kImage];
        alignas(1024) Element p[kImage];
      };
    };
    alignas(128) ChunkRows rows;
    TriangularScratch triangular;
    uint64_t arrived;
  };
};

// ---- Which chunk ----

struct ChunkPlace {
  int64_t batch, token, head, index;  // the first token; [slot][value head]
  int head_k, valid;

  __device__ __forceinline__ bool find(const InputsSm90& in) {
    const int64_t slot = blockIdx.x / in.value_heads;
    head = blockIdx.x % in.value_heads;
    const Sequence sequence = sequence_of(in, sequence_at_slot(in, slot));
    const int64_t first = (slot - sequence.first_slot) * kRows;
    batch = sequence.batch;
    token = sequence.begin + first;
    index = slot * in.value_heads + head;
    head_k = static_cast<int>(head / (in.value_heads / in.heads));
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - first));
    return first >= 0 && first < sequence.length;
  }
  // Index of a token of the chunk in [B, T, HV].
  __device__ __forceinline__ int64_t token_head(const InputsSm90& in, int row) const {
    return (batch * in.tokens + token + row) * in.value_heads + head;
  }
};

// ---- N = T - I from A ----

// Takes a pair A_ij, A_i(j+1) of the accumulator of warp i / 16; j = 8 n + 2 (lane % 4). Zero on and above
// the diagonal.
__device__ __forceinline__ void put_pair(cutlass::bfloat16_t (&a)[2][kImage], TriangularScratch& triangular,
                                         int i, int n, float a0, float a1) {
  const int warp = i / 16, column = 2 * (threadIdx.x % 4);
  if (n / 2 < warp) {
    uint32_t high, low;
    split_pair(a0, a1, high, low);
    *reinterpret_cast<uint32_t*>(image_piece(a[0], i, n) + column) = high;
    *reinterpret_cast<uint32_t*>(image_piece(a[1], i, n) + column) = low;
  } else if (n / 2 == warp) {
    triangular.diagonal[warp][n % 2 * 8 + column][i % 16] = a0;
    triangular.diagonal[warp][n % 2 * 8 + column + 1][i % 16] = a1;
  }
}

// Four warps, after put_pair of the whole lower triangle.
template <class Element>
__device__ __forceinline__ void invert(cutlass::bfloat16_t (&a)[2][kImage], TriangularScratch& triangular,
                                       Element* image) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncwarp();
  float column[16];
  invert_diagonal_block(triangular, warp, column);
  if (lane < 16) {
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      image_piece(image, 16 * warp + i, 2 * warp + lane / 8)[lane % 8] =
          static_cast<Element>(i > lane ? column[i] : 0.f);
    }
  }
  __syncthreads();
  if (warp < 3) {
    const auto load_a = [&](int I, int M) {
      SplitFragment f;
      SM75_U32x4_LDSM_N::copy(matrices_at<false>(a[0], 16 * I, 2 * M), f.high[0], f.high[1], f.high[2],
                              f.high[3]);
      SM75_U32x4_LDSM_N::copy(matrices_at<false>(a[1], 16 * I, 2 * M), f.low[0], f.low[1], f.low[2],
                              f.low[3]);
      return f;
    };
    const auto store = [&](int I, const float (&y)[2][4]) {
      SM90_U16x8_STSM_T::copy(pack<Element>(y[0][0], y[0][1]), pack<Element>(y[0][2], y[0][3]),
                              pack<Element>(y[1][0], y[1][1]), pack<Element>(y[1][2], y[1][3]),
                              matrices_at<false>(image, 16 * I, 2 * warp));
    };
    solve_block_column(triangular, warp, load_a, store);
  } else {
    for (int x = lane; x < 3 * kRows * 2; x += 32) {  // blocks above the diagonal
      const int row = x / 2 % kRows, piece = 2 * (x / (2 * kRows) + 1) + x % 2;
      if (piece / 2 > row / 16) *reinterpret_cast<uint4*>(image_piece(image, row, piece)) = uint4{0, 0, 0, 0};
    }
  }
}

// ---- Steps ----

// One warp: gates of two tokens per lane, their cumulative sum over the chunk. Tokens past the end have gate
// 0.
__device__ __forceinline__ void sum_gates(const InputsSm90& in, ChunkRows& rows, const ChunkPlace& place) {
  const int lane = threadIdx.x % 32;
  float g[2] = {0.f, 0.f};
  if (in.gated) {
    const float rate = in.A_log != nullptr ? expf(in.A_log[place.head]) : 1.f;
    const float bias = in.dt_bias != nullptr ? in.dt_bias[place.head] : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (2 * lane + i < place.valid) {
        const int64_t at = place.token_head(in, 2 * lane + i);
        g[i] = log2_decay(in, in.g[at] + bias, rate);
      }
    }
  }
  float sum = g[0] + g[1];
  CUTE_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const float below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  rows.G[2 * lane] = sum - g[1];
  rows.G[2 * lane + 1] = sum;
}

__device__ __forceinline__ void load_betas(const InputsSm90& in, ChunkRows& rows, const ChunkPlace& place) {
  for (int i = threadIdx.x % 32; i < kRows; i += 32) {
    const int64_t at = place.token_head(in, i);
    rows.beta[i] = i < place.valid ? activated_beta(in, in.beta[at]) : 0.f;
  }
}

// ---- Gate per head ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 4)
    prepare_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  ChunkPlace place;
  if (!place.find(in)) return;
  const int valid = place.valid;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quad = lane % 4;

  if (thread == 0) {
    Barrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
    Barrier::arrive_and_expect_tx(&s.arrived, (Traits::kWithP ? 2 : 1) * Traits::kTile * 2);
    load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
    if constexpr (Traits::kWithP)
      load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
  }
  if (warp == 1) sum_gates(in, s.rows, place);
  if (warp == 2) load_betas(in, s.rows, place);
  __syncthreads();
  Barrier::wait(&s.arrived, 0);
  asm volatile("" ::: "memory");

  // K K^T and Q K^T, [64, 64]; thread (warp, lane) holds rows 16 warp + lane / 4 and + 8.
  typename Traits::Mma mma;
  auto thread_mma = mma.get_slice(thread);
  Tensor sK = make_tensor(make_smem_ptr(s.k), LayoutByRow<Element, kKeyDim>{});
  Tensor sQ = make_tensor(make_smem_ptr(s.q), LayoutByRow<Element, kKeyDim>{});
  Tensor tK_a = thread_mma.partition_fragment_A(sK), tQ_a = thread_mma.partition_fragment_A(sQ);
  Tensor tK_b = thread_mma.partition_fragment_B(sK);
  Tensor kk = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kRows>>{});
  Tensor qk = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kRows>>{});
  issue_gemm<true>(mma, tK_a, tK_b, kk);
  if constexpr (Traits::kWithP) issue_gemm<true>(mma, tQ_a, tK_b, qk);

  const float k_inverse = in.qk_l2norm ? inverse_norm<kKeyDim>(s.k) : 1.f;
  const float q_inverse = Traits::kWithP && in.qk_l2norm ? inverse_norm<kKeyDim>(s.q) : 1.f;
  if (thread % 2 == 0) {
    const int row = thread / 2;
    const bool inside = row < valid;
    const float G = s.rows.G[row], k_norm = inside ? k_inverse : 0.f;
    const float q_norm = inside ? q_inverse * static_cast<float>(in.scale) : 0.f;
    s.rows.k_norm[row] = k_norm;
    s.rows.q_norm[row] = inside ? q_inverse : 0.f;
    s.rows.k_read[row] = k_norm * exp2_fast(G);
    s.rows.q_read[row] = q_norm * exp2_fast(G);
    s.rows.k_write[row] = k_norm * exp2_fast(s.rows.G[kRows - 1] - G);
  }
  warpgroup_wait<0>();
  __syncthreads();  // K and Q are free, the rows complete

  // A = beta_i k_i . k_j e^{G_i - G_j} below the diagonal, P = scale q_i . k_j e^{G_i - G_j} with it.
  // Selected, not multiplied by 0: rows past the end may hold anything.
  uint32_t p_words[16];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int i = 16 * warp + 8 * h + lane / 4;
    const float G_i = s.rows.G[i], a_row = s.rows.beta[i] * s.rows.k_norm[i];
    const float p_row = s.rows.q_norm[i] * static_cast<float>(in.scale);
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int j = 8 * n + 2 * quad;
      const float2 G_j = *reinterpret_cast<const float2*>(&s.rows.G[j]);
      const float2 k_j = *reinterpret_cast<const float2*>(&s.rows.k_norm[j]);
      float a[2], p[2] = {};
      CUTE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float decay = exp2_fast(i >= j + e ? G_i - (e ? G_j.y : G_j.x) : 0.f) * (e ? k_j.y : k_j.x);
        const int at = 4 * n + 2 * h + e;
        a[e] = i > j + e && i < valid ? a_row * decay * kk(at) : 0.f;
        if constexpr (Traits::kWithP) p[e] = i >= j + e && i < valid ? p_row * decay * qk(at) : 0.f;
      }
      if constexpr (Traits::kWithP) p_words[2 * n + h] = pack<Element>(p[0], p[1]);
      put_pair(s.a, s.triangular, i, n, a[0], a[1]);
    }
  }
  if constexpr (Traits::kWithP) store_rows(s.p, warp, p_words);
  invert(s.a, s.triangular, s.n);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (thread == 0) {
    const int64_t at = place.index;
    copy_out(args.scratch.rows + at, &s.rows, sizeof(ChunkRows));
    copy_out(static_cast<Element*>(args.scratch.N) + at * kImage, s.n, kImageBytes);
    if constexpr (Traits::kWithP) {
      copy_out(static_cast<Element*>(args.scratch.P) + at * kImage, s.p, kImageBytes);
    }
    tma_store_arrive();
    tma_store_wait<0>();
  }
}

// ---- Gate per channel ----

template <class Tag, int kKeyDim_>
struct PrepareChannelTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kThreads = 128;
  static constexpr int kTile = kKeyDim * kRows;
  static constexpr int kPieces = kKeyDim / 8;  // of 16 bytes in a row
  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kRows>, Int<kRows>, Int<kKeyDim>>>()));

  struct Storage {
    alignas(1024) Element k[kTile];
    alignas(1024) Element q[kTile];
    union {
      alignas(1024) Element k_scaled[kTile];
      alignas(1024) cutlass::bfloat16_t a[2][kImage];
    };
    union {
      alignas(1024) Element q_scaled[kTile];
      struct {
        alignas(1024) Element n[kImage];
        alignas(1024) Element p[kImage];
      };
    };
    alignas(128) float G[kRows][kKeyDim];
    alignas(128) float decay[kKeyDim];
    alignas(128) ChunkRows rows;
    TriangularScratch triangular;
    uint64_t arrived;
  };
};

template <int kKeyDim>
__device__ __forceinline__ void sum_channel_gates(const InputsSm90& in, float (&G)[kRows][kKeyDim],
                                                  float* decay, const ChunkPlace& place) {
  const int c = threadIdx.x;
  if (c >= kKeyDim) return;
  const bool inside = c < in.key_dim;
  const float rate = in.A_log != nullptr ? expf(in.A_log[place.head]) : 1.f;
  const float bias = in.dt_bias != nullptr && inside ? in.dt_bias[place.head * in.key_dim + c] : 0.f;
  const float* from = in.g + place.token_head(in, 0) * in.key_dim + c;
  const int64_t stride = in.value_heads * in.key_dim;
  float sum = 0.f;
  for (int first = 0; first < kRows; first += 16) {
    float g[16];
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) g[i] = inside && first + i < place.valid ? from[(first + i) * stride] : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (inside && first + i < place.valid) sum += log2_decay(in, g[i] + bias, rate);
      G[first + i][c] = sum;
    }
  }
  decay[c] = exp2_fast(sum);
}

// to = from e^{exponent(row, anchor)} factor(row), 8 channels at a time; rows without a factor become 0.
template <class Traits, class Exponent, class Factor>
__device__ __forceinline__ void scale_rows(typename Traits::Element* from, typename Traits::Element* to,
                                           const Exponent& exponent, const Factor& factor) {
  using Element = typename Traits::Element;
  const int piece = threadIdx.x % Traits::kPieces;
  CUTE_UNROLL
  for (int row = threadIdx.x / Traits::kPieces; row < kRows; row += Traits::kThreads / Traits::kPieces) {
    const uint4 words =
        *reinterpret_cast<const uint4*>(image_piece(from + piece / 8 * kImage, row, piece % 8));
    const uint32_t in[4] = {words.x, words.y, words.z, words.w};
    uint32_t out[4];
    const float f = factor(row);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<Element>(in[i]), g = exponent(row, piece * 8 + 2 * i);
      out[i] = f == 0.f ? 0 : pack<Element>(f * x.x * exp2_fast(g.x), f * x.y * exp2_fast(g.y));
    }
    *reinterpret_cast<uint4*>(image_piece(to + piece / 8 * kImage, row, piece % 8)) =
        uint4{out[0], out[1], out[2], out[3]};
  }
}

// e^{G_i - G_j} has a factor for each channel and does not split over 64 rows without overflow. So pairs are
// grouped by the highest bit in which i and j differ, bit l: between them lies a row m, the first with this
// bit set, and both e^{G_i - G_m} and e^{G_m - G_j} are at most 1. Each of the six groups is a product of
// scaled rows of which the pairs of the group are kept; the diagonal of P is a seventh without scales.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    prepare_channel_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  ChunkPlace place;
  if (!place.find(in)) return;
  const int valid = place.valid;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const float scale = static_cast<float>(in.scale);

  if (thread == 0) {
    Barrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
    Barrier::arrive_and_expect_tx(&s.arrived, 2 * Traits::kTile * 2);
    load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
    load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
  }
  sum_channel_gates<kKeyDim>(in, s.G, s.decay, place);
  if (warp == 3) load_betas(in, s.rows, place);
  __syncthreads();
  Barrier::wait(&s.arrived, 0);
  asm volatile("" ::: "memory");

  typename Traits::Mma mma;
  const auto thread_mma = mma.get_slice(thread);
  const auto left = [&](Element* image) {
    return thread_mma.partition_fragment_A(
        make_tensor(make_smem_ptr(image), LayoutByRow<Element, kKeyDim>{}));
  };
  const auto right = [&](Element* image) {
    return thread_mma.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByRow<Element, kKeyDim>{}));
  };
  Tensor kk = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kRows>>{});
  Tensor qk = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kRows>>{});
  float A[32], P[32];  // in the order of the accumulators
  issue_gemm<true>(mma, left(s.q), right(s.k), qk);
  const float k_inverse = in.qk_l2norm ? inverse_norm<kKeyDim>(s.k) : 1.f;
  const float q_inverse = in.qk_l2norm ? inverse_norm<kKeyDim>(s.q) : 1.f;
  if (thread % 2 == 0) {
    const int row = thread / 2;
    const float inside = row < valid ? 1.f : 0.f;
    s.rows.G[row] = 0.f;
    s.rows.k_norm[row] = inside * k_inverse;
    s.rows.q_norm[row] = inside * q_inverse;
    s.rows.k_read[row] = s.rows.k_write[row] = s.rows.q_read[row] = inside;
  }
  const auto row_of = [&](int x) { return 16 * warp + 8 * (x / 2 % 2) + lane / 4; };
  const auto column_of = [&](int x) { return 8 * (x / 4) + 2 * quad + x % 2; };
  warpgroup_wait<0>();
  CUTE_UNROLL
  for (int x = 0; x < 32; ++x) {
    A[x] = 0.f;
    P[x] = row_of(x) == column_of(x) ? qk(x) : 0.f;
  }
  for (int level = 0; level < 6; ++level) {
    const auto exponent = [&](int row, int channel) -> float2 {
      const int anchor = (row >> level | 1) << level;
      const float2 g = *reinterpret_cast<const float2*>(&s.G[row][channel]);
      const float2 m = *reinterpret_cast<const float2*>(&s.G[anchor][channel]);
      return row >> level & 1 ? float2{g.x - m.x, g.y - m.y} : float2{m.x - g.x, m.y - g.y};
    };
    scale_rows<Traits>(s.k, s.k_scaled, exponent, [](int) { return 1.f; });
    scale_rows<Traits>(s.q, s.q_scaled, exponent, [&](int row) { return row >> level & 1 ? 1.f : 0.f; });
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    issue_gemm<true>(mma, left(s.k_scaled), right(s.k_scaled), kk);
    issue_gemm<true>(mma, left(s.q_scaled), right(s.k_scaled), qk);
    warpgroup_wait<0>();
    CUTE_UNROLL
    for (int x = 0; x < 32; ++x) {
      const int i = row_of(x), j = column_of(x);
      if (i > j && 31 - __clz(i ^ j) == level) {
        A[x] = kk(x);
        P[x] = qk(x);
      }
    }
    __syncthreads();
  }

  uint32_t p_words[16];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int i = 16 * warp + 8 * h + lane / 4;
    const float a_row = s.rows.beta[i] * s.rows.k_norm[i], p_row = s.rows.q_norm[i] * scale;
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int x = 4 * n + 2 * h, j = 8 * n + 2 * quad;
      const float2 k_j = *reinterpret_cast<const float2*>(&s.rows.k_norm[j]);
      const auto kept = [&](float value, float factor) { return i < valid ? factor * value : 0.f; };
      p_words[2 * n + h] = pack<Element>(kept(P[x], p_row * k_j.x), kept(P[x + 1], p_row * k_j.y));
      put_pair(s.a, s.triangular, i, n, kept(A[x], a_row * k_j.x), kept(A[x + 1], a_row * k_j.y));
    }
  }
  store_rows(s.p, warp, p_words);
  invert(s.a, s.triangular, s.n);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  const auto to = [&](void* scratch, int images) {
    return static_cast<Element*>(scratch) + place.index * images * kImage;
  };
  if (thread == 0) {
    copy_out(args.scratch.rows + place.index, &s.rows, sizeof(ChunkRows));
    copy_out(to(args.scratch.N, 1), s.n, kImageBytes);
    copy_out(to(args.scratch.P, 1), s.p, kImageBytes);
    copy_out(args.scratch.decay + place.index * kKeyDim, s.decay, kKeyDim * 4);
    if (args.scratch.G != nullptr) copy_out(args.scratch.G + place.index * kRows * kKeyDim, s.G, sizeof(s.G));
    tma_store_arrive();
  }

  // Qh over Q, Kt where A was, Kh over K.
  const auto from_start = [&](int row, int channel) -> float2 {
    return *reinterpret_cast<const float2*>(&s.G[row][channel]);
  };
  const auto to_end = [&](int row, int channel) -> float2 {
    const float2 g = *reinterpret_cast<const float2*>(&s.G[row][channel]);
    const float2 end = *reinterpret_cast<const float2*>(&s.G[kRows - 1][channel]);
    return {end.x - g.x, end.y - g.y};
  };
  const auto k_factor = [&](int row) { return s.rows.k_norm[row]; };
  scale_rows<Traits>(s.q, s.q, from_start, [&](int row) { return scale * s.rows.q_norm[row]; });
  scale_rows<Traits>(s.k, s.k_scaled, to_end, k_factor);
  scale_rows<Traits>(s.k, s.k, from_start, k_factor);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (thread == 0) {
    constexpr int kImages = kKeyDim / kImageColumns;
    copy_out(to(args.scratch.Qh, kImages), s.q, Traits::kTile * 2);
    copy_out(to(args.scratch.Kt, kImages), s.k_scaled, Traits::kTile * 2);
    copy_out(to(args.scratch.Kh, kImages), s.k, Traits::kTile * 2);
    tma_store_arrive();
    tma_store_wait<0>();
  }
}

// ---- Launch ----

template <class Storage, class Kernel>
cudaError_t launch_prepare(Kernel kernel, const PrepareArgs& args, bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = sizeof(Storage);
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  const int64_t grid = ChunkSlots(args.in).total * args.in.value_heads;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), 128, kShared, stream>>>(maps, args);
  return cudaGetLastError();
}

template <class Tag, int kKeyDim, bool kChannelGate>
int prepare_sm90<Tag, kKeyDim, kChannelGate>::run(const PrepareArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  if constexpr (kChannelGate) {
    using Traits = PrepareChannelTraits<Tag, kKeyDim>;
    return launch_prepare<typename Traits::Storage>(prepare_channel_kernel<Traits>, args, kBf16, stream);
  } else if (args.scratch.P != nullptr) {
    using Traits = PrepareTraits<Tag, kKeyDim, true>;
    return launch_prepare<typename Traits::Storage>(prepare_kernel<Traits>, args, kBf16, stream);
  } else {
    using Traits = PrepareTraits<Tag, kKeyDim, false>;
    return launch_prepare<typename Traits::Storage>(prepare_kernel<Traits>, args, kBf16, stream);
  }
}

}  // namespace nearfield::delta
