// The serial walk of the backward, from the last chunk to the first: it carries dS, the gradient of the state
// after a chunk. As in the forward (state_pass_sm90.cuh) a warpgroup owns 64 value columns and keeps dS^T [64
// values, K] in float32 registers, and every intermediate leaves the tensor cores as left operand of the next
// product:
//   dV'^T = dS^T Kt^T + s dO^T P,  Y^T = dV'^T + dV'^T N,  dS^T <- e^{G_C} dS^T + s dO^T Qh - beta Y^T Kh
// One warp streams the tiles of the next chunks, one carries dV away, one dS and, where the gradient needs
// it, Y, and one tells the gradient, which may run beside the walk, what is in memory. With a gate per head,
// decays and norms are factors of columns of the accumulators; with one per channel, prepare has left Kh, Kt
// and s Qh.
#pragma once

#include "delta/sm90_bwd.h"
#include "delta/state_pass_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_, bool kChannelGate_>
struct ReversePassTraits {
  using Forward = StatePassTraits<Tag, kKeyDim_, kChannelGate_, false>;
  using Element = typename Forward::Element;
  static constexpr int kKeyDim = kKeyDim_, kKeyImages = Forward::kKeyImages, kKeyTile = Forward::kKeyTile;
  static constexpr bool kChannelGate = kChannelGate_, kAlwaysY = delta::kAlwaysY<Tag, kChannelGate_>;
  static constexpr int kStages = kChannelGate ? 2 : 3;
  static constexpr bool kAhead = kStages > 2;  // begins the next chunk before it is done with this one
  static constexpr int kThreads =
      256;  // the chain, and the warps that load, store dV, store dS and Y, and tell
  static constexpr int kTold = 4, kNews = 2 * kTold;  // chunks that are told at a time; that may wait for it
  using MmaToToken = typename Forward::MmaToToken;    // (64 values, 64 tokens)
  using MmaToColumn = typename Forward::template Mma<kRows, GMMA::Major::MN>;  // the same; B by column
  using MmaToState = typename Forward::MmaToState;                             // (64 values, K)

  struct alignas(1024) Stage {
    Element k[kKeyTile];                           // with a gate per channel Kh
    Element k_write[kChannelGate ? kKeyTile : 0];  // Kt
    Element q[kKeyTile];                           // with a gate per channel s Qh
    Element dout[kImage];
    Element n[kImage];  // first NP
    Element p[kImage];
  };
  static constexpr int kHeadRows = kChannelGate ? 0 : kRows;
  struct alignas(128) StageRows {  // the beginning of ChunkRows, or beta and decay
    float G[kHeadRows], beta[kRows], k_read[kHeadRows], k_write[kHeadRows], k_norm[kHeadRows],
        q_read[kHeadRows];
    float decay[kChannelGate ? kKeyDim : 0];
  };
  static_assert(kChannelGate || offsetof(StageRows, q_read) == offsetof(ChunkRows, q_read));
  static constexpr int kBytes =
      (2 + kChannelGate) * kKeyTile * 2 + kImageBytes + static_cast<int>(sizeof(StageRows));

  struct Storage {
    Stage stage[kStages];
    alignas(1024) Element y[kImage];  // Y and dV on the way out
    alignas(1024) Element dv[kImage];
    alignas(1024) Element state[kKeyTile];  // dS on the way out
    StageRows rows[kStages];
    Ring<kStages> ring;
    Ring<1> ring_state;        // dS: chain -> the thread that stores it
    Ring<1> ring_out;          // Y and dV: chain -> storing warps
    Ring<kNews> ring_news;     // a chunk in memory: the warps that store -> the thread that tells
    bool with_y;               // Y is to leave
    uint64_t packed[kStages];  // NP has come
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct ReverseMaps {
  TokenMaps tokens;
  CUtensorMap dout;
};

// What a CTA walks over: a sequence, a value head and 64 of its values.
struct ReversePlace {
  Sequence sequence;
  int64_t n, head;
  int first_value;
};

// ---- Loading warp ----

// Its first thread brings the tiles. N and P come as one image, which the whole warp takes apart: that of a
// chunk once the next one's tiles are on their way, long before the chain asks for it, or, with two stages,
// before.
template <class Traits>
__device__ void load_reverse(typename Traits::Storage& s, const ReverseMaps& maps, const ReversePassArgs& a,
                             const ReversePlace& z) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const Sequence& sequence = z.sequence;
  const int head = static_cast<int>(z.head);
  const int head_k = static_cast<int>(head / (a.in.value_heads / a.in.heads));
  const auto bring = [&](int c, const RingIndex<Traits::kStages>& at) {
    s.ring.wait_empty(at);
    s.ring.expect_bytes(at, Traits::kBytes);
    auto& stage = s.stage[at.stage];
    auto& rows = s.rows[at.stage];
    uint64_t* full = &s.ring.full[at.stage];
    const int64_t token = sequence.begin + static_cast<int64_t>(c) * kRows;
    const int64_t chunk = chunk_index(a.in, sequence.first_slot + c, head);
    const auto copy = [&](Element* to, void* scratch, int images) {
      copy_in(to, static_cast<Element*>(scratch) + chunk * images * kImage, images * kImageBytes, full);
    };
    Ring<1>::Barrier::arrive_and_expect_tx(&s.packed[at.stage], kImageBytes);
    copy_in(stage.n, static_cast<Element*>(a.scratch.NP) + chunk * kImage, kImageBytes, &s.packed[at.stage]);
    if constexpr (Traits::kChannelGate) {
      copy(stage.k_write, a.scratch.Kt, Traits::kKeyImages);
      copy(stage.q, a.scratch.Qh, Traits::kKeyImages);
      copy(stage.k, a.scratch.Kh, Traits::kKeyImages);
      copy_in(rows.beta, a.scratch.rows[chunk].beta, kRows * 4, full);
      copy_in(rows.decay, a.scratch.decay + chunk * kKeyDim, kKeyDim * 4, full);
    } else {
      load_tokens<kKeyDim>(maps.tokens.k, full, stage.k, 0, token, head_k, sequence.batch);
      load_tokens<kKeyDim>(maps.tokens.q, full, stage.q, 0, token, head_k, sequence.batch);
      copy_in(&rows, a.scratch.rows + chunk, sizeof(typename Traits::StageRows), full);
    }
    load_tokens<kImageColumns>(maps.dout, full, stage.dout, z.first_value, token, head, sequence.batch);
  };
  const int chunks = sequence.chunks();
  RingIndex<Traits::kStages> at;
  CUTE_UNROLL
  for (int i = 0; i < Traits::kStages; ++i) clear_upper_blocks(s.stage[i].p);
  const bool brings = threadIdx.x % 32 == 0;
  if (brings && chunks > 0) bring(chunks - 1, at);
  for (int c = chunks - 1; c >= 0; --c) {
    auto next = at;
    next.advance();
    if (Traits::kStages > 2 && brings && c > 0) bring(c - 1, next);
    __syncwarp();
    Ring<1>::Barrier::wait(&s.packed[at.stage], at.phase);
    compiler_fence();
    unpack_image(s.stage[at.stage].n, s.stage[at.stage].p);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (brings) s.ring.arrive_full(at);
    if (Traits::kStages == 2 && brings && c > 0) bring(c - 1, next);
    at = next;
  }
}

// ---- Storing warps ----

// Up to kLeft of this thread's bulk stores may still be on their way to memory.
template <int kLeft>
__device__ __forceinline__ void wait_for_memory() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}

// A chunk goes to the thread that tells the gradient: a fence takes as long as a chunk, and the chain may not
// wait for it.
template <class Traits>
__device__ __forceinline__ void pass_on(typename Traits::Storage& s, RingIndex<Traits::kNews>& at) {
  s.ring_news.wait_empty(at);
  s.ring_news.arrive_full(at);
  at.advance();
}

// One thread: dS and Y, whole images.
template <class Traits>
__device__ void store_ds_and_y(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  using Element = typename Traits::Element;
  const int chunks = z.sequence.chunks();
  RingIndex<1> at;
  RingIndex<Traits::kNews> at_news;
  const auto send = [&](void* to, int images, int c, const Element* from) {
    copy_out(
        static_cast<Element*>(to) + first_image(a.in, z.sequence, c, z.head, z.first_value, images) * kImage,
        from, images * kImageBytes);
  };
  const auto release = [&](Ring<1>& ring) {
    tma_store_arrive();  // maybe of nothing
    tma_store_wait<0>();
    ring.release(at);
  };
  for (int c = chunks - 1; c >= 0; --c) {
    s.ring_state.wait_full(at);
    compiler_fence();
    send(a.d_states, Traits::kKeyImages, c, s.state);
    release(s.ring_state);
    s.ring_out.wait_full(at);
    compiler_fence();
    if (Traits::kAlwaysY || s.with_y) send(a.y, 1, c, s.y);
    release(s.ring_out);
    at.advance();
    if (c == chunks - 1) continue;
    wait_for_memory<2>();  // the chunk before
    pass_on<Traits>(s, at_news);
  }
  if (chunks == 0) return;
  wait_for_memory<0>();
  pass_on<Traits>(s, at_news);
}

// One thread: tells the gradient which chunks are in memory, several at a time.
template <class Traits>
__device__ void announce(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  RingIndex<Traits::kNews> at;
  for (int c = z.sequence.chunks() - 1; c >= 0;) {
    const int end = max(c - Traits::kTold, -1);
    for (int x = c; x > end; --x) {
      s.ring_news.wait_full(at);
      s.ring_news.release(at);
      at.advance();
    }
    asm volatile("fence.proxy.async;\n\tfence.acq_rel.gpu;" ::: "memory");
    for (; c > end; --c) {
      int* flag = a.announced + first_image(a.in, z.sequence, c, z.head, z.first_value);
      asm volatile("st.relaxed.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
    }
  }
}

// One warp: dV, four rows at a time. Rows past the end belong to the next sequence.
template <class Traits>
__device__ void store_dv(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, row = lane / 8, piece = lane % 8;
  const int64_t stride = a.in.value_heads * a.in.value_dim;
  auto* dv = static_cast<Element*>(a.dv) +
             (z.sequence.batch * a.in.tokens + z.sequence.begin + row) * stride + z.head * a.in.value_dim +
             z.first_value + piece * 8;
  const bool inside = z.first_value + piece * 8 < a.in.value_dim;
  RingIndex<1> at;
  RingIndex<Traits::kNews> at_news;
  for (int c = z.sequence.chunks() - 1; c >= 0; --c) {
    const int rows = inside ? valid_rows(z.sequence, c) - row : 0;
    Element* to = dv + static_cast<int64_t>(c) * kRows * stride;
    s.ring_out.wait_full(at);
    compiler_fence();
    CUTE_UNROLL
    for (int i = 0; i < kRows; i += 16) {
      uint4 words[4];
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x)
        words[x] = *reinterpret_cast<const uint4*>(image_piece(s.dv, i + 4 * x + row, piece));
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x, to += 4 * stride)
        if (i + 4 * x < rows) *reinterpret_cast<uint4*>(to) = words[x];
    }
    __syncwarp();
    s.ring_out.release(at);
    at.advance();
    if (lane == 0) pass_on<Traits>(s, at_news);
  }
}

// ---- Chain ----

template <class Traits>
__device__ void walk_reverse(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const InputsSm90& in = a.in;
  const Sequence& sequence = z.sequence;
  const int thread = threadIdx.x % 128, warp = thread / 32;

  typename Traits::MmaToToken mma_token;
  typename Traits::MmaToColumn mma_column;
  typename Traits::MmaToState mma_state;
  const auto thread_token = mma_token.get_slice(thread);
  const auto thread_column = mma_column.get_slice(thread);
  const auto thread_state = mma_state.get_slice(thread);
  // An image as the right operand: tokens as N, or columns of P or N, or key features.
  const auto by_row = [&](Element* image) {
    return thread_token.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByRow<Element, kKeyDim>{}));
  };
  const auto by_column = [&](Element* image) {
    return thread_column.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByFeature<Element, kRows>{}));
  };
  const auto by_key = [&](Element* image) {
    return thread_state.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByFeature<Element, kKeyDim>{}));
  };
  Tensor S = partition_fragment_C(mma_state, cute::Shape<Int<64>, Int<kKeyDim>>{});  // dS^T, (values, keys)
  Tensor R = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});    // (values, tokens)
  Tensor PdO = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});
  Tensor S16 = make_tensor<Element>(accumulator_as_a(S.layout()));
  Tensor dO16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor QdO16 = make_tensor<Element>(accumulator_as_a(R.layout()));  // dO, with what Q lacks of s Qh
  Tensor X16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor Y16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor dv16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  const auto words_of = [](auto& t) { return reinterpret_cast<uint32_t*>(t.data()); };
  const auto round = [](auto& from, auto& to) {
    Tensor view = make_tensor(from.data(), to.layout());
    convert_to(view, to);
  };

  const int64_t state = (z.n * in.value_heads + z.head) * in.state_size();
  const auto state_at = [&](int value, int key) {
    return state + (in.state_v_first ? value * in.key_dim + key : key * in.value_dim + value);
  };
  clear(S);
  if (a.d_final != nullptr) {
    for_state<kKeyDim>(z.first_value, [&](int at, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) S(at) = a.d_final[state_at(value, key)];
    });
  }

  // What does not wait for dS: dO of a chunk, and s P^T dO, which is on its way afterwards.
  const auto start_chunk = [&](const RingIndex<Traits::kStages>& place) {
    auto& stage = s.stage[place.stage];
    load_transposed(stage.dout, warp, words_of(dO16));
    if constexpr (Traits::kChannelGate) {
      CUTE_UNROLL
      for (int x = 0; x < 16; ++x) words_of(QdO16)[x] = words_of(dO16)[x];
    } else {
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 q_read = columns_of(s.rows[place.stage].q_read, j);
        CUTE_UNROLL
        for (int x = 2 * j; x < 2 * j + 2; ++x) {
          const float2 dO = unpack<Element>(words_of(dO16)[x]);
          words_of(QdO16)[x] = pack<Element>(q_read.x * dO.x, q_read.y * dO.y);
        }
      }
    }
    issue_gemm<true>(mma_column, dO16, by_column(stage.p), PdO);
  };
  StateDecay<Traits> decay;

  RingIndex<Traits::kStages> at;
  RingIndex<1> at_out;
  int c = sequence.chunks() - 1;
  const Hold hold{c, -1 - static_cast<int>(in.heads)};
  if (c >= 0) {
    s.ring.wait_full(at);
    compiler_fence();
    auto& stage = s.stage[at.stage];
    const int valid = valid_rows(sequence, c);
    if (valid < kRows) {  // the last chunk only
      if constexpr (!Traits::kChannelGate) {
        clear_rows(stage.k, Traits::kKeyImages, valid);
        clear_rows(stage.q, Traits::kKeyImages, valid);
      }
      clear_rows(stage.dout, 1, valid);
    }
    start_chunk(at);
    warpgroup_wait<0>();
    decay.read(s.rows[at.stage], true);
    round(S, S16);
    decay.apply(S);
  }
  for (; c >= 0; --c) {
    auto& stage = s.stage[at.stage];
    const auto& rows = s.rows[at.stage];
    // Kt dS; behind it dS <- e^{G_C} dS + s Qh^T dO
    if constexpr (Traits::kChannelGate) {
      issue_gemm<true>(mma_token, S16, by_row(stage.k_write), R);
    } else {
      issue_gemm<true>(mma_token, S16, by_row(stage.k), R);
    }
    issue_gemm<false>(mma_state, QdO16, by_key(stage.q), S);
    float2 k_write[8];
    if constexpr (!Traits::kChannelGate) read_factors(k_write, rows.k_write);
    hold();
    warpgroup_wait<1>();

    // dV' = Kt dS + s P^T dO
    CUTE_UNROLL
    for (int x = 0; x < 32; ++x) {
      if constexpr (Traits::kChannelGate) {
        R(x) += PdO(x);
      } else {
        R(x) = (x % 2 ? k_write[x / 4].y : k_write[x / 4].x) * R(x) + PdO(x);
      }
    }
    // Y = dV' + N^T dV'. Where keys repeat, Y is a small difference: N multiplies what rounding dV' lost,
    // too.
    round(R, X16);
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x)
      words_of(Y16)[x] = pack_low<Element>(R(2 * x), R(2 * x + 1), words_of(X16)[x]);
    issue_gemm<false>(mma_column, X16, by_column(stage.n), R);
    issue_gemm<false>(mma_column, Y16, by_column(stage.n), R);
    // Meanwhile dS, the gradient of the state after this chunk, leaves.
    s.ring_state.wait_empty(at_out);
    CUTE_UNROLL
    for (int k = 0; k < Traits::kKeyImages; ++k)
      store_rows(s.state + k * kImage, warp, words_of(S16) + 16 * k);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % 32 == 0) s.ring_state.arrive_full(at_out);
    float2 beta[8], k_read[8];
    read_factors(beta, rows.beta);
    if constexpr (!Traits::kChannelGate) read_factors(k_read, rows.k_read);
    bool with_y = true;
    if constexpr (!Traits::kAlwaysY) {
      float least = fabsf(beta[0].x);
      CUTE_UNROLL
      for (int x = 1; x < 16; ++x) least = fminf(least, fabsf(x % 2 ? beta[x / 2].y : beta[x / 2].x));
      with_y = needs_y(least);
    }
    hold();
    warpgroup_wait<0>();

    // dR = dV = beta Y;  dS -= Kh^T dR
    round(R, Y16);
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 dv = {beta[x / 2].x * R(2 * x), beta[x / 2].y * R(2 * x + 1)};
      words_of(dv16)[x] = pack<Element>(dv.x, dv.y);
      if constexpr (Traits::kChannelGate) {
        words_of(X16)[x] = pack<Element>(-dv.x, -dv.y);
      } else {
        words_of(X16)[x] = pack<Element>(-k_read[x / 2].x * dv.x, -k_read[x / 2].y * dv.y);
      }
    }
    issue_gemm<false>(mma_state, X16, by_key(stage.k), S);
    hold();
    s.ring_out.wait_empty(at_out);
    if (with_y) store_transposed(s.y, warp, words_of(Y16));
    if (thread == 0) s.with_y = with_y;
    store_transposed(s.dv, warp, words_of(dv16));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % 32 == 0) s.ring_out.arrive_full(at_out);
    at_out.advance();

    // The next chunk's dO; after the last one this one's again, for nothing. Without a stage to spare this
    // one's is given back before.
    auto next = at;
    if (c > 0) next.advance();
    if constexpr (!Traits::kAhead) {
      warpgroup_wait<0>();
      if (c > 0) s.ring.release(at);
    }
    if (c > 0) s.ring.wait_full(next);
    compiler_fence();
    start_chunk(next);
    decay.read(s.rows[next.stage], c > 0);
    if constexpr (Traits::kAhead) warpgroup_wait<1>();
    round(S, S16);
    decay.apply(S);
    warpgroup_fence_operand(S);
    warpgroup_fence_operand(S16);
    hold();
    warpgroup_wait<0>();
    if constexpr (Traits::kAhead) s.ring.release(at);
    at = next;
  }

  if (a.d_initial != nullptr) {
    for_state<kKeyDim>(z.first_value, [&](int x, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) a.d_initial[state_at(value, key)] = S(x);
    });
  }
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    reverse_pass_kernel(const __grid_constant__ ReverseMaps maps, const __grid_constant__ ReversePassArgs a,
                        int value_tiles) {
  auto& s = shared_storage<typename Traits::Storage>();
  ReversePlace z;
  const int row = blockIdx.x / value_tiles;
  z.first_value = blockIdx.x % value_tiles * kImageColumns;
  z.head = row % a.in.value_heads, z.n = row / a.in.value_heads;
  z.sequence = sequence_of(a.in, z.n);
  if (threadIdx.x == 0) {
    s.ring.init(2, 4);  // its bytes; the warp that takes NP apart
    for (auto& barrier : s.packed) Ring<1>::Barrier::init(&barrier, 1);
    s.ring_state.init(4, 1);
    s.ring_out.init(4, 2);
    s.ring_news.init(2, 1);
    cutlass::arch::fence_barrier_init();
    let_kernel_after_begin();  // this CTA has its place on an SM
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const bool one_thread = threadIdx.x % 32 == 0;
  if (warp < 4) walk_reverse<Traits>(s, a, z);
  if (warp == 4) load_reverse<Traits>(s, maps, a, z);
  if (warp == 5) store_dv<Traits>(s, a, z);
  if (warp == 6 && one_thread) store_ds_and_y<Traits>(s, a, z);
  if (warp == 7 && one_thread) announce<Traits>(s, a, z);
}

template <class Tag, int kKeyDim, bool kChannelGate>
int reverse_pass_sm90<Tag, kKeyDim, kChannelGate>::run(const ReversePassArgs& args, void* stream) {
  using Traits = ReversePassTraits<Tag, kKeyDim, kChannelGate>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = reverse_pass_kernel<Traits>;
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  const InputsSm90& in = args.in;
  ReverseMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps.tokens, in, kBf16)) return e;
  if (const cudaError_t e =
          encode_tokens(&maps.dout, args.d_o, kBf16, in.value_dim, in.tokens, in.value_heads, in.batch))
    return e;
  const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
  const int64_t grid = in.sequences * in.value_heads * tiles;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(
      maps, args, static_cast<int>(tiles));
  return cudaGetLastError();
}

}  // namespace nearfield::delta
