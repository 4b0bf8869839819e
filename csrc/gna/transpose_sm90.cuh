// 8-bit values. The tensor cores take 8-bit operands with the dimension of the sum contiguous only, so V of a
// tile, (keys, features), becomes (features, keys) on its way from the copy engine to the consumers. Matrices
// of 8 x 8 pairs of features are loaded transposed, so that a thread holds two keys of two features; with
// those of the next eight keys, bytes are sorted by feature, and the two halves stored as matrices of 8
// features x 16 keys each. Neither step crosses lanes, and two orders follow:
//   of 16 keys      0 1 8 9 2 3 10 11 .., which is the order of accumulator_as_8bit_a: P needs no shuffles;
//   of 16 features  the even ones, then the odd ones: store_rows puts the output right.
#pragma once

#include "gna/plan_sm90.cuh"
#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

// Behind the kernel's own storage.
template <class Element, int kHeadDim, int kKeys, int kStages>
struct TransposedValues {
  alignas(1024) Element v[kStages * kHeadDim * kKeys];
  Ring<kStages> ring_v;
};

template <class Traits>
__device__ __forceinline__ typename Traits::Transposed& transposed_values() {
  return *reinterpret_cast<typename Traits::Transposed*>(dynamic_shared + sizeof(typename Traits::Storage));
}

// 16 bytes of a row of a block as the copy engine wrote it, one swizzle span of 64 or 128 bytes a row.
template <int kHeadDim, class Element>
__device__ __forceinline__ const cute::uint128_t* piece_8bit(const Element* block, int row, int piece) {
  const int swizzle = row * kHeadDim / 128 % (kHeadDim / 16);
  return reinterpret_cast<const cute::uint128_t*>(block) + row * (kHeadDim / 16) + (piece ^ swizzle);
}

// One warp's share of a tile: of the pieces of 32 keys x 16 features, every kWarps-th. Those of the same keys
// are loaded together, so that their loads overlap.
template <int kHeadDim, int kKeys, int kWarps, class Element>
__device__ __forceinline__ void transpose_tile(const Element* v, Element* vt, int warp, int lane) {
  constexpr int kPieces = kHeadDim / 16 / kWarps;
  static_assert(kKeys == 128, "a feature is one swizzle span");
  const int row = lane / 8 % 2 * 8 + lane % 8, half = lane / 16;  // of the lane's 16 bytes when it stores
  CUTE_UNROLL
  for (int keys = 0; keys < kKeys / 32; ++keys) {
    uint32_t r[kPieces][4];  // keys 8 i + 2 (lane % 4) + {0, 1}, features 2 (lane / 4) + {0, 1}
    CUTE_UNROLL
    for (int n = 0; n < kPieces; ++n) {
      cute::SM75_U16x8_LDSM_T::copy(*piece_8bit<kHeadDim>(v, keys * 32 + lane, n * kWarps + warp), r[n][0],
                                    r[n][1], r[n][2], r[n][3]);
    }
    CUTE_UNROLL
    for (int n = 0; n < kPieces; ++n) {
      Element* at = vt + ((n * kWarps + warp) * 16 + row) * kKeys + ((2 * keys + half) ^ (row % 8)) * 16;
      cute::SM90_U32x4_STSM_N::copy(
          __byte_perm(r[n][0], r[n][1], 0x6420), __byte_perm(r[n][0], r[n][1], 0x7531),
          __byte_perm(r[n][2], r[n][3], 0x6420), __byte_perm(r[n][2], r[n][3], 0x7531),
          *reinterpret_cast<cute::uint128_t*>(at));
    }
  }
}

template <class Traits>
__device__ void transpose_values(typename Traits::Storage& s) {
  constexpr int kTile = Traits::kHeadDim * Traits::kBlockN;
  auto& transposed = transposed_values<Traits>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - (4 - Traits::kTransposers);
  RingIndex<Traits::kStages> at;
  follow_plan(s, [&](const StayingTile& tile) {
    const int num_tiles = tile.num_visits();
    for (int n = 0; n < num_tiles; ++n) {
      s.ring_v.wait_full(at);
      transposed.ring_v.wait_empty(at);
      transpose_tile<Traits::kHeadDim, Traits::kBlockN, Traits::kTransposers>(
          s.v + at.stage * kTile, transposed.v + at.stage * kTile, warp, lane);
      cutlass::arch::fence_view_async_shared();  // the tensor cores read through the async proxy
      __syncwarp();
      s.ring_v.release(at);
      if (lane == 0) transposed.ring_v.arrive_full(at);
      at.advance();
    }
  });
}

}  // namespace nearfield::gna
