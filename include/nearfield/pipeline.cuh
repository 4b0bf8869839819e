// Producer and consumer hand shared-memory stages to each other through pairs of barriers.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace nearfield {

// Position in a ring of kStages buffers. The phase flips each time the ring wraps.
template <int kStages>
struct RingIndex {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// One ring: `full` is completed by the arrival of bytes (or by the producer), `empty` by the consumer warps.
template <int kStages>
struct Ring {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  uint64_t full[kStages];
  uint64_t empty[kStages];

  __device__ __forceinline__ void init(int producers, int consumers) {
    for (int s = 0; s < kStages; ++s) {
      Barrier::init(&full[s], producers);
      Barrier::init(&empty[s], consumers);
    }
  }
  // Before another init, when nobody waits or arrives any more.
  __device__ __forceinline__ void invalidate() {
    for (int s = 0; s < kStages; ++s) {
      Barrier::invalidate(&full[s]);
      Barrier::invalidate(&empty[s]);
    }
  }
  // Producer: the stage may be overwritten. On a fresh ring this returns at once.
  __device__ __forceinline__ void wait_empty(RingIndex<kStages> at) {
    Barrier::wait(&empty[at.stage], at.phase ^ 1);
  }
  __device__ __forceinline__ void wait_full(RingIndex<kStages> at) {
    Barrier::wait(&full[at.stage], at.phase);
  }
  __device__ __forceinline__ void expect_bytes(RingIndex<kStages> at, uint32_t bytes) {
    Barrier::arrive_and_expect_tx(&full[at.stage], bytes);
  }
  __device__ __forceinline__ void arrive_full(RingIndex<kStages> at) { Barrier::arrive(&full[at.stage]); }
  // Consumer: one arrival per warp.
  __device__ __forceinline__ void release(RingIndex<kStages> at) {
    if (threadIdx.x % 32 == 0) Barrier::arrive(&empty[at.stage]);
  }
};

}  // namespace nearfield
