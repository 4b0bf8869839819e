// The memory-bound ends of the backward: row statistics and zeros before the gradients, rounding of dQ after
// them. The gradients' kernel goes through the heads upwards. Zeros are written downwards, so that its first
// heads are in the L2 cache when it begins, and dQ is rounded downwards, as its last ones still are.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <algorithm>

#include "gna/sm90.h"
#include "gna/tiles.h"

namespace nearfield::gna {

template <class Tag>
using end_element_t =
    std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t,
                       std::conditional_t<std::is_same_v<Tag, fp16>, cutlass::half_t, float>>;

constexpr int kEndThreads = 256;
template <class Element>
constexpr int kFeaturesOf16Bytes = 16 / sizeof(Element);

// Eight threads a row, 16 bytes a load, or element by element where rows do not begin on 16 bytes.
template <class Element>
__global__ void prepare_kernel(const Element* dout, const Element* out, const float* lse, const float* dlse,
                               RowStats* stats, int64_t rows, int dim_v, bool aligned) {
  constexpr int kThreadsPerRow = 8, kPiece = kFeaturesOf16Bytes<Element>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kEndThreads + threadIdx.x) / kThreadsPerRow;
  if (row >= rows) return;
  float sum = 0.f;
  const int column = threadIdx.x % kThreadsPerRow;
  if (!aligned) {
    for (int c = column; c < dim_v; c += kThreadsPerRow) {
      sum += static_cast<float>(dout[row * dim_v + c]) * static_cast<float>(out[row * dim_v + c]);
    }
  }
  for (int c = column * kPiece; aligned && c < dim_v; c += kThreadsPerRow * kPiece) {
    const auto a = *reinterpret_cast<const cutlass::AlignedArray<Element, kPiece>*>(dout + row * dim_v + c);
    const auto b = *reinterpret_cast<const cutlass::AlignedArray<Element, kPiece>*>(out + row * dim_v + c);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  }
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kThreadsPerRow * kThreadsPerRow);
#pragma unroll
  for (int step = kThreadsPerRow / 2; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  if (threadIdx.x % kThreadsPerRow == 0) {
    constexpr float kLog2e = 1.44269504088896341f;
    stats[row] = {lse[row] * kLog2e, sum - (dlse != nullptr ? dlse[row] : 0.f)};
  }
}

constexpr int kClearedByThread = 4;  // times 16 bytes
inline __global__ void clear_kernel(uint4* buffer, int64_t pieces) {
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t first = block * (kEndThreads * kClearedByThread) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kClearedByThread; ++i) {
    const int64_t at = first + i * kEndThreads;
    if (at < pieces) buffer[at] = uint4{0, 0, 0, 0};
  }
}

// One thread per piece of a row of dq: eight features, the even ones first in the buffer.
constexpr int kPiece = 8;
template <class Element>
__global__ void finish_kernel(const __grid_constant__ Problem p, const __grid_constant__ DqBuffer from,
                              float scale, const float* buffer, const __grid_constant__ Tokens<void> dq,
                              bool accumulate) {
  const int pieces = static_cast<int>(p.dim) / kPiece;
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  int64_t rest = block * kEndThreads + threadIdx.x;
  const int piece = static_cast<int>(rest % pieces);
  rest /= pieces;
  int64_t to = 0;
  int index[3], group = 0, step = 1;
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int x = static_cast<int>(rest % p.size[d]);
    rest /= p.size[d];
    to += x * dq.x[d];
    index[d] = x / p.dilation[d];
    group += x % p.dilation[d] * step;
    step *= p.dilation[d];
  }
  if (rest >= p.batch * p.heads) return;
  to += rest / p.heads * dq.batch + rest % p.heads * dq.head;
  int64_t at = rest * step + group;
#pragma unroll
  for (int d = 0; d < 3; ++d) at = at * from.size[d] + index[d];
  at = at * p.dim + piece * kPiece;
  const auto value = *reinterpret_cast<const cutlass::AlignedArray<float, kPiece, 16>*>(buffer + at);
  auto* target = reinterpret_cast<cutlass::AlignedArray<Element, kPiece, 16>*>(
      static_cast<Element*>(dq.data) + to + piece * kPiece);
  cutlass::AlignedArray<Element, kPiece, 16> rounded;
  if (accumulate) rounded = *target;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const float sum = value[i / 2 + i % 2 * (kPiece / 2)] * scale;
    rounded[i] = static_cast<Element>(sum + (accumulate ? static_cast<float>(rounded[i]) : 0.f));
  }
  *target = rounded;
}

// Block (head, n): parts n, n + gridDim.y, .. of those of the head that bwd_sm90 has not taken.
template <class Element>
__global__ void finish_rest_kernel(int heads, int tokens, int dim, int rows, float scale, const float* buffer,
                                   const __grid_constant__ Tokens<void> dq, const int* taken) {
  const int head = blockIdx.x, parts = (tokens + rows - 1) / rows, pieces = dim / kPiece;
  Element* const target = static_cast<Element*>(dq.data) + head / heads * dq.batch + head % heads * dq.head;
  for (int part = taken[head] + static_cast<int>(blockIdx.y); part < parts; part += gridDim.y) {
    for (int i = threadIdx.x; i < rows * pieces; i += kEndThreads) {
      const int token = part * rows + i / pieces, at = i % pieces * kPiece;
      if (token >= tokens) break;
      const auto value = *reinterpret_cast<const cutlass::AlignedArray<float, kPiece, 16>*>(
          buffer + (int64_t{head} * tokens + token) * dim + at);
      cutlass::AlignedArray<Element, kPiece, 16> rounded;
#pragma unroll
      for (int n = 0; n < kPiece; ++n) {
        rounded[n] = static_cast<Element>(value[n / 2 + n % 2 * (kPiece / 2)] * scale);
      }
      *reinterpret_cast<cutlass::AlignedArray<Element, kPiece, 16>*>(target + token * dq.x[2] + at) = rounded;
    }
  }
}

inline unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kEndThreads - 1) / kEndThreads);
}

template <class Tag>
int bwd_ends_sm80<Tag>::prepare(const void* dout, const void* out, const float* lse, const float* dlse,
                                RowStats* stats, int64_t rows, int64_t dim_v, void* stream) {
  using Element = end_element_t<Tag>;
  const bool aligned = dim_v % kFeaturesOf16Bytes<Element> == 0 &&
                       reinterpret_cast<uintptr_t>(dout) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % 16 == 0;
  prepare_kernel<Element><<<blocks_for(rows * 8), kEndThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Element*>(dout), static_cast<const Element*>(out), lse, dlse, stats, rows,
      static_cast<int>(dim_v), aligned);
  return cudaGetLastError();
}

template <class Tag>
int bwd_ends_sm80<Tag>::clear(float* buffer, int64_t elements, void* stream) {
  const int64_t pieces = elements / 4;  // rows are a multiple of 16 bytes
  clear_kernel<<<blocks_for((pieces + kClearedByThread - 1) / kClearedByThread), kEndThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(reinterpret_cast<uint4*>(buffer), pieces);
  return cudaGetLastError();
}

template <class Tag>
int bwd_ends_sm80<Tag>::finish(const Problem& p, float scale, const float* buffer, const Tokens<void>& dq,
                               bool accumulate, void* stream) {
  const int64_t pieces = p.batch * p.tokens() * p.heads * (p.dim / kPiece);
  finish_kernel<end_element_t<Tag>>
      <<<blocks_for(pieces), kEndThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, DqBuffer(p), scale,
                                                                                  buffer, dq, accumulate);
  return cudaGetLastError();
}

template <class Tag>
int bwd_ends_sm80<Tag>::finish_rest(const Problem& p, int head_dim, float scale, const float* buffer,
                                    const Tokens<void>& dq, int* next_work, void* stream) {
  constexpr int64_t kBlocks = 4096;  // all together: most find nothing to do
  const DqCounters counters(p, true, next_work + 1);
  const int rows = rounded_rows(head_dim);
  const int64_t parts = (p.tokens() + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(counters.heads),
                  static_cast<unsigned>(std::clamp<int64_t>(kBlocks / counters.heads, 1, parts)));
  finish_rest_kernel<end_element_t<Tag>><<<grid, kEndThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<int>(p.heads), static_cast<int>(p.tokens()), static_cast<int>(p.dim), rows, scale, buffer,
      dq, counters.rounding(0));
  return cudaGetLastError();
}

}  // namespace nearfield::gna
