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
#include "nearfield/dependent_launch.cuh"

namespace nearfield::gna {

template <class Tag>
using end_element_t =
    std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t,
                       std::conditional_t<std::is_same_v<Tag, fp16>, cutlass::half_t, float>>;

constexpr int kEndThreads = 256;
template <class Element>
constexpr int kFeaturesOf16Bytes = 16 / sizeof(Element);

constexpr int kThreadsPerRow = 8;

// Of 16 bytes of each.
template <class Element>
__device__ __forceinline__ void add_products(float& sum, const uint4& a, const uint4& b) {
  constexpr int kPiece = kFeaturesOf16Bytes<Element>;
  using Piece = cutlass::AlignedArray<Element, kPiece>;
  const auto &x = reinterpret_cast<const Piece&>(a), &y = reinterpret_cast<const Piece&>(b);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
}

// The share of a thread in the sum over a row of dO * O: 16 bytes a load, or element by element where rows do
// not begin on 16 bytes.
template <class Element>
__device__ __forceinline__ float share_of_delta(const Element* dout, const Element* out, int dim_v,
                                                int column, bool aligned) {
  constexpr int kPiece = kFeaturesOf16Bytes<Element>, kAtOnce = 2;  // rows of 256 bytes: all loads at once
  float sum = 0.f;
  if (!aligned) {
    for (int c = column; c < dim_v; c += kThreadsPerRow) {
      sum += static_cast<float>(dout[c]) * static_cast<float>(out[c]);
    }
    return sum;
  }
  for (int c = column * kPiece; c < dim_v; c += kAtOnce * kThreadsPerRow * kPiece) {
    uint4 a[kAtOnce] = {}, b[kAtOnce] = {};
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int at = c + n * kThreadsPerRow * kPiece;
      if (at < dim_v) {
        a[n] = __ldcs(reinterpret_cast<const uint4*>(dout + at));
        b[n] = __ldcs(reinterpret_cast<const uint4*>(out + at));
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) add_products<Element>(sum, a[n], b[n]);
  }
  return sum;
}

// Of the eight neighboring lanes that share a row.
__device__ __forceinline__ float sum_of_row(float share) {
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kThreadsPerRow * kThreadsPerRow);
#pragma unroll
  for (int step = kThreadsPerRow / 2; step > 0; step /= 2) share += __shfl_xor_sync(mask, share, step);
  return share;
}

__device__ __forceinline__ RowStats stats_of(float lse, float delta) {
  constexpr float kLog2e = 1.44269504088896341f;
  return {lse * kLog2e, delta};
}

// Registers are bounded by the threads that a multiprocessor can hold.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kPrepareCtas = 1536 / kEndThreads;
#else
constexpr int kPrepareCtas = 2048 / kEndThreads;
#endif

// Rows are those of the first `heads` heads; with all of them, and stats in their order, they follow each
// other.
template <class Element>
__global__ void __launch_bounds__(kEndThreads, kPrepareCtas)
    prepare_kernel(const __grid_constant__ StatsArgs a, int64_t rows, int heads, bool aligned) {
  let_kernel_after_begin();
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kEndThreads + threadIdx.x) / kThreadsPerRow;
  if (n >= rows) return;
  const int column = threadIdx.x % kThreadsPerRow;
  int64_t row = n, to = n;
  if (a.by_head) {
    const unsigned at = static_cast<unsigned>(n), tokens = static_cast<unsigned>(a.tokens);
    const unsigned line = at / heads, head = at - line * heads, batch = line / tokens;
    row = int64_t{line} * a.heads + head;
    to = (batch * a.heads + head) * stats_of_head(a.tokens) + (line - batch * tokens);
  }
  float lse = 0.f, dlse = 0.f;
  if (column == 0) {
    lse = a.lse[row];
    if (a.dlse != nullptr) dlse = a.dlse[row];
  }
  const auto* const dout = static_cast<const Element*>(a.dout) + row * a.dim_v;
  const auto* const out = static_cast<const Element*>(a.out) + row * a.dim_v;
  const float sum = sum_of_row(share_of_delta(dout, out, static_cast<int>(a.dim_v), column, aligned));
  if (column == 0) a.stats[to] = stats_of(lse, sum - dlse);
}

// A multiprocessor reads fast where it has enough loads in flight, so few of them are enough while the others
// multiply. More than half of the registers: one CTA on each. A thread has kPieces of 16 bytes of each of
// kRows rows.
constexpr int kRestThreads = 1024;
template <class Element, int kPieces, int kRows>
__global__ void __launch_bounds__(kRestThreads, 1)
    prepare_rest_kernel(const __grid_constant__ StatsArgs a, int first_unit,
                        const __grid_constant__ DqCounters counters) {
  wait_for_kernel_before();
  let_kernel_after_begin();
  constexpr int kFeatures = kFeaturesOf16Bytes<Element>, kBesides = kRestThreads / kThreadsPerRow;
  const int column = threadIdx.x % kThreadsPerRow, own = threadIdx.x / kThreadsPerRow;
  const int tokens = static_cast<int>(a.tokens), heads = static_cast<int>(a.heads);
  const int heads_kv = static_cast<int>(a.heads_kv), group = heads / heads_kv;
  const int dim_v = static_cast<int>(a.dim_v);
  for (int unit = first_unit; unit < counters.units; ++unit) {
    const int batch = unit / heads_kv;
    for (int i = 0; i < group; ++i) {
      const int head = (unit - batch * heads_kv) * group + i;
      const int64_t rows_at = int64_t{batch} * tokens * heads + head;
      RowStats* const to = a.stats + (int64_t{batch} * heads + head) * stats_of_head(a.tokens);
      for (int first = blockIdx.x * (kRows * kBesides) + own; first - own < tokens;
           first += gridDim.x * (kRows * kBesides)) {
        uint4 dout[kRows][kPieces], out[kRows][kPieces];
        float lse[kRows], dlse[kRows];
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          const int token = first + n * kBesides;
          const int64_t row = rows_at + int64_t{token} * heads;
          lse[n] = column == 0 && token < tokens ? a.lse[row] : 0.f;
          dlse[n] = column == 0 && token < tokens && a.dlse != nullptr ? a.dlse[row] : 0.f;
#pragma unroll
          for (int c = 0; c < kPieces; ++c) {
            const int feature = (column + c * kThreadsPerRow) * kFeatures;
            const bool there = token < tokens && feature < dim_v;
            const int64_t at = row * dim_v + feature;
            dout[n][c] = out[n][c] = uint4{};
            if (there) {
              dout[n][c] = __ldcs(reinterpret_cast<const uint4*>(static_cast<const Element*>(a.dout) + at));
              out[n][c] = __ldcs(reinterpret_cast<const uint4*>(static_cast<const Element*>(a.out) + at));
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          float sum = 0.f;
#pragma unroll
          for (int c = 0; c < kPieces; ++c) add_products<Element>(sum, dout[n][c], out[n][c]);
          sum = sum_of_row(sum);
          const int token = first + n * kBesides;
          if (column == 0 && token < tokens) to[token] = stats_of(lse[n], sum - dlse[n]);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counters.stats(unit), 1);
    }
  }
}

constexpr int kClearedByThread = 4;  // times 16 bytes
inline __global__ void clear_kernel(uint4* buffer, int64_t pieces, int* counters, int num_counters) {
  let_kernel_after_begin();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < num_counters; i += kEndThreads) counters[i] = 0;
  }
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t first = block * (kEndThreads * kClearedByThread) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kClearedByThread; ++i) {
    const int64_t at = first + i * kEndThreads;
    if (at < pieces) buffer[at] = uint4{0, 0, 0, 0};
  }
  wait_for_kernel_before();  // for who waits for this one
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
  wait_for_kernel_before();
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

template <class Element>
bool begin_on_16_bytes(const StatsArgs& a) {
  return a.dim_v % kFeaturesOf16Bytes<Element> == 0 && reinterpret_cast<uintptr_t>(a.dout) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
}

template <class Tag>
int bwd_ends_sm80<Tag>::prepare(const StatsArgs& a, int64_t units, void* stream) {
  using Element = end_element_t<Tag>;
  // Of the first batch entry, or of whole ones.
  const int64_t batches = std::max<int64_t>(1, (units + a.heads_kv - 1) / a.heads_kv);
  const int64_t heads = batches > 1 ? a.heads : units * (a.heads / a.heads_kv),
                rows = batches * a.tokens * heads;
  prepare_kernel<Element>
      <<<blocks_for(rows * kThreadsPerRow), kEndThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          a, rows, static_cast<int>(heads), begin_on_16_bytes<Element>(a));
  return cudaGetLastError();
}

template <class Tag>
int bwd_ends_sm80<Tag>::prepare_rest(const StatsArgs& a, int64_t first_unit, const DqCounters& counters,
                                     int ctas, void* stream) {
  if constexpr (std::is_same_v<Tag, fp32>) {
    return cudaErrorInvalidValue;  // not on Hopper's own kernels
  } else {
    using Element = end_element_t<Tag>;
    const auto kernel = a.dim_v <= 64    ? prepare_rest_kernel<Element, 1, 4>
                        : a.dim_v <= 128 ? prepare_rest_kernel<Element, 2, 2>
                                         : prepare_rest_kernel<Element, 4, 1>;
    return launch_dependent(kernel, ctas, kRestThreads, 0, static_cast<cudaStream_t>(stream), a,
                            static_cast<int>(first_unit), counters);
  }
}

template <class Tag>
int bwd_ends_sm80<Tag>::clear(float* buffer, int64_t elements, int* counters, int64_t num_counters,
                              void* stream) {
  const int64_t pieces = elements / 4;  // rows are a multiple of 16 bytes
  const unsigned blocks = blocks_for((pieces + kClearedByThread - 1) / kClearedByThread);
  return launch_dependent(clear_kernel, blocks, kEndThreads, 0, static_cast<cudaStream_t>(stream),
                          reinterpret_cast<uint4*>(buffer), pieces, counters, static_cast<int>(num_counters));
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
  return launch_dependent(
      finish_rest_kernel<end_element_t<Tag>>, grid, kEndThreads, 0, static_cast<cudaStream_t>(stream),
      static_cast<int>(p.heads), static_cast<int>(p.tokens()), static_cast<int>(p.dim), rows, scale,
      static_cast<const float*>(buffer), dq, static_cast<const int*>(counters.rounding(0)));
}

}  // namespace nearfield::gna
