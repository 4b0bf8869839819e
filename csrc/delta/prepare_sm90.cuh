// Everything of a chunk that does not depend on the state, for all chunks at once: gates and their cumulative
// sum, write strengths, norms, N = T - I and P. A gate per channel: prepare_channel_sm90.cuh. One warpgroup
// per (slot, value head); several CTAs share an SM and hide each other's latencies.
#pragma once

#include "delta/prepare_channel_sm90.cuh"
#include "delta/prepare_steps_sm90.cuh"

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

// ---- Gates ----

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

// ---- Kernel ----

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

// ---- Launch ----

template <class Traits, class Kernel>
cudaError_t launch_prepare(Kernel kernel, const PrepareArgs& args, bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  const int64_t grid = ChunkSlots(args.in).total * args.in.value_heads;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, stream>>>(maps, args);
  return cudaGetLastError();
}

template <class Tag, int kKeyDim, bool kChannelGate>
int prepare_sm90<Tag, kKeyDim, kChannelGate>::run(const PrepareArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  if constexpr (kChannelGate) {
    using Traits = PrepareChannelTraits<Tag, kKeyDim>;
    return launch_prepare<Traits>(prepare_channel_kernel<Traits>, args, kBf16, stream);
  } else if (args.scratch.P != nullptr) {
    using Traits = PrepareTraits<Tag, kKeyDim, true>;
    return launch_prepare<Traits>(prepare_kernel<Traits>, args, kBf16, stream);
  } else {
    using Traits = PrepareTraits<Tag, kKeyDim, false>;
    return launch_prepare<Traits>(prepare_kernel<Traits>, args, kBf16, stream);
  }
}

}  // namespace nearfield::delta
