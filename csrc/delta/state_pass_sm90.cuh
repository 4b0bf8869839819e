// The serial walk over the chunks of a sequence. A warpgroup owns 64 value columns of a state and keeps it
// transposed, S^T [64 values, K], in float32 registers: then every intermediate leaves the tensor cores in
// the layout in which it is the left operand of the next product, and nothing on the chain passes through
// shared memory or a barrier:
//   R^T = S^T K^T,  X^T = (V^T - R^T) beta,  V'^T = X^T + X^T N^T
//   S^T <- e^{G_C} S^T + V'^T K,  O^T = S^T Q^T + V'^T P^T
// (decays and norms of a gate per head are factors of columns of the accumulators). One warp streams the
// tiles of the next chunks into a ring of stages, one carries O away, and where memory is the limit and not
// the chain, a second warpgroup computes P. Plan and budget: README.md.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "delta/state_pass_warps_sm90.cuh"

namespace nearfield::delta {

// ---- Chain ----

// Rows of a token tile past the end of the sequence belong to the next one, or are padding that may hold NaN.
template <class Element>
__device__ __forceinline__ void clear_rows(Element* images, int count, int valid) {
  const int pieces = (kRows - valid) * (kImageColumns / 8);
  for (int c = 0; c < count; ++c) {
    auto* first = reinterpret_cast<uint4*>(images + c * kImage + valid * kImageColumns);
    for (int i = threadIdx.x % 128; i < pieces; i += 128) first[i] = uint4{0, 0, 0, 0};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, 2);
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

// 64 values of a state in global memory.
struct StateRows {
  float* data = nullptr;  // null: zero, or not wanted
  int64_t value, key;     // strides
  int values, keys;       // what lies beyond is zero, or not written
};

// Of one head of initial_state or final_state.
__device__ __forceinline__ StateRows rows_of_state(const InputsSm90& in, const float* states, int64_t n,
                                                   int64_t head, int first_value) {
  if (states == nullptr) return {};
  const int64_t value = in.state_v_first ? in.key_dim : 1, key = in.state_v_first ? 1 : in.value_dim;
  return {const_cast<float*>(states) + (n * in.value_heads + head) * in.state_size() + first_value * value,
          value, key, static_cast<int>(in.value_dim) - first_value, static_cast<int>(in.key_dim)};
}

template <int kKeyDim, class Accumulator>
__device__ __forceinline__ void load_state(Accumulator& S, const StateRows& from) {
  clear(S);
  if (from.data == nullptr) return;
  for_state<kKeyDim>(0, [&](int x, int value, int key) {
    if (value < from.values && key < from.keys) S(x) = from.data[value * from.value + key * from.key];
  });
}

template <int kKeyDim, class Accumulator>
__device__ __forceinline__ void store_state(const Accumulator& S, const StateRows& to) {
  if (to.data == nullptr) return;
  for_state<kKeyDim>(0, [&](int x, int value, int key) {
    if (value < to.values && key < to.keys) to.data[value * to.value + key * to.key] = S(x);
  });
}

// Where a walk is: its next chunk, its places in the rings, and O of the last chunk, which leaves with the
// next.
template <int kStages>
struct WalkPosition {
  int chunk = 0;
  RingIndex<kStages> at;
  RingIndex<1> at_out, at_v_new, at_low;
  bool after_hard = false;  // the next chunk follows a hard one
  uint32_t out[16] = {};
};

// A result of the chain to the warp that stores it.
template <class Element>
__device__ __forceinline__ void hand_over(Ring<1>& ring, RingIndex<1>& at, Element* image,
                                          const uint32_t* words, bool to_copy_engine) {
  ring.wait_empty(at);
  store_transposed(image, threadIdx.x % 128 / 32, words);
  if (to_copy_engine) cutlass::arch::fence_view_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring.arrive_full(at);
  at.advance();
}

// The compiler moves work that stands before a wait for a product behind it, out of the product's shade. It
// does not move it past a branch; this one is always the same.
struct Hold {
  const int& chunk;
  int never;  // not the number of a chunk, which the compiler does not know
  __device__ __forceinline__ void operator()() const {
    asm volatile(
        "{\n\t"
        ".reg .pred skip;\n\t"
        "setp.ne.s32 skip, %0, %1;\n\t"
        "@skip bra.uni SKIP;\n\t"
        "nanosleep.u32 1;\n\t"
        "nanosleep.u32 1;\n\t"
        "SKIP:\n\t"
        "}" ::"r"(chunk),
        "r"(never)
        : "memory");
  }
};

// Of a row of factors those of the thread's columns 8 j and 8 j + 1 of an accumulator, counted from its
// first.
__device__ __forceinline__ float2 columns_of(const float* row, int j) {
  return *reinterpret_cast<const float2*>(row + 8 * j + 2 * (threadIdx.x % 4));
}
// All of them, read where this stands.
__device__ __forceinline__ void read_factors(float2 (&factor)[8], const float* row) {
  CUTE_UNROLL
  for (int j = 0; j < 8; ++j) {
    factor[j] = columns_of(row, j);
    warpgroup_fence_operand(factor[j].x), warpgroup_fence_operand(factor[j].y);
  }
}

// S <- e^{G_C} S of a chunk, or of dS, whose factors are read before S is there.
template <class Traits>
struct StateDecay {
  float2 factor[Traits::kChannelGate ? Traits::kKeyDim / 8 : 1];

  template <class Rows>
  __device__ __forceinline__ void read(const Rows& rows, bool wanted) {
    if constexpr (Traits::kChannelGate) {
      CUTE_UNROLL
      for (int j = 0; j < Traits::kKeyDim / 8; ++j)
        factor[j] = wanted ? columns_of(rows.decay, j) : float2{1.f, 1.f};
    } else {
      factor[0].x = wanted ? exp2_fast(rows.G[kRows - 1]) : 1.f;
      warpgroup_fence_operand(factor[0].x);
    }
  }
  template <class Accumulator>
  __device__ __forceinline__ void apply(Accumulator& S) const {
    CUTE_UNROLL
    for (int x = 0; x < size(S); ++x) {
      const float2 of_x = factor[Traits::kChannelGate ? x / 4 : 0];
      S(x) *= Traits::kChannelGate && x % 2 ? of_x.y : of_x.x;
    }
  }
};

// The low halves of a hard chunk to a place of their own, which all warps of the chain have left.
template <class Storage>
__device__ __forceinline__ void ask_for_low(Storage& s, const StatePassArgs& a, const RingIndex<1>& at,
                                            int64_t chunk) {
  cutlass::arch::NamedBarrier::sync(128, 2);
  if (threadIdx.x % 128 != 0) return;
  auto& low = s.low[0];
  asm volatile("fence.proxy.async.global;" ::: "memory");  // the copy engine reads what was announced
  s.ring_low.expect_bytes(at, sizeof(low.n) + sizeof(low.p));
  copy_in(low.n, static_cast<char*>(a.scratch.N_low) + chunk * kImageBytes, kImageBytes, s.ring_low.full);
  copy_in(low.p, static_cast<char*>(a.scratch.P_low) + chunk * kImageBytes, kImageBytes, s.ring_low.full);
}

// Leaves the state after the walk in S, which holds the entering one. A full walk offers it to keep(chunk, S)
// after every whole chunk, counted from 0. One that is not stops at a chunk that is not whole, and, beside
// prepare, at the first hard one.
template <class Traits, class Accumulator, class Keep>
__device__ __forceinline__ void walk(typename Traits::Storage& s, const StatePassArgs& a,
                                     const Sequence& sequence, int64_t head, int first_value, Accumulator& S,
                                     WalkPosition<Traits::kStages>& position, const Keep& keep) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  constexpr bool kOutput = Traits::kOutput;
  const ForwardInputsSm90& in = a.in;
  const int thread = threadIdx.x % 128, warp = thread / 32, quad = thread % 4;
  // A chunk that is not whole is for the full walk.
  const int chunks = Traits::kFull ? sequence.chunks() : static_cast<int>(sequence.length / kRows);
  const bool keeps = Traits::kKeep && a.states != nullptr;

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
  Tensor R = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});  // (values, tokens)
  Tensor O = partition_fragment_C(mma_token, cute::Shape<Int<64>, Int<kRows>>{});
  Tensor S16 = make_tensor<Element>(accumulator_as_a(S.layout()));
  Tensor X16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor V16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  Tensor L16 = make_tensor<Element>(accumulator_as_a(R.layout()));
  const auto for_words = [](auto& to, const auto& word) {
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) reinterpret_cast<uint32_t*>(to.data())[x] = word(x);
  };
  // What rounding R into `high` lost.
  const auto lost = [&](auto& low, const auto& high) {
    for_words(low, [&](int x) {
      return pack_low<Element>(R(2 * x), R(2 * x + 1), reinterpret_cast<const uint32_t*>(high.data())[x]);
    });
  };
  const auto round = [](auto& from, auto& to) {
    Tensor view = make_tensor(from.data(), to.layout());
    convert_to(view, to);
  };

  int& c = position.chunk;
  auto& at = position.at;
  const Hold hold{c, -1 - static_cast<int>(in.heads)};
  // The tiles of a chunk; false: not one for this walk.
  const auto arrived = [&](const RingIndex<Traits::kStages>& place) {
    s.ring.wait_full(place);
    compiler_fence();
    return !(Traits::kMayStop && s.flag[place.stage].hard != 0);
  };

  StateDecay<Traits> decay;
  // The factors of what is read, of a chunk; before its turn comes.
  float2 beta[8], k_read[8];
  const auto take = [&](int stage) {
    read_factors(beta, s.rows[stage].beta);
    if constexpr (!Traits::kChannelGate) read_factors(k_read, s.rows[stage].k_read);
  };

  round(S, S16);
  bool goes_on = c < chunks && arrived(at);
  if constexpr (Traits::kAhead) {
    if (goes_on) take(at.stage);
    decay.read(s.rows[at.stage], goes_on);
    decay.apply(S);
  }
  while (goes_on) {
    auto& stage = s.stage[at.stage];
    const auto& rows = s.rows[at.stage];
    const int valid = Traits::kFull ? valid_rows(sequence, c) : kRows;
    // Of a hard chunk the low halves are in the next stage, whose keys' place keeps V' while registers are
    // short. Asked anew each time, for the same reason.
    const auto hard = [&] {
      return Traits::kLow && *const_cast<const volatile int*>(&s.flag[at.stage].hard) != 0;
    };
    const auto low = [&]() -> auto& {
      if constexpr (Traits::kLowApart) {
        return s.low[0];
      } else {
        return s.stage[at.stage + 1 == Traits::kStages ? 0 : at.stage + 1];
      }
    };
    constexpr bool kKeepsR = kKeyDim == 128;
    // Number x of what this thread keeps: a warp has the same 4 KB as of the states on their way out.
    const auto kept_R = [&](int x) -> float& {
      const auto place = [&]() -> Element* {
        if constexpr (!Traits::kLowApart) {
          return low().k;
        } else if constexpr (Traits::kKeep) {
          return s.state;
        } else {
          return s.low[0].v_new;
        }
      };
      return reinterpret_cast<float*>(place() + x / 16 * kImage +
                                      warp * (kImage / 4))[x % 16 * 32 + thread % 32];
    };
    if constexpr (Traits::kLow && Traits::kLowApart) {
      if (hard()) ask_for_low(s, a, position.at_low, chunk_index(a.in, sequence.first_slot + c, head));
    }
    // Kh S; meanwhile beta V arrives
    issue_gemm<true>(mma_token, S16, by_row(stage.k, Int<kKeyDim>{}), R);
    hold();
    if constexpr (!Traits::kAhead) take(at.stage);
    uint32_t v_words[16];
    load_transposed(stage.v, warp, v_words);
    float2 k_write[8], q_read[8];
    float value[32];
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 v = unpack<Element>(v_words[x]);
      value[2 * x] = beta[x / 2].x * v.x;
      value[2 * x + 1] = beta[x / 2].y * v.y;
    }
    if constexpr (!Traits::kChannelGate) {
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) beta[j] = {beta[j].x * k_read[j].x, beta[j].y * k_read[j].y};
    }
    CUTE_UNROLL
    for (int x = 0; x < 32; ++x) warpgroup_fence_operand(value[x]);
    hold();
    warpgroup_wait<0>();

    // X = beta (V - Kh S). Past the end V, and K unless it is scaled, may hold anything.
    CUTE_UNROLL
    for (int x = 0; x < 32; ++x) R(x) = value[x] - (x % 2 ? beta[x / 4].y : beta[x / 4].x) * R(x);
    if constexpr (Traits::kFull) {
      if (valid < kRows) {
        CUTE_UNROLL
        for (int x = 0; x < 32; ++x)
          if (8 * (x / 4) + 2 * quad + x % 2 >= valid) R(x) = 0.f;
        if constexpr (!Traits::kChannelGate) clear_rows(stage.k, Traits::kKeyImages, valid);
      }
    }
    round(R, X16);
    if (hard()) lost(L16, X16);
    // V' = X + N X, and Qh S; meanwhile what is done leaves
    issue_gemm<false>(mma_token, X16, by_row(stage.n, Int<kRows>{}), R);
    if constexpr (kOutput) issue_gemm<true>(mma_token, S16, by_row(stage.q, Int<kKeyDim>{}), O);
    if constexpr (!Traits::kChannelGate && !Traits::kFewRegisters) read_factors(k_write, rows.k_write);
    if constexpr (Traits::kKeep) {
      const bool left_out =
          !Traits::kChannelGate && !position.after_hard && (sequence.first_chunk + c) % 2 != 0;
      if (keeps && left_out) {
        if (thread == 0) {
          const int64_t image = first_image(in, sequence, c, head, first_value, Traits::kKeyImages);
          *reinterpret_cast<uint32_t*>(static_cast<Element*>(a.states) + image * kImage) = kNoState;
        }
      } else if (keeps) {
        tma_store_wait<0>();
        __syncwarp();
        CUTE_UNROLL
        for (int k = 0; k < Traits::kKeyImages; ++k)
          store_rows(s.state + k * kImage, warp, reinterpret_cast<const uint32_t*>(S16.data()) + 16 * k);
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        if (thread % 32 == 0) {
          const int64_t image = first_image(in, sequence, c, head, first_value, Traits::kKeyImages);
          constexpr int kWarpRows = 16 * kImageColumns;
          CUTE_UNROLL
          for (int k = 0; k < Traits::kKeyImages; ++k) {
            copy_out(static_cast<Element*>(a.states) + (image + k) * kImage + warp * kWarpRows,
                     s.state + k * kImage + warp * kWarpRows, kWarpRows * 2, Traits::kLastUse);
          }
          tma_store_arrive();
        }
      }
    }
    hold();
    warpgroup_wait<kOutput ? 1 : 0>();
    if (hard()) {
      if constexpr (Traits::kFewRegisters) warpgroup_wait<0>();  // S's operands are free
      if constexpr (Traits::kLowApart) {
        s.ring_low.wait_full(position.at_low);
        position.at_low.advance();
      } else {
        auto after = at;
        after.advance();
        s.ring.wait_full(after);
      }
      compiler_fence();
      issue_gemm<false>(mma_token, X16, by_row(low().n, Int<kRows>{}), R);
      issue_gemm<false>(mma_token, L16, by_row(stage.n, Int<kRows>{}), R);
      warpgroup_wait<0>();
      if constexpr (kKeepsR) {
        if constexpr (Traits::kLowApart && Traits::kKeep) {
          tma_store_wait<0>();
          __syncwarp();
        }
        CUTE_UNROLL
        for (int x = 0; x < 32; ++x) kept_R(x) = R(x);
      }
    }

    // S += Kt^T V'; then O = scale Qh S + P V'
    if constexpr (!Traits::kAhead) {
      decay.read(rows, true);
      decay.apply(S);
    }
    if constexpr (Traits::kChannelGate) {
      round(R, X16);
      issue_gemm<false>(mma_state, X16, by_key(stage.k_write), S);
    } else {
      if constexpr (Traits::kFewRegisters) read_factors(k_write, rows.k_write);
      CUTE_UNROLL
      for (int x = 0; x < 16; ++x) {
        reinterpret_cast<uint32_t*>(X16.data())[x] =
            pack<Element>(k_write[x / 2].x * R(2 * x), k_write[x / 2].y * R(2 * x + 1));
      }
      issue_gemm<false>(mma_state, X16, by_key(stage.k), S);
    }
    hold();
    round(R, V16);
    if constexpr (kOutput) {
      if constexpr (!Traits::kComputeP && !Traits::kChannelGate) read_factors(q_read, rows.q_read);
      if constexpr (!Traits::kFewRegisters)
        hand_over(s.ring_out, position.at_out, s.out, position.out, false);
      if constexpr (Traits::kComputeP) {
        s.ring_p.wait_full(at);
        compiler_fence();
        if constexpr (!Traits::kChannelGate) read_factors(q_read, rows.q_read);
      }
      warpgroup_wait<1>();
      if constexpr (!Traits::kChannelGate) {
        CUTE_UNROLL
        for (int x = 0; x < 32; ++x) O(x) *= x % 2 ? q_read[x / 4].y : q_read[x / 4].x;
      }
      issue_gemm<false>(mma_token, V16, by_row(stage.p, Int<kRows>{}), O);
    }
    if (keeps)
      hand_over(s.ring_v_new, position.at_v_new, s.v_new, reinterpret_cast<const uint32_t*>(V16.data()),
                true);
    const bool two_stages = !Traits::kLowApart && hard();
    auto next = at;
    next.advance();
    if (two_stages) next.advance();
    if constexpr (Traits::kAhead) {
      goes_on = c + 1 < chunks && arrived(next);
      const int stage_ahead = goes_on ? next.stage : at.stage;
      take(stage_ahead);
      decay.read(s.rows[stage_ahead], goes_on);
    }
    warpgroup_wait<kOutput ? 1 : 0>();
    round(S, S16);
    if constexpr (Traits::kAhead) decay.apply(S);
    if constexpr (kOutput) {
      warpgroup_fence_operand(S);
      warpgroup_fence_operand(S16);
      hold();
      warpgroup_wait<0>();
    }
    if (hard()) {
      if constexpr (kKeepsR) {
        CUTE_UNROLL
        for (int x = 0; x < 32; ++x) R(x) = kept_R(x);
        cutlass::arch::fence_view_async_shared();  // the copy engine writes there next
      }
      if constexpr (Traits::kChannelGate) {
        round(R, X16);
        lost(L16, X16);
        issue_gemm<false>(mma_state, L16, by_key(stage.k_write), S);
        issue_gemm<false>(mma_state, X16, by_key(low().k_write), S);
      } else {
        if constexpr (Traits::kFewRegisters) read_factors(k_write, rows.k_write);  // again
        for_words(L16, [&](int x) {
          const float w0 = k_write[x / 2].x * R(2 * x), w1 = k_write[x / 2].y * R(2 * x + 1);
          return pack_low<Element>(w0, w1, pack<Element>(w0, w1));
        });
        issue_gemm<false>(mma_state, L16, by_key(stage.k), S);
      }
      warpgroup_wait<0>();
      round(S, S16);
      if constexpr (kOutput) {
        round(R, V16);
        lost(L16, V16);
        issue_gemm<false>(mma_token, L16, by_row(stage.p, Int<kRows>{}), O);
        if constexpr (Traits::kReadP) issue_gemm<false>(mma_token, V16, by_row(low().p, Int<kRows>{}), O);
        warpgroup_wait<0>();
      }
    }
    if constexpr (kOutput) {
      CUTE_UNROLL
      for (int x = 0; x < 16; ++x) position.out[x] = pack<Element>(O(2 * x), O(2 * x + 1));
      if constexpr (Traits::kFewRegisters) hand_over(s.ring_out, position.at_out, s.out, position.out, false);
    }
    if (Traits::kFull && valid == kRows) keep(c, S);
    if constexpr (Traits::kKeep) position.after_hard = hard();
    s.ring.release(at);
    if (two_stages) {
      at.advance();
      s.ring.release(at);
    }
    at = next;
    ++c;
    if constexpr (!Traits::kAhead) goes_on = c < chunks && arrived(at);
  }
  if constexpr (Traits::kKeep) tma_store_wait<0>();
}

template <class Traits>
__device__ __forceinline__ auto make_state() {  // S^T, (values, keys)
  return partition_fragment_C(typename Traits::MmaToState{}, cute::Shape<Int<64>, Int<Traits::kKeyDim>>{});
}

// The walk over a part of a sequence: lean as far as it goes, or `full` from the start. Ends with the last O.
template <class Traits, class Accumulator>
__device__ __forceinline__ void walk_through(typename Traits::Storage& s, const StatePassArgs& a,
                                             const Part& part, int64_t head, int first_value, Accumulator& S,
                                             bool full) {
  const auto keep = [&](int chunk, const auto& state) {
    if (a.boundary_chunks == 0) return;
    const InputsSm90& in = a.in;
    const int every = static_cast<int>(a.boundary_chunks), after = part.sequence.first_chunk + chunk + 1;
    if (after % every != 0) return;
    const int64_t tokens = a.boundary_chunks * kRows;
    const int64_t begin =
        in.cu_seqlens == nullptr ? part.n * (in.tokens / tokens) : sequence_of(in, part.n).begin / tokens;
    StateRows to = rows_of_state(in, a.boundary_states, begin + after / every - 1, head, first_value);
    asm volatile("" : "+l"(to.value), "+l"(to.key));  // or 64 offsets live in registers all along
    store_state<Traits::kKeyDim>(state, to);
  };
  WalkPosition<Traits::kStages> position;
  if constexpr (Traits::kKeep && Traits::kMayBeHard) {
    if (a.states != nullptr && a.scratch.hard != nullptr && part.sequence.first_chunk > 0)
      position.after_hard =
          *const_cast<const volatile float*>(a.scratch.hard +
                                             chunk_index(a.in, part.sequence.first_slot - 1, head)) != 0.f;
  }
  if (!full) walk<Traits>(s, a, part.sequence, head, first_value, S, position, keep);
  using Full = typename Traits::Full;
  const auto last_leaves = [&] {
    if constexpr (Traits::kOutput) hand_over(s.ring_out, position.at_out, s.out, position.out, false);
  };
  if constexpr (Full::kFewRegisters) last_leaves();
  if (position.chunk < part.sequence.chunks()) {
    static_assert(sizeof(typename Full::Storage) == sizeof(typename Traits::Storage));
    walk<Full>(shared_storage<typename Full::Storage>(), a, part.sequence, head, first_value, S, position,
               keep);
  }
  if constexpr (!Full::kFewRegisters) last_leaves();
}

// A sequence or a span of one, with the states or transitions at its ends. `slot` counts either.
template <class Traits>
__device__ __forceinline__ void walk_part(typename Traits::Storage& s, const StatePassArgs& a,
                                          const Part& part, int64_t slot, int64_t head, int first_value,
                                          bool full) {
  constexpr int kKeyDim = Traits::kKeyDim;
  const int64_t values = (a.in.value_dim + kImageColumns - 1) / kImageColumns * kImageColumns;
  const auto in_scratch = [&](const float* data, int64_t rows) -> StateRows {
    return {const_cast<float*>(data) + ((slot * a.in.value_heads + head) * rows + first_value) * kKeyDim,
            kKeyDim, 1, kImageColumns, kKeyDim};
  };
  auto S = make_state<Traits>();
  if (first_value >= values) {
    for_state<kKeyDim>(static_cast<int>(first_value - values),
                       [&](int x, int column, int key) { S(x) = column == key ? 1.f : 0.f; });
  } else if (part.first && !a.all_transitions) {
    load_state<kKeyDim>(S, rows_of_state(a.in, a.in.initial_state, part.n, head, first_value));
  } else {
    load_state<kKeyDim>(S, a.span_states != nullptr ? in_scratch(a.span_states, values) : StateRows{});
  }
  walk_through<Traits>(s, a, part, head, first_value, S, full);
  if (a.transitions != nullptr) {
    store_state<kKeyDim>(S, in_scratch(a.transitions, values + kKeyDim));
  } else if (part.last) {
    store_state<kKeyDim>(S, rows_of_state(a.in, a.final_state, part.n, head, first_value));
  }
}

// ---- Kernel and launch ----

// One thread.
template <class Storage>
__device__ __forceinline__ void init_rings(Storage& s) {
  s.ring.init(Storage::kFillers, 4);
  if constexpr (Storage::kFillers > 1) {
    for (auto& barrier : s.packed) Ring<1>::Barrier::init(&barrier, 1);
  }
  s.ring_p.init(4, 1);
  s.ring_low.init(1, 1);
  s.ring_out.init(4, 1);
  s.ring_v_new.init(4, 1);
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    state_pass_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ StatePassArgs a,
                      int tiles) {
  auto& s = shared_storage<typename Traits::Storage>();
  const int tile = blockIdx.x % tiles, first_value = tile * kImageColumns;
  const int64_t row = blockIdx.x / tiles, head = row % a.in.value_heads, slot = row / a.in.value_heads;
  Part part;
  if (!part.find(a.in, slot, a.span_chunks * kRows)) return;
  if (a.transitions != nullptr && !a.all_transitions) {  // those that nobody composes
    if (part.last || (part.first && first_value >= a.in.value_dim)) return;
  }
  if (threadIdx.x == 0) {
    init_rings(s);
    prefetch_map(maps.q);
    prefetch_map(maps.k);
    prefetch_map(maps.v);
  }
  bool wants_full = a.boundary_chunks > 0;
  if (Traits::kMayBeHard && a.scratch.hard != nullptr && a.ready == nullptr) {
    for (int c = threadIdx.x; c < part.sequence.chunks(); c += Traits::kThreads)
      wants_full |= a.scratch.hard[chunk_index(a.in, part.sequence.first_slot + c, head)] != 0.f;
  }
  const bool full = __syncthreads_or(wants_full) != 0;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;
  if (warpgroup == 0) {
    if constexpr (Traits::kComputeP) cutlass::arch::warpgroup_reg_alloc<Traits::kChainRegisters>();
    walk_part<Traits>(s, a, part, slot, head, first_value, full);
  } else if (Traits::kComputeP && warpgroup == 1) {
    if constexpr (Traits::kComputeP) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kMixRegisters>();
      mix<Traits>(s, a, part.sequence);
    }
  } else {
    if constexpr (Traits::kComputeP) cutlass::arch::warpgroup_reg_dealloc<Traits::kHelperRegisters>();
    if (warp == Traits::kHelpers / 32) {
      load<Traits>(s, maps, a, part.sequence, head, first_value, [](int) {});
      // The next launch may take the scratch, so this one ends after `prepare`.
      if (a.ready != nullptr) wait_for_kernel_before();
    }
    if constexpr (Traits::kOutput) {
      if (warp == Traits::kStoringO) store<Traits>(s, a, part.sequence, head, first_value);
    }
    if constexpr (Traits::kPacked) {
      if (warp == Traits::kUnpacking) take_apart<Traits>(s, part.sequence);
    }
    if constexpr (Traits::kKeep) {
      if (threadIdx.x == Traits::kStoringV * 32) store_v_new<Traits>(s, a, part.sequence, head, first_value);
    }
  }
}

template <class Traits>
cudaError_t launch_state_pass(const StatePassArgs& args, bool is_bf16, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = state_pass_kernel<Traits>;
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, is_bf16)) return e;
  const int64_t tiles = (args.in.value_dim + kImageColumns - 1) / kImageColumns +
                        (args.transitions != nullptr ? Traits::kKeyImages : 0);
  const int64_t parts = args.span_chunks > 0 ? Spans(args.in, args.span_chunks).total : args.in.sequences;
  const int64_t grid = parts * args.in.value_heads * tiles;
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const auto ctas = static_cast<unsigned>(grid);
  if (args.ready != nullptr) {
    return launch_dependent(kernel, ctas, Traits::kThreads, kShared, stream, maps, args,
                            static_cast<int>(tiles));
  }
  kernel<<<ctas, Traits::kThreads, kShared, stream>>>(maps, args, static_cast<int>(tiles));
  return cudaGetLastError();
}

template <class Tag, int kKeyDim, bool kChannelGate>
int state_pass_sm90<Tag, kKeyDim, kChannelGate>::run(const StatePassArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  if constexpr (!kChannelGate) {
    if (args.o != nullptr && args.scratch.P == nullptr) {
      using Traits = StatePassTraits<Tag, kKeyDim, kChannelGate, true, true>;
      return launch_state_pass<Traits>(args, kBf16, stream);
    }
  }
  if constexpr (kKeyDim == 128) {
    if (args.o != nullptr && args.states != nullptr) {
      using Traits = StatePassTraits<Tag, kKeyDim, kChannelGate, true, false, true>;
      return launch_state_pass<Traits>(args, kBf16, stream);
    }
  }
  if (args.o != nullptr) {
    return launch_state_pass<StatePassTraits<Tag, kKeyDim, kChannelGate, true>>(args, kBf16, stream);
  }
  return launch_state_pass<StatePassTraits<Tag, kKeyDim, kChannelGate, false>>(args, kBf16, stream);
}

}  // namespace nearfield::delta
