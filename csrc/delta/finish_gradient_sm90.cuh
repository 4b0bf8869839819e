// The last sums of the backward, in a fixed order: dq and dk over the value heads of a group, with the way
// back through the L2 norm; dA_log and ddt_bias over the chunks.
#pragma once

#include "delta/chunk_sm90.cuh"
#include "delta/sm90_bwd.h"

namespace nearfield::delta {

constexpr int kFinishThreads = 256;

// One warp per row [K] of dq (blockIdx.y = 0) or dk; a lane has every 32nd pair of features.
template <class Element>
__global__ void __launch_bounds__(kFinishThreads)
    sum_heads_kernel(const __grid_constant__ FinishGradientArgs args) {
  const InputsSm90& in = args.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kFinishThreads / 32) + threadIdx.x / 32;
  const int64_t token = row / in.heads, head = row % in.heads;
  const int64_t tokens =
      in.cu_seqlens != nullptr ? min(in.cu_seqlens[in.sequences], in.tokens) : in.batch * in.tokens;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  const bool is_k = blockIdx.y == 1;
  const int64_t group = in.value_heads / in.heads, K = in.key_dim;
  const float* parts = (is_k ? args.dk_heads : args.dq_heads) + (token * in.value_heads + head * group) * K;
  const Rows<void>& x = is_k ? in.k : in.q;
  const auto* raw =
      reinterpret_cast<const uint32_t*>(static_cast<const Element*>(x.data) + token / in.tokens * x.batch +
                                        token % in.tokens * x.token + head * x.head);
  auto* out = reinterpret_cast<uint32_t*>(static_cast<Element*>(is_k ? args.dk : args.dq) + row * K);
  constexpr int kPairs = 4;  // K <= 256
  float2 z[kPairs], y[kPairs];
  float along = 0.f, square = 0.f;
  CUTE_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    const int pair = lane + 32 * p;
    z[p] = y[p] = {0.f, 0.f};
    if (2 * pair >= K) continue;
    for (int64_t r = 0; r < group; ++r) {
      const float2 part = *reinterpret_cast<const float2*>(parts + r * K + 2 * pair);
      z[p].x += part.x;
      z[p].y += part.y;
    }
    y[p] = unpack<Element>(raw[pair]);
    along += z[p].x * y[p].x + z[p].y * y[p].y;
    square += y[p].x * y[p].x + y[p].y * y[p].y;
  }
  float factor = 0.f;
  if (in.qk_l2norm) {  // dx = z - x rstd^2 (x . z), where z = rstd dy
    CUTE_UNROLL
    for (int step = 16; step >= 1; step /= 2) {
      along += __shfl_xor_sync(0xffffffffu, along, step);
      square += __shfl_xor_sync(0xffffffffu, square, step);
    }
    factor = along / (square + static_cast<float>(kNormEps));
  }
  CUTE_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    const int pair = lane + 32 * p;
    if (2 * pair < K) out[pair] = pack<Element>(z[p].x - factor * y[p].x, z[p].y - factor * y[p].y);
  }
}

// out[column] = sum over rows of parts [rows][columns]. A CTA has 32 columns; each of its warps every 32nd
// row.
static __global__ void __launch_bounds__(1024)
    sum_parts_kernel(const float* parts, int64_t rows, int64_t columns, float* out) {
  __shared__ double sums[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0.0;
  if (column < columns)
    for (int64_t row = warp; row < rows; row += 32) sum += parts[row * columns + column];
  sums[lane][warp] = sum;
  __syncthreads();
  sum = sums[warp][lane];
  for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + warp;
  if (lane == 0 && mine < columns) out[mine] = static_cast<float>(sum);
}

template <class Tag>
int finish_gradient_sm90<Tag>::run(const FinishGradientArgs& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const InputsSm90& in = args.in;
  if (args.dq_heads != nullptr) {
    const int64_t rows = in.batch * in.tokens * in.heads, per_block = kFinishThreads / 32;
    const dim3 grid(static_cast<unsigned>((rows + per_block - 1) / per_block), 2);
    sum_heads_kernel<element_t<Tag>><<<grid, kFinishThreads, 0, stream>>>(args);
  }
  const auto sum_parts = [&](const float* parts, int64_t per_slot, int64_t columns, float* out) {
    if (out == nullptr) return;
    sum_parts_kernel<<<static_cast<unsigned>((columns + 31) / 32), 1024, 0, stream>>>(
        parts, ChunkSlots(in).total * per_slot, columns, out);
  };
  sum_parts(args.rate_parts, rate_parts_of(in.channel_gate), in.value_heads, args.dA_log);
  sum_parts(args.bias_parts, bias_parts_of(in.channel_gate), in.value_heads * in.gate_dim(), args.ddt_bias);
  return cudaGetLastError();
}

}  // namespace nearfield::delta
