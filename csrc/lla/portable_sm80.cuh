// The portable kernels of one element type and head dim, for instances.def; and the operands of float32
// tensors.
#pragma once

#include "lla/bwd_key_sm80.cuh"
#include "lla/bwd_query_sm80.cuh"
#include "lla/fwd_sm80.cuh"
#include "lla/operands_sm80.cuh"

namespace nearfield::lla {

// Grid: (tiles, B * heads, tensors), the largest of each.
template <int kHeadDim>
__global__ void __launch_bounds__(256) write_float_rows(const __grid_constant__ OperandsArgs args) {
  const OperandSource& s = args.source[blockIdx.z];
  const int tile = blockIdx.x, bh = blockIdx.y;
  if (tile >= s.out.tiles_per_head || bh >= args.batch * s.heads) return;
  constexpr int kPieces = kHeadDim / 8;
  const float inverse = 1.f / operand_unit(s.out, bh);
  float* out = static_cast<float*>(s.out.tiles) +
               (static_cast<int64_t>(bh) * s.out.tiles_per_head + tile) * tile_elements(kHeadDim);
  for (int i = threadIdx.x; i < kTileRows * kPieces; i += 256) {
    const int row = i / kPieces, column = i % kPieces * 8;
    float v[8];
    load_piece<float>(s, bh / s.heads, tile * kTileRows + row, bh % s.heads, column, v);
    float4* to = reinterpret_cast<float4*>(out + row * kHeadDim + column);
    to[0] = float4{v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse};
    to[1] = float4{v[4] * inverse, v[5] * inverse, v[6] * inverse, v[7] * inverse};
  }
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::operands(const OperandsArgs& args, void* stream_) {
  if constexpr (std::is_same_v<Tag, fp32>) {
    const auto stream = static_cast<cudaStream_t>(stream_);
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
    find_largest<float, kHeadDim><<<dim3(x, y, z), 256, 0, stream>>>(args);
    write_float_rows<kHeadDim><<<dim3(static_cast<unsigned>(tiles), y, z), 256, 0, stream>>>(args);
    return cudaGetLastError();
  } else {
    return cudaErrorInvalidValue;  // operands_sm80 writes those
  }
}

}  // namespace nearfield::lla
