// A ring of buffers in shared memory that one warp fills with cp.async and others read, on every GPU since
// Ampere. (Hopper's own pipeline counts bytes of the copy engine: pipeline.cuh.)
#pragma once

#include <cute/arch/util.hpp>

#include <cstdint>

namespace nearfield {

// Counts arrivals; each full count ends a phase.
struct ArrivalBarrier {
  uint64_t state;

  __device__ __forceinline__ uint32_t address() const {
    return cute::cast_smem_ptr_to_uint(const_cast<uint64_t*>(&state));
  }
  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(count));
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(address()) : "memory");
  }
  // Once all copies that this thread has started are in shared memory.
  __device__ __forceinline__ void arrive_when_copied() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
  }
  // Until the phase of this parity has ended.
  __device__ __forceinline__ void wait(uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred p;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"  // sleeps for a while instead of spinning
#else
          "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    } while (!done);
  }
};

struct StageBarriers {
  ArrivalBarrier full, empty;

  __device__ __forceinline__ void init(uint32_t reading_warps) {
    full.init(32);
    empty.init(reading_warps);
  }
};

// Walks over stages [first, first + count) of a ring. The filling warp and every reading warp have their own.
class RingCursor {
 public:
  __device__ __forceinline__ RingCursor(int first, int count)
      : first_(first), end_(first + count), at_(first) {}
  __device__ __forceinline__ int stage() const { return at_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++at_ == end_) at_ = first_, parity_ ^= 1;
  }

 private:
  int first_, end_, at_;
  uint32_t parity_ = 0;
};

}  // namespace nearfield
