// What the Hopper kernels of the family share: element types, shared-memory atoms, storage helpers.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/bfloat16.h>
#include <cutlass/float8.h>
#include <cutlass/half.h>

#include <cute/tensor.hpp>
#include <limits>

#include "gna/box_mask.cuh"
#include "gna/copy_sm90.cuh"
#include "gna/sm90.h"
#include "gna/tiles.h"
#include "gna/work.cuh"
#include "nearfield/mma.cuh"
#include "nearfield/pipeline.cuh"
#include "nearfield/shared_memory.cuh"
#include "nearfield/softmax.cuh"

namespace nearfield::gna {
using namespace cute;

template <class Tag, int kHeadDim>
struct HeadTraits {
  using Element =
      std::conditional_t<std::is_same_v<Tag, e4m3>, cutlass::float_e4m3_t,
                         std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t, cutlass::half_t>>;
  // Shared memory as the copy engine writes it: chunks of 128 (64) bytes of features, rows, features.
  using AtomK = std::conditional_t<kHeadDim * sizeof(Element) == 64, GMMA::Layout_K_SW64_Atom<Element>,
                                   GMMA::Layout_K_SW128_Atom<Element>>;
  using AtomMN = std::conditional_t<kHeadDim == 32, GMMA::Layout_MN_SW64_Atom<Element>,
                                    GMMA::Layout_MN_SW128_Atom<Element>>;
};

// A CTA hands registers over only among its own warpgroups, out of what it got at launch: 65536 / threads, in
// steps of 8. Asking for one register more than that waits forever.
constexpr bool registers_fit(int producer, int consumer, int consumers) {
  const int groups = consumers + 1, at_launch = 65536 / (groups * 128) / 8 * 8;
  return producer + consumers * consumer <= groups * at_launch;
}

// Swizzled buffers need 1024-byte alignment. The declaration asks for it; taking the address as it is keeps
// it a constant, so that no register holds what follows from it.
constexpr int kStorageAlignment = 1024;
extern __shared__ __align__(kStorageAlignment) char dynamic_shared[];

template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  return *reinterpret_cast<Storage*>(dynamic_shared);
}

// Rows of a block that its box does not fill are never written by the copy engine; they must not hold NaN.
__device__ __forceinline__ void fill_zero(void* begin, int bytes, int num_threads) {
  uint4* words = static_cast<uint4*>(begin);
  for (int i = threadIdx.x; i < bytes / 16; i += num_threads) words[i] = uint4{0, 0, 0, 0};
  cutlass::arch::fence_view_async_shared();
}

}  // namespace nearfield::gna
