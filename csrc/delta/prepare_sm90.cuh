// Everything of a chunk that does not depend on the state, for all chunks: gates and their cumulative sum,
// write strengths, norms, N = T - I and P. A gate per channel: prepare_channel_sm90.cuh. One CTA stays on
// each SM, or on a few of them beside the state pass, which then finds the chunks in the order in which it
// needs them. A warpgroup takes a chunk; several hide each other's latencies, and while it works on one, its
// next is loaded.
#pragma once

#include "delta/prepare_channel_sm90.cuh"
#include "delta/prepare_steps_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

// kPack: beside N and P the image of both for the backward.
template <class Tag, int kKeyDim_, bool kWithP_, bool kPack_ = false>
struct PrepareTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kWithP = kWithP_, kPack = kPack_;
  static_assert(kWithP || !kPack);
  static constexpr int kTile = kKeyDim * kRows;   // elements
  static constexpr int kGroups = kWithP ? 3 : 4;  // warpgroups
  static constexpr int kThreads = kGroups * 128;
  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kRows>, Int<kRows>, Int<kKeyDim>>>()));

  struct Group {
    alignas(1024) Element k[kTile];
    alignas(1024) Element q[kWithP ? kTile : 0];
    alignas(1024) Element n[kImage];
    alignas(1024) Element p[kImage];  // without P for low halves only
    static constexpr bool kPack = kPack_;
    alignas(1024) Element np[kPack ? kImage : 0];
    SplitBlocks a;
    alignas(128) ChunkRows rows[2];  // of this chunk, and of the one that leaves
    TriangularScratch triangular;
    float squares[4];
    uint64_t arrived;
  };
  struct Storage {
    Group group[kGroups];
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// ---- Gates ----

// One warp: gates of two tokens per lane, and their cumulative sum over the chunk. Tokens past the end have
// gate 0.
__device__ __forceinline__ float2 load_gates(const ForwardInputsSm90& in, const ChunkPlace& place) {
  const int row = 2 * (threadIdx.x % 32);
  return {in.gated && row < place.valid ? in.g[place.token_head(in, row)] : 0.f,
          in.gated && row + 1 < place.valid ? in.g[place.token_head(in, row + 1)] : 0.f};
}
__device__ __forceinline__ void sum_gates(const InputsSm90& in, ChunkRows& rows, const ChunkPlace& place,
                                          float2 raw) {
  const int lane = threadIdx.x % 32;
  float g[2] = {raw.x, raw.y};
  if (in.gated) {
    const float rate = in.A_log != nullptr ? expf(in.A_log[place.head]) : 1.f;
    const float bias = in.dt_bias != nullptr ? in.dt_bias[place.head] : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) g[i] = 2 * lane + i < place.valid ? log2_decay(in, g[i] + bias, rate) : 0.f;
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

// Where the results of prepare_chunk go: to memory. Called by the thread that sends them, unless said.
struct ToMemory {
  static constexpr bool kFetchLate = false;
  const PrepareArgs& args;
  int64_t sent = -1;  // index of the last chunk, whose results are on their way
  bool sent_hard = false;

  // What was sent of the chunk before has been read from shared memory.
  __device__ __forceinline__ void wait_read() const { tma_store_wait<0>(); }
  __device__ __forceinline__ void wait_taken(uint32_t) const {}  // all threads, before N and P are written
  // Beside the state pass: that of the chunk before all is in memory.
  __device__ __forceinline__ void tell() const {
    if (args.ready != nullptr && sent >= 0) announce(args, static_cast<uint32_t>(sent), sent_hard);
  }
  template <class Group>
  __device__ __forceinline__ void send(Group& s, uint32_t turn, const ChunkPlace& place, bool hard) {
    const ChunkScratch& to = args.scratch;
    copy_out(to.rows + place.index, &s.rows[turn % 2], sizeof(ChunkRows));
    const auto image = [&](void* images) { return static_cast<char*>(images) + place.index * kImageBytes; };
    copy_out(image(to.N), s.n, kImageBytes);
    if (to.P != nullptr) copy_out(image(to.P), s.p, kImageBytes);
    if constexpr (Group::kPack) copy_out(image(to.NP), s.np, kImageBytes);
    if (to.hard != nullptr) to.hard[place.index] = hard ? 1.f : 0.f;
    tma_store_arrive();
    sent = place.index, sent_hard = hard;
  }
};

// What a warpgroup fetches of a chunk before its turn comes. The first thread asks for the tiles.
struct Fetched {
  ChunkPlace place;
  float2 rows;  // gates in warp 1, write strengths in warp 2

  template <class Traits>
  __device__ __forceinline__ void fetch(typename Traits::Group& s, const TokenMaps& maps,
                                        const ForwardInputsSm90& in) {
    constexpr int kKeyDim = Traits::kKeyDim;
    const int thread = threadIdx.x % 128;
    if (thread == 0) {
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
          &s.arrived, (Traits::kWithP ? 2 : 1) * Traits::kTile * 2);
      load_tokens<kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
      if constexpr (Traits::kWithP)
        load_tokens<kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
    }
    if (thread / 32 == 1) rows = load_gates(in, place);
    if (thread / 32 == 2) rows = load_betas(in, place);
  }
};

// By a warpgroup with a barrier of its own; `turn` counts its chunks. Once K and Q are read it calls
// fetch_next(); where the L2 cache is short, later, so that the walk finds them there. The first thread of
// the last warp, which has the least to do, sends the results away.
template <class Traits, class To, class FetchNext>
__device__ __forceinline__ void prepare_chunk(typename Traits::Group& s, const ForwardInputsSm90& in,
                                              const ChunkScratch& scratch, const Fetched& fetched,
                                              uint32_t turn, uint32_t barrier, To& to,
                                              const FetchNext& fetch_next) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const ChunkPlace place = fetched.place;
  const int valid = place.valid;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const bool sends = thread == 96;
  auto& rows = s.rows[turn % 2];
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(128, barrier); };

  if (warp == 1) sum_gates(in, rows, place, fetched.rows);
  if (warp == 2) put_betas(in, rows.beta, place, fetched.rows);
  if (sends) to.wait_read();
  sync();
  cutlass::arch::ClusterTransactionBarrier::wait(&s.arrived, turn % 2);
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
    const float G = rows.G[row], k_norm = inside ? k_inverse : 0.f;
    const float q_norm = inside ? q_inverse * static_cast<float>(in.scale) : 0.f;
    rows.k_norm[row] = k_norm;
    rows.q_norm[row] = inside ? q_inverse : 0.f;
    rows.k_read[row] = k_norm * exp2_fast(G);
    rows.q_read[row] = q_norm * exp2_fast(G);
    rows.k_write[row] = k_norm * exp2_fast(rows.G[kRows - 1] - G);
  }
  warpgroup_wait<0>();
  sync();  // K and Q are free, the rows complete
  if constexpr (!To::kFetchLate) fetch_next();

  // A = beta_i k_i . k_j e^{G_i - G_j} below the diagonal, P = scale q_i . k_j e^{G_i - G_j} with it.
  // Selected, not multiplied by 0: rows past the end may hold anything.
  const bool with_low = scratch.N_low != nullptr;
  uint32_t p_words[16], p_low[16];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int i = 16 * warp + 8 * h + lane / 4;
    const float G_i = rows.G[i], a_row = rows.beta[i] * rows.k_norm[i];
    const float p_row = rows.q_norm[i] * static_cast<float>(in.scale);
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int j = 8 * n + 2 * quad;
      const float2 G_j = *reinterpret_cast<const float2*>(&rows.G[j]);
      const float2 k_j = *reinterpret_cast<const float2*>(&rows.k_norm[j]);
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
  to.wait_taken(turn);
  if constexpr (To::kFetchLate) fetch_next();
  if constexpr (Traits::kWithP) store_rows(s.p, warp, p_words);
  if constexpr (Traits::kPack) {
    store_upper(s.np, warp, p_words);
    put_squares(s.squares, invert<Second::kBelow, /*kLeave=*/false>(s.a, s.triangular, s.n, s.np, barrier));
  } else {
    put_squares(s.squares, invert<Second::kNothing, /*kLeave=*/false>(s.a, s.triangular, s.n, s.n, barrier));
  }
  cutlass::arch::fence_view_async_shared();
  if (sends) to.tell();
  sync();
  const bool hard = with_low && is_hard(s.squares, valid);
  if (hard) {  // the low halves go first, by way of P's place
    const auto send_low = [&](void* images) {
      cutlass::arch::fence_view_async_shared();
      sync();
      if (sends) {
        copy_out(static_cast<Element*>(images) + place.index * kImage, s.p, kImageBytes);
        tma_store_arrive();
        tma_store_wait<0>();
      }
      sync();
    };
    invert<Second::kLost, /*kLeave=*/false>(s.a, s.triangular, s.n, s.p, barrier);
    send_low(scratch.N_low);
    if constexpr (Traits::kWithP) {
      store_rows(s.p, warp, p_low);
      send_low(scratch.P_low);
      store_rows(s.p, warp, p_words);
      cutlass::arch::fence_view_async_shared();
      sync();
    }
  }
  if (sends) to.send(s, turn, place, hard);
}

// ---- Kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    prepare_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ PrepareArgs args) {
  // The state pass may take its SMs, if it runs beside, once all of these CTAs have theirs.
  let_kernel_after_begin();
  const int group = threadIdx.x / 128;
  auto& s = shared_storage<typename Traits::Storage>().group[group];
  const uint32_t barrier = 1 + group;
  if (threadIdx.x % 128 == 0) {
    cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
    cutlass::arch::fence_barrier_init();
  }
  const auto heads = static_cast<uint32_t>(args.in.value_heads),
             all = static_cast<uint32_t>(args.slots) * heads, step = gridDim.x * Traits::kGroups;
  const auto find = [&](ChunkPlace& place, uint32_t& at) {  // the first from `at` on; false: none
    if (args.ready != nullptr) return place.find_for_walks(args.in, at);
    for (; at < all; at += step)
      if (place.find(args.in, at / heads, at % heads)) return true;
    return false;
  };
  uint32_t at = blockIdx.x * Traits::kGroups + group;
  Fetched here, next;
  bool more = find(here.place, at);
  if (more) here.template fetch<Traits>(s, maps, args.in);
  ToMemory to{args};
  for (uint32_t turn = 0; more; ++turn) {
    prepare_chunk<Traits>(s, args.in, args.scratch, here, turn, barrier, to, [&] {
      at += step;
      more = find(next.place, at);
      if (more) next.template fetch<Traits>(s, maps, args.in);
    });
    here = next;
  }
  if (threadIdx.x % 128 == 96) {
    to.tell();
    to.wait_read();
  }
}

// ---- Launch ----

template <class Storage, class Maps>
cudaError_t launch_prepare(void (*kernel)(Maps, PrepareArgs), dim3 grid, int threads, const PrepareArgs& args,
                           bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = sizeof(Storage);
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  Maps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  if constexpr (std::is_same_v<Maps, ChannelMaps>)
    if (const cudaError_t e = encode_gates(&maps.g, args.in)) return e;
  if (args.slots * args.in.value_heads > std::numeric_limits<int>::max())
    return cudaErrorInvalidConfiguration;
  kernel<<<grid, threads, kShared, stream>>>(maps, args);
  return cudaGetLastError();
}

template <class Tag, int kKeyDim, bool kChannelGate>
int prepare_sm90<Tag, kKeyDim, kChannelGate>::run(const PrepareArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  const int64_t chunks = args.slots * args.in.value_heads;
  if constexpr (kChannelGate) {
    using Traits = PrepareChannelTraits<Tag, kKeyDim>;
    if (args.ready != nullptr)
      return launch_prepare<typename Traits::Pair>(prepare_channel_beside_kernel<Traits>, args.ctas,
                                                   2 * Traits::kChunkThreads, args, kBf16, stream);
    const InputsSm90& in = args.in;
    const int64_t of_sequence = args.slots / in.sequences;
    constexpr int64_t kMost = 65535;  // of two dimensions of a grid
    const bool divided =
        in.cu_seqlens != nullptr || in.sequences > kMost || of_sequence > kMost || of_sequence == 1;
    const dim3 grid = divided ? dim3(static_cast<unsigned>(chunks))
                              : dim3(static_cast<unsigned>(in.value_heads),
                                     static_cast<unsigned>(in.sequences), static_cast<unsigned>(of_sequence));
    return launch_prepare<typename Traits::Storage>(prepare_channel_kernel<Traits>, grid,
                                                    Traits::kChunkThreads, args, kBf16, stream);
  } else {
    const auto launch = [&](auto traits) {
      using Traits = decltype(traits);
      const auto ctas = static_cast<unsigned>(
          std::min<int64_t>(args.ctas, (chunks + Traits::kGroups - 1) / Traits::kGroups));
      return launch_prepare<typename Traits::Storage>(prepare_kernel<Traits>, ctas, Traits::kThreads, args,
                                                      kBf16, stream);
    };
    if constexpr (kKeyDim == 128) {
      if (args.scratch.NP != nullptr) return launch(PrepareTraits<Tag, kKeyDim, true, true>{});
    }
    return args.scratch.P != nullptr ? launch(PrepareTraits<Tag, kKeyDim, true>{})
                                     : launch(PrepareTraits<Tag, kKeyDim, false>{});
  }
}

}  // namespace nearfield::delta
