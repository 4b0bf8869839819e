// From what every span does to the state that enters it to the states themselves: S <- M S + N from span to
// span, in float32. Eight values of a state per CTA, since its columns are independent; the transitions of
// the next spans arrive while the last one is applied. Short beside the walks it replaces: 128 columns of
// multiply-adds per span instead of hundreds of chunks.
#pragma once

#include "delta/chunk_sm90.cuh"

namespace nearfield::delta {

template <int kKeyDim_>
struct ComposeTraits {
  static constexpr int kKeyDim = kKeyDim_, kValues = 8, kStages = 2;
  // A thread has two keys and four values.
  static constexpr int kThreads = kKeyDim / 2 * (kValues / 4);
  struct Storage {
    struct {
      alignas(128) float M[kKeyDim][kKeyDim];  // M^T: the contracted key first
      alignas(128) float N[kValues][kKeyDim];
    } stage[kStages];
    alignas(128) float S[kValues][kKeyDim];
    Ring<kStages> ring;  // `full` only: __syncthreads says that a stage is free
  };
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    compose_spans_kernel(const __grid_constant__ ComposeSpansArgs a) {
  constexpr int kKeyDim = Traits::kKeyDim, kValues = Traits::kValues, kStages = Traits::kStages;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = a.in;
  const int64_t values = (in.value_dim + kImageColumns - 1) / kImageColumns * kImageColumns;
  const int64_t groups = values / kValues, row = blockIdx.x / groups;
  const int64_t first_value = blockIdx.x % groups * kValues, head = row % in.value_heads;
  const int64_t n = row / in.value_heads, tokens = a.span_chunks * kRows;
  const Sequence sequence = sequence_of(in, n);
  const int64_t spans = (sequence.length + tokens - 1) / tokens, first = first_span(in, n, sequence, tokens);
  if (spans < 2) return;
  const auto transition = [&](int64_t span) {
    return a.transitions + ((first + span) * in.value_heads + head) * (values + kKeyDim) * kKeyDim;
  };
  const auto load = [&](int64_t span, int stage) {  // one thread
    const float* from = transition(span);
    auto& to = s.stage[stage];
    Ring<kStages>::Barrier::arrive_and_expect_tx(&s.ring.full[stage], sizeof(to.M) + sizeof(to.N));
    copy_in(to.M, from + values * kKeyDim, sizeof(to.M), &s.ring.full[stage]);
    copy_in(to.N, from + first_value * kKeyDim, sizeof(to.N), &s.ring.full[stage]);
  };
  const int thread = threadIdx.x, key = thread % (kKeyDim / 2) * 2, value = thread / (kKeyDim / 2) * 4;
  if (thread == 0) {
    s.ring.init(1, 1);
    cutlass::arch::fence_barrier_init();
    for (int i = 0; i < kStages; ++i)
      if (1 + i < spans - 1) load(1 + i, i);
  }
  float2 S[4];  // the state that enters `span`
  CUTE_UNROLL
  for (int v = 0; v < 4; ++v)
    S[v] = *reinterpret_cast<const float2*>(transition(0) + (first_value + value + v) * kKeyDim + key);
  RingIndex<kStages> at;
  for (int64_t span = 1;; ++span) {
    float* to = a.span_states + (((first + span) * in.value_heads + head) * values + first_value) * kKeyDim;
    CUTE_UNROLL
    for (int v = 0; v < 4; ++v) {
      *reinterpret_cast<float2*>(to + (value + v) * kKeyDim + key) = S[v];
      *reinterpret_cast<float2*>(&s.S[value + v][key]) = S[v];
    }
    if (span == spans - 1) break;
    __syncthreads();
    s.ring.wait_full(at);
    asm volatile("" ::: "memory");
    const auto& stage = s.stage[at.stage];
    CUTE_UNROLL
    for (int v = 0; v < 4; ++v) S[v] = *reinterpret_cast<const float2*>(&stage.N[value + v][key]);
#pragma unroll 4
    for (int c = 0; c < kKeyDim; c += 4) {
      float4 old[4];
      CUTE_UNROLL
      for (int v = 0; v < 4; ++v) old[v] = *reinterpret_cast<const float4*>(&s.S[value + v][c]);
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const float2 m = *reinterpret_cast<const float2*>(&stage.M[c + x][key]);
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) {
          const float o = x == 0 ? old[v].x : x == 1 ? old[v].y : x == 2 ? old[v].z : old[v].w;
          S[v].x += m.x * o;
          S[v].y += m.y * o;
        }
      }
    }
    __syncthreads();  // the stage and the old state are free
    if (thread == 0 && span + kStages < spans - 1) load(span + kStages, at.stage);
    at.advance();
  }
}

template <int kKeyDim>
int compose_spans_sm90<kKeyDim>::run(const ComposeSpansArgs& args, void* stream) {
  using Traits = ComposeTraits<kKeyDim>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = compose_spans_kernel<Traits>;
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  const int64_t tiles = (args.in.value_dim + kImageColumns - 1) / kImageColumns;
  const int64_t grid = args.in.sequences * args.in.value_heads * tiles * (kImageColumns / Traits::kValues);
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::delta
