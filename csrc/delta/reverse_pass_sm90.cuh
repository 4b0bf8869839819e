// The serial walk of the backward, from the last chunk to the first: it carries dS, the gradient of the state
// after a chunk. As in the forward (state_pass_sm90.cuh) a warpgroup owns 64 value columns and keeps dS^T [64
// values, K] in float32 registers, and every intermediate leaves the tensor cores as left operand of the next
// product:
//   dV'^T = dS^T Kt^T + s dO^T P,  Y^T = dV'^T + dV'^T N,  dS^T <- e^{G_C} dS^T + s dO^T Qh - beta Y^T Kh
// A CTA has two such chains, which share the tiles of keys and queries, P and N: one SM instead of two, and
// the others are free for the gradient of the chunks that the walk has passed. One warp streams the tiles of
// the next chunk, one carries dV away, one Y, and one tells the gradient what is there. With a gate per head,
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
  static constexpr bool kChannelGate = kChannelGate_;
  static constexpr int kStages = 2, kNews = 4;
  using MmaToToken = typename Forward::MmaToToken;                             // (64 values, 64 tokens)
  using MmaToColumn = typename Forward::template Mma<kRows, GMMA::Major::MN>;  // the same; B by column
  using MmaToState = typename Forward::MmaToState;                             // (64 values, K)

  // Two warpgroups of chains, and one of which warp 0 loads, 1 stores dV, 2 stores Y, 3 tells the gradient.
  static constexpr int kChains = 2, kHelpers = 128 * kChains, kThreads = kHelpers + 128;
  static constexpr int kChainRegisters = 232, kHelperRegisters = 40;  // each starts with 168
  static_assert(kChains * kChainRegisters + kHelperRegisters <= 3 * 168);

  // What a chain has done with after dV', and what it needs to the end of the chunk.
  struct alignas(1024) Early {
    Element k_write[kChannelGate ? kKeyTile : 0];  // Kt
    Element q[kKeyTile];                           // with a gate per channel s Qh
    Element dout[kChains * kImage];
    Element p[kImage];
  };
  struct alignas(1024) Late {
    Element k[kKeyTile];  // with a gate per channel Kh
    Element n[kImage];
  };
  static constexpr int kHeadRows = kChannelGate ? 0 : kRows;
  struct alignas(128) StageRows {  // the beginning of ChunkRows, or beta and decay
    float G[kHeadRows], beta[kRows], k_read[kHeadRows], k_write[kHeadRows], k_norm[kHeadRows],
        q_read[kHeadRows];
    float decay[kChannelGate ? kKeyDim : 0];
  };
  static_assert(kChannelGate || offsetof(StageRows, q_read) == offsetof(ChunkRows, q_read));
  static constexpr int kEarlyBytes = (1 + kChannelGate) * kKeyTile * 2 + kImageBytes;  // and dO
  static constexpr int kLateBytes = kKeyTile * 2 + kImageBytes + static_cast<int>(sizeof(StageRows));

  struct Out {                              // of a chain, on the way out
    alignas(1024) Element state[kKeyTile];  // dS
    alignas(1024) Element y[kImage];
    alignas(1024) Element dv[kImage];
  };
  struct Storage {
    Early early[kStages];
    Late late[kStages];
    Out out[kChains];
    StageRows rows[kStages];
    Ring<kStages> ring_early, ring_late;
    Ring<1> ring_out[kChains];  // chain -> storing warps
    Ring<kNews> ring_news;      // a chunk in memory: the thread that stores Y -> the one that tells
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct ReverseMaps {
  TokenMaps tokens;
  CUtensorMap dout;
};

// What a CTA walks over: a sequence, a value head and up to two tiles of its values.
struct ReversePlace {
  Sequence sequence;
  int64_t n, head;
  int first_value, chains;
};

// ---- Loading warp: one thread ----

template <class Traits>
__device__ void load_reverse(typename Traits::Storage& s, const ReverseMaps& maps, const ReversePassArgs& a,
                             const ReversePlace& z) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const Sequence& sequence = z.sequence;
  const int head = static_cast<int>(z.head);
  const int head_k = static_cast<int>(head / (a.in.value_heads / a.in.heads));
  RingIndex<Traits::kStages> at;
  for (int c = sequence.chunks() - 1; c >= 0; --c) {
    const int64_t token = sequence.begin + static_cast<int64_t>(c) * kRows;
    const int64_t chunk = (sequence.first_slot + c) * a.in.value_heads + head;
    const auto copy = [&](Element* to, void* scratch, int images, uint64_t* full) {
      copy_in(to, static_cast<Element*>(scratch) + chunk * images * kImage, images * kImageBytes, full);
    };
    s.ring_early.wait_empty(at);
    s.ring_early.expect_bytes(at, Traits::kEarlyBytes + z.chains * kImageBytes);
    auto& early = s.early[at.stage];
    uint64_t* full = &s.ring_early.full[at.stage];
    if constexpr (Traits::kChannelGate) {
      copy(early.k_write, a.scratch.Kt, Traits::kKeyImages, full);
      copy(early.q, a.scratch.Qh, Traits::kKeyImages, full);
    } else {
      load_tokens<kKeyDim>(maps.tokens.q, full, early.q, 0, token, head_k, sequence.batch);
    }
    for (int v = 0; v < z.chains; ++v)
      load_tokens<kImageColumns>(maps.dout, full, early.dout + v * kImage, z.first_value + v * kImageColumns,
                                 token, head, sequence.batch);
    copy(early.p, a.scratch.P, 1, full);

    s.ring_late.wait_empty(at);
    s.ring_late.expect_bytes(at, Traits::kLateBytes);
    auto& late = s.late[at.stage];
    auto& rows = s.rows[at.stage];
    full = &s.ring_late.full[at.stage];
    if constexpr (Traits::kChannelGate) {
      copy(late.k, a.scratch.Kh, Traits::kKeyImages, full);
      copy_in(rows.beta, a.scratch.rows[chunk].beta, kRows * 4, full);
      copy_in(rows.decay, a.scratch.decay + chunk * kKeyDim, kKeyDim * 4, full);
    } else {
      load_tokens<kKeyDim>(maps.tokens.k, full, late.k, 0, token, head_k, sequence.batch);
      copy_in(&rows, a.scratch.rows + chunk, sizeof(typename Traits::StageRows), full);
    }
    copy(late.n, a.scratch.N, 1, full);
    at.advance();
  }
}

// ---- Storing warps ----

// Up to kLeft of this thread's bulk stores may still be on their way to memory.
template <int kLeft>
__device__ __forceinline__ void wait_for_memory() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}

// One thread: Y, whole images. Once Y of a chunk and dS, of which the chains say so, are in memory, it goes
// to the thread that tells the gradient: telling takes as long as a chunk, and no chain may wait for it.
template <class Traits>
__device__ void store_y(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  using Element = typename Traits::Element;
  const int chunks = z.sequence.chunks();
  RingIndex<1> at;
  RingIndex<Traits::kNews> at_news;
  for (int c = chunks - 1; c >= -1; --c) {
    for (int v = 0; v < z.chains; ++v) s.ring_out[v].wait_full(at);
    compiler_fence();
    if (c >= 0) {
      const int64_t image = first_image(a.in, z.sequence, c, z.head, z.first_value);
      for (int v = 0; v < z.chains; ++v)
        copy_out(static_cast<Element*>(a.y) + (image + v) * kImage, s.out[v].y, kImageBytes);
      tma_store_arrive();
      tma_store_wait<0>();
      for (int v = 0; v < z.chains; ++v) s.ring_out[v].release(at);
      at.advance();
    }
    if (c == chunks - 1) continue;
    c >= 0 ? wait_for_memory<1>() : wait_for_memory<0>();  // Y of the chunk before
    s.ring_news.wait_empty(at_news);
    s.ring_news.arrive_full(at_news);
    at_news.advance();
  }
}

// One thread: tells the gradient which chunks are in memory.
template <class Traits>
__device__ void announce(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  RingIndex<Traits::kNews> at;
  for (int c = z.sequence.chunks() - 1; c >= 0; --c) {
    s.ring_news.wait_full(at);
    s.ring_news.release(at);
    at.advance();
    asm volatile("fence.proxy.async;" ::: "memory");
    const int64_t image = first_image(a.in, z.sequence, c, z.head, z.first_value);
    for (int v = 0; v < z.chains; ++v)
      asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(a.announced + image + v) : "memory");
  }
}

// One warp: dV. Rows past the end belong to the next sequence.
template <class Traits>
__device__ void store_dv(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, piece = lane % 8;
  const int64_t stride = a.in.value_heads * a.in.value_dim;
  auto* dv = static_cast<Element*>(a.dv) + (z.sequence.batch * a.in.tokens + z.sequence.begin) * stride +
             z.head * a.in.value_dim + z.first_value + piece * 8;
  RingIndex<1> at;
  for (int c = z.sequence.chunks() - 1; c >= 0; --c) {
    const int valid = valid_rows(z.sequence, c);
    for (int v = 0; v < z.chains; ++v) {
      Element* out = dv + static_cast<int64_t>(c) * kRows * stride + v * kImageColumns;
      const bool inside = piece * 8 + v * kImageColumns < a.in.value_dim - z.first_value;
      s.ring_out[v].wait_full(at);
      compiler_fence();
      CUTE_UNROLL
      for (int i = 0; i < kRows / 4; i += 4) {
        uint4 words[4];
        CUTE_UNROLL
        for (int x = 0; x < 4; ++x)
          words[x] = *reinterpret_cast<const uint4*>(image_piece(s.out[v].dv, 4 * (i + x) + lane / 8, piece));
        CUTE_UNROLL
        for (int x = 0; x < 4; ++x) {
          const int token = 4 * (i + x) + lane / 8;
          if (token < valid && inside) *reinterpret_cast<uint4*>(out + token * stride) = words[x];
        }
      }
      __syncwarp();
      s.ring_out[v].release(at);
    }
    at.advance();
  }
}

// ---- Chain: a warpgroup ----

template <class Traits>
__device__ void walk_reverse(typename Traits::Storage& s, const ReversePassArgs& a, const ReversePlace& z,
                             int v) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const InputsSm90& in = a.in;
  const Sequence& sequence = z.sequence;
  const int first_value = z.first_value + v * kImageColumns;
  auto& out = s.out[v];
  auto& ring_out = s.ring_out[v];
  const int thread = threadIdx.x % 128, warp = thread / 32, quad = thread % 4;

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
  Tensor S16 = make_tensor<Element>(accumulator_as_a(S.layout()));
  Tensor dO16 = make_tensor<Element>(accumulator_as_a(R.layout()));
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
    for_state<kKeyDim>(first_value, [&](int at, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) S(at) = a.d_final[state_at(value, key)];
    });
  }

  RingIndex<Traits::kStages> at;
  RingIndex<1> at_out;
  for (int c = sequence.chunks() - 1; c >= 0; --c) {
    auto& early = s.early[at.stage];
    auto& late = s.late[at.stage];
    Element* dout = early.dout + v * kImage;
    const auto& rows = s.rows[at.stage];
    const int valid = valid_rows(sequence, c);
    const auto columns_of = [&](const float* row, int j) {
      return *reinterpret_cast<const float2*>(row + 8 * j + 2 * quad);
    };
    const auto scale_columns = [&](const float* row) {
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 factor = columns_of(row, j);
        CUTE_UNROLL
        for (int x = 4 * j; x < 4 * j + 4; ++x) R(x) *= x % 2 ? factor.y : factor.x;
      }
    };
    // Kt dS
    round(S, S16);
    s.ring_late.wait_full(at);
    s.ring_early.wait_full(at);
    compiler_fence();
    if (valid < kRows) {  // each chain for itself, both write zeros
      if constexpr (!Traits::kChannelGate) {
        clear_rows(late.k, Traits::kKeyImages, valid, 2 + v);
        clear_rows(early.q, Traits::kKeyImages, valid, 2 + v);
      }
      clear_rows(dout, 1, valid, 2 + v);
    }
    if constexpr (Traits::kChannelGate) {
      issue_gemm<true>(mma_token, S16, by_row(early.k_write), R);
    } else {
      issue_gemm<true>(mma_token, S16, by_row(late.k), R);
    }

    // Meanwhile dS, the gradient of the state after this chunk, leaves.
    tma_store_wait<0>();
    __syncwarp();
    CUTE_UNROLL
    for (int k = 0; k < Traits::kKeyImages; ++k)
      store_rows(out.state + k * kImage, warp, words_of(S16) + 16 * k);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % 32 == 0) {
      const int64_t image = first_image(in, sequence, c, z.head, first_value, Traits::kKeyImages);
      constexpr int kWarpRows = 16 * kImageColumns;
      CUTE_UNROLL
      for (int k = 0; k < Traits::kKeyImages; ++k) {
        copy_out(static_cast<Element*>(a.d_states) + (image + k) * kImage + warp * kWarpRows,
                 out.state + k * kImage + warp * kWarpRows, kWarpRows * 2);
      }
      tma_store_arrive();
    }

    // dS <- e^{G_C} dS + s Qh^T dO, behind it
    load_transposed(dout, warp, words_of(dO16));
    if constexpr (Traits::kChannelGate) {
      CUTE_UNROLL
      for (int j = 0; j < kKeyDim / 8; ++j) {
        const float2 decay = columns_of(rows.decay, j);
        CUTE_UNROLL
        for (int x = 4 * j; x < 4 * j + 4; ++x) S(x) *= x % 2 ? decay.y : decay.x;
      }
      issue_gemm<false>(mma_state, dO16, by_key(early.q), S);
    } else {
      const float decay = exp2_fast(rows.G[kRows - 1]);
      CUTE_UNROLL
      for (int x = 0; x < size(S); ++x) S(x) *= decay;
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 q_read = columns_of(rows.q_read, j);
        CUTE_UNROLL
        for (int x = 2 * j; x < 2 * j + 2; ++x) {
          const float2 dO = unpack<Element>(words_of(dO16)[x]);
          words_of(X16)[x] = pack<Element>(q_read.x * dO.x, q_read.y * dO.y);
        }
      }
      issue_gemm<false>(mma_state, X16, by_key(early.q), S);
    }
    warpgroup_wait<1>();

    // dV' = Kt dS + s P^T dO
    if constexpr (!Traits::kChannelGate) scale_columns(rows.k_write);
    issue_gemm<false>(mma_column, dO16, by_column(early.p), R);
    warpgroup_wait<0>();
    s.ring_early.release(at);

    // Y = dV' + N^T dV'. Where keys repeat, Y is a small difference: N multiplies what rounding dV' lost,
    // too.
    round(R, X16);
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 high = unpack<Element>(words_of(X16)[x]);
      words_of(Y16)[x] = pack<Element>(R(2 * x) - high.x, R(2 * x + 1) - high.y);
    }
    issue_gemm<false>(mma_column, X16, by_column(late.n), R);
    issue_gemm<false>(mma_column, Y16, by_column(late.n), R);
    warpgroup_wait<0>();
    round(R, Y16);

    // dR = dV = beta Y;  dS -= Kh^T dR
    scale_columns(rows.beta);
    round(R, dv16);
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      float2 k_read{1.f, 1.f};
      if constexpr (!Traits::kChannelGate) k_read = columns_of(rows.k_read, j);
      CUTE_UNROLL
      for (int x = 2 * j; x < 2 * j + 2; ++x)
        words_of(X16)[x] = pack<Element>(-k_read.x * R(2 * x), -k_read.y * R(2 * x + 1));
    }
    issue_gemm<false>(mma_state, X16, by_key(late.k), S);
    ring_out.wait_empty(at_out);
    store_transposed(out.y, warp, words_of(Y16));
    store_transposed(out.dv, warp, words_of(dv16));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % 32 == 0) {
      wait_for_memory<1>();  // dS of the chunk before
      ring_out.arrive_full(at_out);
    }
    at_out.advance();
    warpgroup_wait<0>();
    s.ring_late.release(at);
    at.advance();
  }

  if (a.d_initial != nullptr) {
    for_state<kKeyDim>(first_value, [&](int x, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) a.d_initial[state_at(value, key)] = S(x);
    });
  }
  if (thread % 32 == 0) {  // dS of the first chunk
    wait_for_memory<0>();
    ring_out.wait_empty(at_out);
    ring_out.arrive_full(at_out);
  }
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    reverse_pass_kernel(const __grid_constant__ ReverseMaps maps, const __grid_constant__ ReversePassArgs a,
                        int value_tiles) {
  auto& s = shared_storage<typename Traits::Storage>();
  const int blocks = (value_tiles + 1) / 2, block = blockIdx.x % blocks, row = blockIdx.x / blocks;
  const int value_heads = static_cast<int>(a.in.value_heads);
  ReversePlace z;
  z.n = row / value_heads, z.head = row % value_heads;
  z.sequence = sequence_of(a.in, z.n);
  z.first_value = 2 * block * kImageColumns, z.chains = min(Traits::kChains, value_tiles - 2 * block);
  if (threadIdx.x == 0) {
    s.ring_early.init(1, 4 * z.chains);
    s.ring_late.init(1, 4 * z.chains);
    for (auto& ring : s.ring_out) ring.init(4, 2);
    s.ring_news.init(1, 1);
    cutlass::arch::fence_barrier_init();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // this CTA has its place on an SM
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32;
  if (warpgroup < Traits::kChains) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kChainRegisters>();
    if (warpgroup < z.chains) walk_reverse<Traits>(s, a, z, warpgroup);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kHelperRegisters>();
    if (warp == 0 && threadIdx.x % 32 == 0) load_reverse<Traits>(s, maps, a, z);
    if (warp == 1) store_dv<Traits>(s, a, z);
    if (warp == 2 && threadIdx.x % 32 == 0) store_y<Traits>(s, a, z);
    if (warp == 3 && threadIdx.x % 32 == 0) announce<Traits>(s, a, z);
  }
}

template <class Tag, int kKeyDim, bool kChannelGate>
int reverse_pass_sm90<Tag, kKeyDim, kChannelGate>::run(const ReversePassArgs& args, void* stream) {
  using Traits = ReversePassTraits<Tag, kKeyDim, kChannelGate>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = reverse_pass_kernel<Traits>;
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  const InputsSm90& in = args.in;
  ReverseMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps.tokens, in, kBf16)) return e;
  if (const cudaError_t e =
          encode_tokens(&maps.dout, args.d_o, kBf16, in.value_dim, in.tokens, in.value_heads, in.batch))
    return e;
  const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
  const int64_t grid = in.sequences * in.value_heads * value_blocks(in);
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(
      maps, args, static_cast<int>(tiles));
  return cudaGetLastError();
}

}  // namespace nearfield::delta
