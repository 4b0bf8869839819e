// Everything of a chunk that does not depend on the state, for all chunks at once: gates and their cumulative
// sum, write strengths, norms, N = T - I and P. A gate per channel: prepare_channel_sm90.cuh. One warpgroup
// per (slot, value head); several share an SM and hide each other's latencies. They are either CTAs of their
// own, or stay on a few SMs and take chunks in the order in which the state pass on the others needs them.
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
    float squares[4];
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

// ---- A chunk ----

// A chunk whose results are on their way to memory, known to the thread that sent them.
struct Announcement {
  int* flag = nullptr;
  int value = 0;
  // In memory, not only read from shared memory.
  __device__ __forceinline__ void make() {
    if (flag == nullptr) return;
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    __threadfence();
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
    flag = nullptr;
  }
};

// By a warpgroup with a barrier of its own. `turn` counts its chunks. The last chunk is announced under this
// one's loads.
template <class Traits>
__device__ __forceinline__ void prepare_chunk(typename Traits::Storage& s, const TokenMaps& maps,
                                              const PrepareArgs& args, const ChunkPlace& place, uint32_t turn,
                                              uint32_t barrier, Announcement& last) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim;
  const InputsSm90& in = args.in;
  const int valid = place.valid;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(128, barrier); };

  if (thread == 0) {
    Barrier::arrive_and_expect_tx(&s.arrived, (Traits::kWithP ? 2 : 1) * Traits::kTile * 2);
    load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
    if constexpr (Traits::kWithP)
      load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
    last.make();
  }
  if (warp == 1) sum_gates(in, s.rows, place);
  if (warp == 2) load_betas(in, s.rows, place);
  sync();
  Barrier::wait(&s.arrived, turn % 2);
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
  sync();  // K and Q are free, the rows complete

  // A = beta_i k_i . k_j e^{G_i - G_j} below the diagonal, P = scale q_i . k_j e^{G_i - G_j} with it.
  // Selected, not multiplied by 0: rows past the end may hold anything.
  const bool with_low = args.scratch.hard != nullptr;
  uint32_t p_words[16], p_low[16];
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
      if constexpr (Traits::kWithP) {
        p_words[2 * n + h] = pack<Element>(p[0], p[1]);
        p_low[2 * n + h] = with_low ? pack_low<Element>(p[0], p[1], p_words[2 * n + h]) : 0;
      }
      put_pair(s.a, s.triangular, i, n, a[0], a[1]);
    }
  }
  const auto to = [&](void* scratch) { return static_cast<Element*>(scratch) + place.index * kImage; };
  if constexpr (Traits::kWithP) store_rows(s.p, warp, p_words);
  put_squares(s.squares, invert<false>(s.a, s.triangular, s.n, s.n, barrier));
  cutlass::arch::fence_view_async_shared();
  sync();
  const bool hard = with_low && is_hard(s.squares, valid);
  if (thread == 0) {
    copy_out(args.scratch.rows + place.index, &s.rows, sizeof(ChunkRows));
    copy_out(to(args.scratch.N), s.n, kImageBytes);
    if constexpr (Traits::kWithP) copy_out(to(args.scratch.P), s.p, kImageBytes);
    if (with_low) args.scratch.hard[place.index] = hard ? 1.f : 0.f;
    tma_store_arrive();
    tma_store_wait<0>();
  }
  // Whether hard or not, nobody writes to shared memory before the results have been read.
  sync();
  if (hard) {
    invert<true>(s.a, s.triangular, s.n, s.p, barrier);
    sync();
    auto* low = reinterpret_cast<Element*>(s.a[0]);
    if constexpr (Traits::kWithP) store_rows(low, warp, p_low);
    cutlass::arch::fence_view_async_shared();
    sync();
    if (thread == 0) {
      copy_out(to(args.scratch.N_low), s.p, kImageBytes);
      if constexpr (Traits::kWithP) copy_out(to(args.scratch.P_low), low, kImageBytes);
      tma_store_arrive();
      tma_store_wait<0>();
    }
    sync();
  }
  if (args.ready != nullptr && thread == 0)
    last = {args.ready + place.head * args.slots + place.slot, hard ? kReadyHard : kReady};
}

// ---- Kernels ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 4)
    prepare_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  auto& s = shared_storage<typename Traits::Storage>();
  ChunkPlace place;
  if (!place.find(args.in, blockIdx.x / args.in.value_heads, blockIdx.x % args.in.value_heads)) return;
  if (threadIdx.x == 0) {
    cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  Announcement none;
  prepare_chunk<Traits>(s, maps, args, place, 0, 1, none);
}

// One CTA on each of a few SMs. Chunk after chunk, of all sequences and heads, and says what is done. Not for
// packed sequences, where slots have no such order.
constexpr int kAheadGroups = 4;

template <class Traits>
__global__ void __launch_bounds__(kAheadGroups* Traits::kThreads, 1)
    prepare_ahead_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  // The state pass may take its SMs once all of these CTAs have theirs.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int group = threadIdx.x / 128;
  auto& s = (&shared_storage<typename Traits::Storage>())[group];
  const uint32_t barrier = 1 + group;
  if (threadIdx.x % 128 == 0) {
    cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  const auto heads = static_cast<uint32_t>(args.in.value_heads),
             rows = static_cast<uint32_t>(args.in.sequences) * heads;
  const auto chunks = static_cast<uint32_t>(args.slots / args.in.sequences);
  Announcement last;
  uint32_t turn = 0;
  for (uint32_t at = blockIdx.x * kAheadGroups + group; at < chunks * rows; at += gridDim.x * kAheadGroups) {
    const uint32_t chunk = at / rows, row = at % rows;
    ChunkPlace place;
    if (place.find(args.in, static_cast<int64_t>(row / heads) * chunks + chunk, row % heads))
      prepare_chunk<Traits>(s, maps, args, place, turn++, barrier, last);
  }
  if (threadIdx.x % 128 == 0) last.make();
}

// ---- Launch ----

template <class Traits, int kGroups = 1, class Kernel>
cudaError_t launch_prepare(Kernel kernel, const PrepareArgs& args, bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = kGroups * sizeof(typename Traits::Storage);
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  const int64_t chunks = ChunkSlots(args.in).total * args.in.value_heads;
  if (chunks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(args.ready == nullptr ? chunks : args.ctas);
  kernel<<<grid, kGroups * Traits::kThreads, kShared, stream>>>(maps, args);
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
    if (args.ready != nullptr)
      return launch_prepare<Traits, kAheadGroups>(prepare_ahead_kernel<Traits>, args, kBf16, stream);
    return launch_prepare<Traits>(prepare_kernel<Traits>, args, kBf16, stream);
  } else {
    using Traits = PrepareTraits<Tag, kKeyDim, false>;
    return launch_prepare<Traits>(prepare_kernel<Traits>, args, kBf16, stream);
  }
}

}  // namespace nearfield::delta
