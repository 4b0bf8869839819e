// The serial walk over the chunks of a sequence. A warpgroup owns 64 value columns of a state and keeps it
// transposed, S^T [64 values, K], in float32 registers: then every intermediate leaves the tensor cores in
// the layout in which it is the left operand of the next product, and nothing on the chain passes through
// shared memory or a barrier:
//   R^T = S^T K^T,  X^T = (V^T - R^T) beta,  V'^T = X^T + X^T N^T,  S^T <- e^{G_C} S^T + V'^T K,  O^T = S^T
//   Q^T + V'^T P^T
// (decays and norms of a gate per head are factors of columns of the accumulators). One warp streams the
// tiles of the next chunks into a ring of stages. Plan and budget: README.md.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "delta/chunk_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_, int kTiles_, bool kChannelGate_, bool kOutput_>
struct StatePassTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_, kTiles = kTiles_;
  static constexpr bool kChannelGate = kChannelGate_, kOutput = kOutput_;
  static constexpr int kKeyImages = kKeyDim / kImageColumns;
  static constexpr int kKeyTile = kKeyDim * kRows;  // elements
  static constexpr int kConsumerWarps = kTiles * 4;
  // One warpgroup has all registers it can use. Two take what a third one, of the loading warp, hands over.
  static constexpr bool kHandOver = kTiles == 2;
  static constexpr int kThreads = kHandOver ? 384 : 160;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  template <int kN, GMMA::Major kMajor>
  using Mma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<64>, Int<kN>, Int<64>>, GMMA::Major::K,
                           kMajor>()));
  using MmaToToken = Mma<kRows, GMMA::Major::K>;     // (64 values, 64 tokens)
  using MmaToState = Mma<kKeyDim, GMMA::Major::MN>;  // (64 values, K)

  struct alignas(1024) Stage {
    Element k[kKeyTile];                           // with a gate per channel Kh
    Element k_write[kChannelGate ? kKeyTile : 8];  // Kt
    alignas(1024) Element q[kOutput ? kKeyTile : 8];
    alignas(1024) Element v[kTiles][kImage];  // in the end O or V' on the way out
    Element n[kImage];
    Element p[kOutput ? kImage : 8];
    alignas(128) float G[kRows], beta[kRows], k_read[kRows], q_read[kRows], k_write_rows[kRows];
    alignas(128) float decay[kChannelGate ? kKeyDim : 4];
  };
  static constexpr int kRowsBytes = 5 * kRows * 4;
  static constexpr int kBytes = kKeyTile * 2 * (1 + kChannelGate + kOutput) + kTiles * kImageBytes +
                                kImageBytes * (1 + kOutput) + kRowsBytes + (kChannelGate ? kKeyDim * 4 : 0);
  static constexpr int kRoom = 227 * 1024 - 256 - (kOutput ? 0 : kTiles * kKeyTile * 2);
  static constexpr int kStages = 3 * sizeof(Stage) <= kRoom ? 3 : 2;

  struct Storage {
    Stage stage[kStages];
    alignas(1024) Element state[kOutput ? 8 : kTiles * kKeyTile];  // entering states on the way out
    Ring<kStages> ring;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct StatePassParams {
  StatePassArgs args;
  int value_groups;  // CTAs per (sequence, value head)
};

// ---- Producer: one thread ----

template <class Traits>
__device__ void load(typename Traits::Storage& s, const TokenMaps& maps, const StatePassArgs& a,
                     const Sequence& sequence, int64_t head, int first_value) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const int head_k = static_cast<int>(head / (a.in.value_heads / a.in.heads));
  const int chunks = sequence.chunks();
  RingIndex<Traits::kStages> at;
  for (int c = 0; c < chunks; ++c) {
    s.ring.wait_empty(at);
    s.ring.expect_bytes(at, Traits::kBytes);
    auto& stage = s.stage[at.stage];
    uint64_t* full = &s.ring.full[at.stage];
    const int64_t token = sequence.begin + static_cast<int64_t>(c) * kRows;
    const int64_t chunk = (sequence.first_slot + c) * a.in.value_heads + head;
    const auto image = [&](void* scratch, int images) {
      return static_cast<Element*>(scratch) + chunk * images * kImage;
    };
    if constexpr (Traits::kChannelGate) {
      copy_in(stage.k, image(a.scratch.Kh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
    } else {
      load_tokens<kKeyDim>(maps.k, full, stage.k, 0, token, head_k, sequence.batch);
    }
    copy_in(stage.G, a.scratch.rows + chunk, Traits::kRowsBytes, full);
    load_tokens<Traits::kTiles * kImageColumns>(maps.v, full, stage.v[0], first_value, token,
                                                static_cast<int>(head), sequence.batch);
    copy_in(stage.n, image(a.scratch.N, 1), kImageBytes, full);
    if constexpr (Traits::kChannelGate) {
      copy_in(stage.k_write, image(a.scratch.Kt, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      copy_in(stage.decay, a.scratch.decay + chunk * kKeyDim, kKeyDim * 4, full);
    }
    if constexpr (Traits::kOutput) {
      if constexpr (Traits::kChannelGate) {
        copy_in(stage.q, image(a.scratch.Qh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      } else {
        load_tokens<kKeyDim>(maps.q, full, stage.q, 0, token, head_k, sequence.batch);
      }
      copy_in(stage.p, image(a.scratch.P, 1), kImageBytes, full);
    }
    at.advance();
  }
}

// ---- Consumers ----

// Rows of a token tile past the end of the sequence belong to the next one, or are padding that may hold NaN.
template <class Element>
__device__ __forceinline__ void clear_rows(Element* images, int count, int valid) {
  const int pieces = (kRows - valid) * (kImageColumns / 8);
  for (int c = 0; c < count; ++c) {
    auto* first = reinterpret_cast<uint4*>(images + c * kImage + valid * kImageColumns);
    for (int i = threadIdx.x % 128; i < pieces; i += 128) first[i] = uint4{0, 0, 0, 0};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, 1 + threadIdx.x / 128);
}

// A warp's 16 value columns of a (64 values, 64 tokens) accumulator, rounded, to rows of `out`, whose next
// token is `stride` elements away.
template <class Element>
__device__ __forceinline__ void store_tokens(Element* image, int warp, const uint32_t* words, Element* out,
                                             int64_t stride, int valid, int columns) {
  store_transposed(image, warp, words);
  __syncwarp();
  const int lane = threadIdx.x % 32, piece = 2 * warp + lane % 2;
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int token = 16 * i + lane / 2;
    if (token < valid && piece * 8 < columns) {
      *reinterpret_cast<uint4*>(out + token * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(image_piece(image, token, piece));
    }
  }
}

// Calls f(index in the accumulator, value, key) for what this thread holds of S^T.
template <int kKeyDim, class F>
__device__ __forceinline__ void for_state(int first_value, const F& f) {
  const int lane = threadIdx.x % 32, value = first_value + threadIdx.x % 128 / 32 * 16 + lane / 4;
  CUTE_UNROLL
  for (int j = 0; j < kKeyDim / 8; ++j) {
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) f(4 * j + x, value + 8 * (x / 2), 8 * j + 2 * (lane % 4) + x % 2);
  }
}

template <class Traits>
__device__ void walk(typename Traits::Storage& s, const StatePassArgs& a, const Sequence& sequence, int64_t n,
                     int64_t head, int first_value) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim, kKeyTile = Traits::kKeyTile;
  const InputsSm90& in = a.in;
  const int tile = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, quad = thread % 4;
  first_value += tile * kImageColumns;
  const int columns = static_cast<int>(in.value_dim) - first_value;
  const int chunks = sequence.chunks();

  typename Traits::MmaToToken mma_token;
  typename Traits::MmaToState mma_state;
  const auto thread_token = mma_token.get_slice(thread);
  const auto thread_state = mma_state.get_slice(thread);
  // An image as the right operand: tokens or chunk rows as N, or key features as N.
  const auto by_row = [&](Element* image, auto features) {
    return thread_token.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByRow<Element, decltype(features)::value>{}));
  };
  const auto by_key = [&](Element* image) {
    return thread_state.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByFeature<Element, kKeyDim>{}));
  };
  Tensor S = partition_fragment_C(mma_state, cute::Shape<Int<64>, Int<kKeyDim>>{});  // S^T, (values, keys)
  Tensor R = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});    // (values, tokens)
  Tensor O = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});
  Tensor S16 = make_tensor<Element>(accumulator_as_a(S.layout()));
  Tensor X16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor V16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor out16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  const auto round = [](auto& from, auto& to) {
    Tensor view = make_tensor(from.data(), to.layout());
    convert_to(view, to);
  };

  const int64_t state = (n * in.value_heads + head) * in.state_size();
  const auto state_at = [&](int value, int key) {
    return state + (in.state_v_first ? value * in.key_dim + key : key * in.value_dim + value);
  };
  clear(S);
  if (in.initial_state != nullptr) {
    for_state<kKeyDim>(first_value, [&](int at, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) S(at) = in.initial_state[state_at(value, key)];
    });
  }

  // O (or V') of a chunk leaves while the next one's first products run.
  RingIndex<Traits::kStages> at, last;
  const auto store_last = [&](int c) {
    auto* out = static_cast<Element*>(Traits::kOutput ? a.o : a.v_new);
    if (Traits::kOutput || out != nullptr) {
      const int64_t done = static_cast<int64_t>(c) * kRows, stride = in.value_heads * in.value_dim;
      out +=
          (sequence.batch * in.tokens + sequence.begin + done) * stride + head * in.value_dim + first_value;
      store_tokens(s.stage[last.stage].v[tile], warp, reinterpret_cast<const uint32_t*>(out16.data()), out,
                   stride, static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - done)),
                   columns);
      cutlass::arch::fence_view_async_shared();  // the next V comes through the async proxy
    }
    __syncwarp();
    s.ring.release(last);
  };

  round(S, S16);
  for (int c = 0; c < chunks; ++c) {
    auto& stage = s.stage[at.stage];
    const int valid =
        static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - static_cast<int64_t>(c) * kRows));
    const auto columns_of = [&](const float* row, int j) {
      return *reinterpret_cast<const float2*>(row + 8 * j + 2 * quad);
    };
    s.ring.wait_full(at);
    asm volatile("" ::: "memory");
    issue_gemm<true>(mma_token, S16, by_row(stage.k, Int<kKeyDim>{}), R);
    if constexpr (Traits::kOutput) {
      issue_gemm<true>(mma_token, S16, by_row(stage.q, Int<kKeyDim>{}), O);
    } else {
      if (a.states != nullptr) {
        Element* own = s.state + tile * kKeyTile;
        tma_store_wait<0>();
        __syncwarp();
        CUTE_UNROLL
        for (int k = 0; k < Traits::kKeyImages; ++k)
          store_rows(own + k * kImage, warp, reinterpret_cast<const uint32_t*>(S16.data()) + 16 * k);
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        if (thread % 32 == 0) {
          const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
          const int64_t image =
              (((sequence.first_slot + c) * in.value_heads + head) * tiles + first_value / kImageColumns) *
              Traits::kKeyImages;
          constexpr int kWarpRows = 16 * kImageColumns;
          CUTE_UNROLL
          for (int k = 0; k < Traits::kKeyImages; ++k) {
            copy_out(static_cast<Element*>(a.states) + (image + k) * kImage + warp * kWarpRows,
                     own + k * kImage + warp * kWarpRows, kWarpRows * 2);
          }
          tma_store_arrive();
        }
      }
    }
    if (c > 0) store_last(c - 1);

    // X = beta (V - Kh S)
    uint32_t v_words[16];
    load_transposed(stage.v[tile], warp, v_words);
    warpgroup_wait<Traits::kOutput ? 1 : 0>();
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 beta = columns_of(stage.beta, j), k_read = columns_of(stage.k_read, j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 v = unpack<Element>(v_words[2 * j + i]);
        R(4 * j + 2 * i) = beta.x * (v.x - k_read.x * R(4 * j + 2 * i));
        R(4 * j + 2 * i + 1) = beta.y * (v.y - k_read.y * R(4 * j + 2 * i + 1));
      }
    }
    if (valid < kRows) {
      CUTE_UNROLL
      for (int x = 0; x < 32; ++x)
        if (8 * (x / 4) + 2 * quad + x % 2 >= valid) R(x) = 0.f;
      if constexpr (!Traits::kChannelGate) clear_rows(stage.k, Traits::kKeyImages, valid);
    }
    round(R, X16);
    // V' = X + N X
    issue_gemm<false>(mma_token, X16, by_row(stage.n, Int<kRows>{}), R);
    // S <- e^{G_C} S, while it runs
    if constexpr (Traits::kChannelGate) {
      CUTE_UNROLL
      for (int j = 0; j < kKeyDim / 8; ++j) {
        const float2 decay = columns_of(stage.decay, j);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          S(4 * j + 2 * i) *= decay.x;
          S(4 * j + 2 * i + 1) *= decay.y;
        }
      }
    } else {
      const float decay = exp2_fast(stage.G[kRows - 1]);
      CUTE_UNROLL
      for (int x = 0; x < size(S); ++x) S(x) *= decay;
    }
    warpgroup_wait<0>();

    // S += Kt^T V', and O = scale Qh S + P V'
    round(R, V16);
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 k_write = columns_of(stage.k_write_rows, j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        R(4 * j + 2 * i) *= k_write.x;
        R(4 * j + 2 * i + 1) *= k_write.y;
      }
    }
    round(R, X16);
    if constexpr (Traits::kChannelGate) {
      issue_gemm<false>(mma_state, X16, by_key(stage.k_write), S);
    } else {
      issue_gemm<false>(mma_state, X16, by_key(stage.k), S);
    }
    if constexpr (Traits::kOutput) {
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 q_read = columns_of(stage.q_read, j);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          O(4 * j + 2 * i) *= q_read.x;
          O(4 * j + 2 * i + 1) *= q_read.y;
        }
      }
      issue_gemm<false>(mma_token, V16, by_row(stage.p, Int<kRows>{}), O);
      warpgroup_wait<1>();
      round(S, S16);
      warpgroup_fence_operand(S);
      warpgroup_wait<0>();
      round(O, out16);
    } else {
      warpgroup_wait<0>();
      round(S, S16);
      copy(V16, out16);
    }
    last = at;
    at.advance();
  }
  if (chunks > 0) store_last(chunks - 1);

  if (a.final_state != nullptr) {
    for_state<kKeyDim>(first_value, [&](int x, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) a.final_state[state_at(value, key)] = S(x);
    });
  }
  if constexpr (!Traits::kOutput) tma_store_wait<0>();
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    state_pass_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ StatePassParams p) {
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = p.args.in;
  const int group = blockIdx.x % p.value_groups;
  const int64_t row = blockIdx.x / p.value_groups, head = row % in.value_heads, n = row / in.value_heads;
  const Sequence sequence = sequence_of(in, n);
  const int first_value = group * Traits::kTiles * kImageColumns;
  if (threadIdx.x == 0) {
    s.ring.init(1, Traits::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
    prefetch_map(maps.q);
    prefetch_map(maps.k);
    prefetch_map(maps.v);
  }
  __syncthreads();
  if (threadIdx.x / 32 >= Traits::kConsumerWarps) {
    if constexpr (Traits::kHandOver) cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == Traits::kConsumerWarps * 32)
      load<Traits>(s, maps, p.args, sequence, head, first_value);
  } else {
    if constexpr (Traits::kHandOver) cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    walk<Traits>(s, p.args, sequence, n, head, first_value);
  }
}

template <class Traits>
cudaError_t launch_state_pass(const StatePassArgs& args, bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = state_pass_kernel<Traits>;
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  constexpr int64_t kValues = Traits::kTiles * kImageColumns;
  const int64_t groups = (args.in.value_dim + kValues - 1) / kValues;
  const int64_t grid = args.in.sequences * args.in.value_heads * groups;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, stream>>>(
      maps, StatePassParams{args, static_cast<int>(groups)});
  return cudaGetLastError();
}

template <class Tag, int kKeyDim, int kTiles, bool kChannelGate>
int state_pass_sm90<Tag, kKeyDim, kTiles, kChannelGate>::run(const StatePassArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  if (args.o != nullptr) {
    return launch_state_pass<StatePassTraits<Tag, kKeyDim, kTiles, kChannelGate, true>>(args, kBf16, stream);
  }
  return launch_state_pass<StatePassTraits<Tag, kKeyDim, kTiles, kChannelGate, false>>(args, kBf16, stream);
}

}  // namespace nearfield::delta
