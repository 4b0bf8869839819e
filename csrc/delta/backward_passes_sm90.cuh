// The two serial walks of the backward. The states are recomputed as in the forward (state_pass_sm90.cuh);
// beside it the walk from the last chunk to the first carries dS, the gradient of the state after a chunk.
// As there, a warpgroup owns 64 value columns and keeps dS^T [64 values, K] in float32 registers, so that the
// chain leaves the registers only as left operand of the next product:
//   dV'^T = dS^T Kt^T + s dO^T P,  Y^T = dV'^T + dV'^T N,  dS^T <- e^{G_C} dS^T + s dO^T Qh - beta Y^T Kh
#pragma once

#include "delta/sm90_bwd.h"
#include "delta/state_pass_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_, int kTiles_, bool kChannelGate_>
struct ReversePassTraits : StatePassTraits<Tag, kKeyDim_, kTiles_, kChannelGate_, false> {
  using Base = StatePassTraits<Tag, kKeyDim_, kTiles_, kChannelGate_, false>;
  using typename Base::Element;
  static constexpr int kKeyDim = kKeyDim_, kTiles = kTiles_;
  static constexpr bool kChannelGate = kChannelGate_;
  static constexpr int kKeyTile = Base::kKeyTile;
  using MmaByFeature = typename Base::template Mma<kRows, GMMA::Major::MN>;  // (64 values, 64 tokens)

  struct alignas(1024) Stage {
    Element k[kKeyTile];                           // with a gate per channel Kh
    Element k_write[kChannelGate ? kKeyTile : 8];  // Kt
    alignas(1024) Element q[kKeyTile];             // Qh
    Element dout[kTiles][kImage];                  // in the end Y and dV on the way out
    Element n[kImage];
    Element p[kImage];
    alignas(128) float G[kRows], beta[kRows], k_read[kRows], q_read[kRows], k_write_rows[kRows];
    alignas(128) float decay[kChannelGate ? kKeyDim : 4];
  };
  static constexpr int kBytes = kKeyTile * 2 * (2 + kChannelGate) + (kTiles + 2) * kImageBytes +
                                Base::kRowsBytes + (kChannelGate ? kKeyDim * 4 : 0);
  static constexpr int kRoom = 227 * 1024 - 256 - kTiles * kKeyTile * 2;
  static constexpr int kStages = 3 * sizeof(Stage) <= kRoom ? 3 : 2;

  struct Storage {
    Stage stage[kStages];
    alignas(1024) Element state[kTiles * kKeyTile];  // dS on the way out
    Ring<kStages> ring;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct BackwardMaps {
  TokenMaps tokens;
  CUtensorMap dout;
};

struct BackwardPassesParams {
  BackwardPassesArgs args;
  int value_groups;  // CTAs per (sequence, value head) and direction
};

// ---- Producer: one thread ----

template <class Traits>
__device__ void load_reverse(typename Traits::Storage& s, const BackwardMaps& maps,
                             const BackwardPassesArgs& a, const Sequence& sequence, int64_t head,
                             int first_value) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const int head_k = static_cast<int>(head / (a.in.value_heads / a.in.heads));
  RingIndex<Traits::kStages> at;
  for (int c = sequence.chunks() - 1; c >= 0; --c) {
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
      copy_in(stage.k_write, image(a.scratch.Kt, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      copy_in(stage.q, image(a.scratch.Qh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      copy_in(stage.k, image(a.scratch.Kh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      copy_in(stage.decay, a.scratch.decay + chunk * kKeyDim, kKeyDim * 4, full);
    } else {
      load_tokens<kKeyDim>(maps.tokens.k, full, stage.k, 0, token, head_k, sequence.batch);
      load_tokens<kKeyDim>(maps.tokens.q, full, stage.q, 0, token, head_k, sequence.batch);
    }
    load_tokens<Traits::kTiles * kImageColumns>(maps.dout, full, stage.dout[0], first_value, token,
                                                static_cast<int>(head), sequence.batch);
    copy_in(stage.G, a.scratch.rows + chunk, Traits::kRowsBytes, full);
    copy_in(stage.p, image(a.scratch.P, 1), kImageBytes, full);
    copy_in(stage.n, image(a.scratch.N, 1), kImageBytes, full);
    at.advance();
  }
}

// ---- Consumers ----

template <class Traits>
__device__ void walk_reverse(typename Traits::Storage& s, const BackwardPassesArgs& a,
                             const Sequence& sequence, int64_t n, int64_t head, int first_value) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim, kKeyTile = Traits::kKeyTile;
  const InputsSm90& in = a.in;
  const int tile = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, quad = thread % 4;
  first_value += tile * kImageColumns;
  const int columns = static_cast<int>(in.value_dim) - first_value;

  typename Traits::MmaToToken mma_token;
  typename Traits::MmaByFeature mma_feature;
  typename Traits::MmaToState mma_state;
  const auto thread_token = mma_token.get_slice(thread);
  const auto thread_feature = mma_feature.get_slice(thread);
  const auto thread_state = mma_state.get_slice(thread);
  // An image as the right operand: tokens as N, or chunk columns as N, or key features as N.
  const auto by_row = [&](Element* image) {
    return thread_token.partition_fragment_B(
        make_tensor(make_smem_ptr(image), LayoutByRow<Element, kKeyDim>{}));
  };
  const auto by_column = [&](Element* image) {
    return thread_feature.partition_fragment_B(
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
  const auto round = [](auto& from, auto& to) {
    Tensor view = make_tensor(from.data(), to.layout());
    convert_to(view, to);
  };

  const int64_t state = (n * in.value_heads + head) * in.state_size();
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
  for (int c = sequence.chunks() - 1; c >= 0; --c) {
    auto& stage = s.stage[at.stage];
    const int64_t done = static_cast<int64_t>(c) * kRows;
    const int valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - done));
    const auto columns_of = [&](const float* row, int j) {
      return *reinterpret_cast<const float2*>(row + 8 * j + 2 * quad);
    };
    round(S, S16);
    s.ring.wait_full(at);
    asm volatile("" ::: "memory");
    if (valid < kRows) {
      if constexpr (!Traits::kChannelGate) clear_rows(stage.k, Traits::kKeyImages, valid);
      if constexpr (!Traits::kChannelGate) clear_rows(stage.q, Traits::kKeyImages, valid);
      clear_rows(stage.dout[tile], 1, valid);
    }
    // dV' = Kt dS
    if constexpr (Traits::kChannelGate) {
      issue_gemm<true>(mma_token, S16, by_row(stage.k_write), R);
    } else {
      issue_gemm<true>(mma_token, S16, by_row(stage.k), R);
    }

    // dS, the gradient of the state after this chunk, leaves.
    {
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
          copy_out(static_cast<Element*>(a.d_states) + (image + k) * kImage + warp * kWarpRows,
                   own + k * kImage + warp * kWarpRows, kWarpRows * 2);
        }
        tma_store_arrive();
      }
    }

    // dS <- e^{G_C} dS + s Qh^T dO
    auto* dO_words = reinterpret_cast<uint32_t*>(dO16.data());
    load_transposed(stage.dout[tile], warp, dO_words);
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
      issue_gemm<false>(mma_state, dO16, by_key(stage.q), S);
    } else {
      const float decay = exp2_fast(stage.G[kRows - 1]);
      CUTE_UNROLL
      for (int x = 0; x < size(S); ++x) S(x) *= decay;
      auto* words = reinterpret_cast<uint32_t*>(X16.data());
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 q_read = columns_of(stage.q_read, j);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float2 dO = unpack<Element>(dO_words[2 * j + i]);
          words[2 * j + i] = pack<Element>(q_read.x * dO.x, q_read.y * dO.y);
        }
      }
      issue_gemm<false>(mma_state, X16, by_key(stage.q), S);
    }
    warpgroup_wait<1>();

    // dV' += s P^T dO
    if constexpr (!Traits::kChannelGate) {
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float2 k_write = columns_of(stage.k_write_rows, j);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          R(4 * j + 2 * i) *= k_write.x;
          R(4 * j + 2 * i + 1) *= k_write.y;
        }
      }
    }
    issue_gemm<false>(mma_feature, dO16, by_column(stage.p), R);
    warpgroup_wait<0>();

    // Y = dV' + N^T dV'
    round(R, X16);
    issue_gemm<false>(mma_feature, X16, by_column(stage.n), R);
    warpgroup_wait<0>();
    round(R, Y16);

    // dR = dV = beta Y;  dS -= Kh^T dR
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 beta = columns_of(stage.beta, j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        R(4 * j + 2 * i) *= beta.x;
        R(4 * j + 2 * i + 1) *= beta.y;
      }
    }
    round(R, dv16);
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const float2 k_read = columns_of(stage.k_read, j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        R(4 * j + 2 * i) *= -k_read.x;
        R(4 * j + 2 * i + 1) *= -k_read.y;
      }
    }
    round(R, X16);
    issue_gemm<false>(mma_state, X16, by_key(stage.k), S);

    const int64_t stride = in.value_heads * in.value_dim;
    const int64_t out =
        (sequence.batch * in.tokens + sequence.begin + done) * stride + head * in.value_dim + first_value;
    store_tokens(stage.dout[tile], warp, reinterpret_cast<const uint32_t*>(Y16.data()),
                 static_cast<Element*>(a.y) + out, stride, valid, columns);
    __syncwarp();
    store_tokens(stage.dout[tile], warp, reinterpret_cast<const uint32_t*>(dv16.data()),
                 static_cast<Element*>(a.dv) + out, stride, valid, columns);
    cutlass::arch::fence_view_async_shared();  // the next dO comes through the async proxy
    warpgroup_wait<0>();
    __syncwarp();
    s.ring.release(at);
    at.advance();
  }

  if (a.d_initial != nullptr) {
    for_state<kKeyDim>(first_value, [&](int x, int value, int key) {
      if (value < in.value_dim && key < in.key_dim) a.d_initial[state_at(value, key)] = S(x);
    });
  }
  tma_store_wait<0>();
}

// ---- Kernel and launch ----

template <class Traits, class Load, class Walk>
__device__ __forceinline__ void split_roles(typename Traits::Storage& s, const Load& load, const Walk& walk) {
  if (threadIdx.x == 0) {
    s.ring.init(1, Traits::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x / 32 >= Traits::kConsumerWarps) {
    if constexpr (Traits::kHandOver) cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == Traits::kConsumerWarps * 32) load();
  } else {
    if constexpr (Traits::kHandOver) cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    walk();
  }
}

template <class Forward, class Reverse>
__global__ void __launch_bounds__(Reverse::kThreads, 1)
    backward_passes_kernel(const __grid_constant__ BackwardMaps maps,
                           const __grid_constant__ BackwardPassesParams p) {
  const BackwardPassesArgs& a = p.args;
  const InputsSm90& in = a.in;
  const int index = blockIdx.x / 2, group = index % p.value_groups;
  const int64_t row = index / p.value_groups, head = row % in.value_heads, n = row / in.value_heads;
  const Sequence sequence = sequence_of(in, n);
  const int first_value = group * Reverse::kTiles * kImageColumns;
  if (blockIdx.x % 2 == 0) {
    auto& s = shared_storage<typename Reverse::Storage>();
    split_roles<Reverse>(
        s, [&] { load_reverse<Reverse>(s, maps, a, sequence, head, first_value); },
        [&] { walk_reverse<Reverse>(s, a, sequence, n, head, first_value); });
  } else {
    auto& s = shared_storage<typename Forward::Storage>();
    const StatePassArgs pass{in, a.scratch, nullptr, nullptr, a.states, a.v_new};
    split_roles<Forward>(
        s, [&] { load<Forward>(s, maps.tokens, pass, sequence, head, first_value); },
        [&] { walk<Forward>(s, pass, sequence, n, head, first_value); });
  }
}

template <class Tag, int kKeyDim, int kTiles, bool kChannelGate>
int backward_passes_sm90<Tag, kKeyDim, kTiles, kChannelGate>::run(const BackwardPassesArgs& args,
                                                                   void* stream) {
  using Forward = StatePassTraits<Tag, kKeyDim, kTiles, kChannelGate, false>;
  using Reverse = ReversePassTraits<Tag, kKeyDim, kTiles, kChannelGate>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  constexpr int kShared =
      static_cast<int>(std::max(sizeof(typename Forward::Storage), sizeof(typename Reverse::Storage)));
  const auto kernel = backward_passes_kernel<Forward, Reverse>;
  static const cudaError_t attribute =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  const InputsSm90& in = args.in;
  BackwardMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps.tokens, in, kBf16)) return e;
  if (const cudaError_t e =
          encode_tokens(&maps.dout, args.d_o, kBf16, in.value_dim, in.tokens, in.value_heads, in.batch))
    return e;
  constexpr int64_t kValues = kTiles * kImageColumns;
  const int64_t groups = (in.value_dim + kValues - 1) / kValues;
  const int64_t grid = 2 * in.sequences * in.value_heads * groups;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Reverse::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(
      maps, BackwardPassesParams{args, static_cast<int>(groups)});
  return cudaGetLastError();
}

}  // namespace nearfield::delta
