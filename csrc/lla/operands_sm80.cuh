// Writes the operands of the Hopper kernels: the largest value of each head, then fp16 tiles over a power of
// two.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "lla/operand_layout.cuh"

namespace nearfield::lla {

template <class Tag>
using source_t = std::conditional_t<std::is_same_v<Tag, bf16>, __nv_bfloat16,
                                    std::conditional_t<std::is_same_v<Tag, fp16>, __half, float>>;

__device__ __forceinline__ bool sees_one(const OperandSource& s, int row) {
  return s.grid.given() ? s.grid.reach(row, false).count() == 1 : s.visible.lone(row);
}

// Eight features of a row from `column` on; what lies beyond is zero.
template <class T>
__device__ __forceinline__ void load_piece(const OperandSource& s, int b, int row, int h, int column,
                                           float (&out)[8]) {
  const T* at =
      static_cast<const T*>(s.data) + b * s.batch_stride + row * s.row_stride + h * s.head_stride + column;
  const bool inside =
      row < s.rows && (s.end == nullptr || row < *s.end) && !(s.blank_lone_rows && sees_one(s, row));
  if (inside && column + 8 <= s.features && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    constexpr int kWords = sizeof(T) / 2;
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(at)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(reinterpret_cast<const T*>(words)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = inside && column + i < s.features ? static_cast<float>(at[i]) : 0.f;
  }
}

constexpr int kLargestRows = 128;  // rows of a block of find_largest

// Grid: (rows / kLargestRows, B * heads, tensors), the largest of each.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) find_largest(const __grid_constant__ OperandsArgs args) {
  const OperandSource& s = args.source[blockIdx.z];
  const int first = blockIdx.x * kLargestRows, bh = blockIdx.y;
  if (first >= s.rows || bh >= args.batch * s.heads) return;
  constexpr int kPieces = kHeadDim / 8;
  float largest = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < kLargestRows * kPieces; i += 256) {
    float v[8];
    load_piece<T>(s, bh / s.heads, first + i / kPieces, bh % s.heads, i % kPieces * 8, v);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      largest = fmaxf(largest, fabsf(v[e]));  // NaN drops out here, not from the tiles
  }
  for (int o = 16; o > 0; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
  // Non-negative floats are ordered as integers.
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(s.out.largest) + bh, __float_as_int(largest));
}

// Grid: (tiles, B * heads, tensors), the largest of each.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) write_tiles(const __grid_constant__ OperandsArgs args) {
  const OperandSource& s = args.source[blockIdx.z];
  const int tile = blockIdx.x, bh = blockIdx.y;
  if (tile >= s.out.tiles_per_head || bh >= args.batch * s.heads) return;
  constexpr int kPieces = kHeadDim / 8;
  const float inverse = 1.f / operand_unit(s.out, bh);
  __half* out = static_cast<__half*>(s.out.tiles) +
                (static_cast<int64_t>(bh) * s.out.tiles_per_head + tile) * tile_elements(kHeadDim);
#pragma unroll
  for (int n = 0; n < kTileRows * kPieces / 256; ++n) {
    const int i = n * 256 + threadIdx.x, row = i / kPieces, column = i % kPieces * 8;
    float v[8];
    load_piece<T>(s, bh / s.heads, tile * kTileRows + row, bh % s.heads, column, v);
    __align__(16) __half2 packed[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) packed[e] = __floats2half2_rn(v[2 * e] * inverse, v[2 * e + 1] * inverse);
    *reinterpret_cast<uint4*>(out + tile_offset<kHeadDim>(row, column)) =
        *reinterpret_cast<const uint4*>(packed);
  }
}

inline cudaError_t clear_maxima(const OperandsArgs& args, cudaStream_t stream) {
  return args.clear ? cudaMemsetAsync(args.clear, 0, sizeof(float) * args.clear_count, stream) : cudaSuccess;
}

template <class T, int kHeadDim>
cudaError_t write_operands(const OperandsArgs& args, cudaStream_t stream) {
  int rows = 0, tiles = 0, heads = 0;
  for (int i = 0; i < args.count; ++i) {
    const OperandSource& s = args.source[i];
    rows = std::max(rows, s.rows);
    tiles = std::max(tiles, s.out.tiles_per_head);
    heads = std::max(heads, s.heads);
  }
  if (const cudaError_t e = clear_maxima(args, stream); e != cudaSuccess) return e;
  const auto y = static_cast<unsigned>(args.batch * heads), z = static_cast<unsigned>(args.count);
  const auto x = static_cast<unsigned>((rows + kLargestRows - 1) / kLargestRows);
  find_largest<T, kHeadDim><<<dim3(x, y, z), 256, 0, stream>>>(args);
  write_tiles<T, kHeadDim><<<dim3(static_cast<unsigned>(tiles), y, z), 256, 0, stream>>>(args);
  return cudaGetLastError();
}

template <class Element>
int operands_sm80<Element>::run(const OperandsArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  using T = source_t<Element>;
  switch (args.head_dim) {
    case 64:
      return write_operands<T, 64>(args, stream);
    case 128:
      return write_operands<T, 128>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nearfield::lla
