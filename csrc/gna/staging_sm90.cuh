// Accumulator registers on their way out through shared memory. Pieces of 16 bytes are permuted by the row
// (XOR), so that neither the writes of a quad nor the row-wise reads meet in one bank.
#pragma once

#include "gna/traits_sm90.cuh"
#include "nearfield/matrices.cuh"
#include "nearfield/pairs.cuh"

namespace nearfield::gna {

// The lane number, computed where it is asked for: the dozens of addresses that follow from it would
// otherwise be hoisted out of the loop over tiles and held in registers that the accumulators need.
__device__ __forceinline__ int fresh_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Where a warp of the consumers may stage 16 rows of kHeadDim elements over a block that lies in shared
// memory as the copy engine wrote it: inside the 64 rows of its own warpgroup, which in every chunk of
// features are contiguous. The other warpgroup may still be reading its rows.
template <int kHeadDim, int kBlockM>
__device__ __forceinline__ int staging_in_own_rows(int warp) {
  constexpr int kChunk = chunk_of(kHeadDim), kOwn = 64 * kChunk;  // elements of a warpgroup in a chunk
  static_assert(kOwn % (16 * kHeadDim) == 0, "a warp's rows must lie in one chunk");
  const int at = warp % 4 * 16 * kHeadDim;
  return at / kOwn * kBlockM * kChunk + warp / 4 * kOwn + at % kOwn;
}

// Writes a warp's 16 rows of a (2, kFeatures) accumulator view, whose columns begin at feature `first`, to
// `out`, where row r is at row[r] * dim; row[r] < 0: none. kEvenFirst: of every 16 columns the first eight
// are the even features, the others the odd ones (transpose_sm90.cuh).
template <int kFeatures, bool kEvenFirst = false, class Element, class TensorO, class Rows>
__device__ void store_rows(Element* staging, const TensorO& rO, const Rows& row, Element* out, int64_t dim,
                           int first = 0) {
  constexpr int kPieces = kFeatures / 8;  // of 16 bytes in a row
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  const int lane = fresh_lane();
  uint32_t* words = reinterpret_cast<uint32_t*>(staging);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int r = lane / 4 + 8 * i;
    CUTE_UNROLL
    for (int j = 0; j < kPieces; ++j) {
      // Even first: a thread's columns of pieces j and j + 1 are four neighboring features.
      const int a = kEvenFirst ? j / 2 * 4 + j % 2 : 2 * j, b = kEvenFirst ? a + 2 : a + 1;
      const int piece = kEvenFirst ? j / 2 * 2 + lane % 4 / 2 : j;
      const int word = kEvenFirst ? lane % 2 * 2 + j % 2 : lane % 4;
      words[(r * kPieces + (piece ^ (r & kMask))) * 4 + word] = pack<Element>(rO(i, a), rO(i, b));
    }
  }
  __syncwarp();
  CUTE_UNROLL
  for (int n = 0; n < 16 * kPieces / 32; ++n) {
    const int r = (n * 32 + lane) / kPieces, piece = (n * 32 + lane) % kPieces;
    const int64_t at = row[r];
    if (at >= 0 && first + piece * 8 < dim) {
      *reinterpret_cast<uint4*>(out + at * dim + first + piece * 8) =
          *reinterpret_cast<const uint4*>(words + (r * kPieces + (piece ^ (r & kMask))) * 4);
    }
  }
  __syncwarp();
}

// Rows of 128 bytes in the 128-byte swizzle: a lane's pieces of 16 bytes are permuted by its row (XOR).
// Buffers begin on 1024 bytes, so a piece further on is the first one's address with some of the bits 4 to 6
// flipped.
//
// Where a lane begins with a warp's 16 rows of a 16-bit (keys, queries) operand, from query `first` on.
template <class Element>
__device__ __forceinline__ uint32_t transposed_at(const Element* smem, int warp, int first) {
  const int lane = threadIdx.x % 32, row = warp * 16 + lane % 16;
  const int piece = (first / 8 + lane / 16) ^ (row & 7);
  return cute::cast_smem_ptr_to_uint(smem) + row * 128 + piece * 16;
}

// Writes a warp's 16 rows of a 16-bit (keys, kQueries) operand, held in accumulator order. With 64 queries in
// a row that is the layout of a left operand whose rows are the keys, and, read the other way, of one whose
// rows are the queries.
template <int kQueries, class TensorA>
__device__ __forceinline__ void store_transposed(uint32_t at, const TensorA& rA) {
  const uint32_t* words =
      reinterpret_cast<const uint32_t*>(rA.data());  // word 2 j + i: rows 8 i.., columns 8 j..
  at = opaque(at);
  CUTE_UNROLL
  for (int j = 0; j < kQueries / 8; j += 2) {
    store_matrices(at ^ j * 16, words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]);
  }
}

// Where a lane begins with a warp's 16 of kRows rows of floats, from column `column` on, in chunks of 32
// floats.
template <int kRows>
__device__ __forceinline__ uint32_t float_rows_at(const float* smem, int warp, int column) {
  const int lane = threadIdx.x % 32, row = warp * 16 + lane / 16 * 8 + lane % 8;
  const int piece = column / 8 % 4 * 2 ^ lane / 8 % 2 ^ row % 8;
  return cute::cast_smem_ptr_to_uint(smem) + (column / 32 * kRows + row) * 128 + piece * 16;
}

// Writes a warp's 16 of kRows rows of a float accumulator view. A thread holds pairs of columns; stored as
// matrices of 32-bit elements, the even columns of every eight come first, then the odd ones (DqBuffer): a
// quarter of the instructions that pairs would take, and no conflicts of banks.
template <int kRows, class TensorO>
__device__ __forceinline__ void store_float_rows(uint32_t at, const TensorO& rO) {
  const auto bits = [](float x) { return __float_as_uint(x); };
  at = opaque(at);
  CUTE_UNROLL
  for (int j = 0; j < size<1>(rO) / 2; ++j) {  // of eight columns
    store_matrices((at ^ j % 4 * 32) + j / 4 * kRows * 128, bits(rO(0, 2 * j)), bits(rO(0, 2 * j + 1)),
                   bits(rO(1, 2 * j)), bits(rO(1, 2 * j + 1)));
  }
}

}  // namespace nearfield::gna
