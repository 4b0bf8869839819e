// Splits that are no cluster: each leaves its sums in scratch memory, and a second kernel adds them up. And
// how the kernels are launched.
#pragma once

#include "lla/step_answer.cuh"

namespace nearfield::lla {

// What a split leaves for merge_kernel, with everything in units of the inputs. c, key_sum and value_sum are
// in shared memory.
template <int kD, int kDv>
__device__ __forceinline__ void record_split(const StepArgs& args, float top, float l, const float* c,
                                             const float* key_sum, const float* value_sum,
                                             Sums<kD, kDv>& sums) {
  using Record = Moments<kD, kDv>;
  using S = Sums<kD, kDv>;
  float* record = args.moments + blockIdx.x * static_cast<int64_t>(Record::kFloats);
  if (threadIdx.x == 0) record[Record::kTop] = top, record[Record::kSum] = l;
  const int at = threadIdx.x;
  if (at < kD) record[Record::kC + at] = c[at], record[Record::kKey + at] = key_sum[at];
  if (at < kDv) record[Record::kValue + at] = value_sum[at];
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const auto put = [&](int first, const float (&x)[4]) {
      *reinterpret_cast<float2*>(record + first) = {x[e], x[e + 1]};
    };
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) put(Record::kKeyKey + S::row(e) * kD + S::column(n, 0), sums.key_key(n));
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n)
      put(Record::kKeyValue + S::row(e) * kDv + S::column(n, 0), sums.key_value(n));
  }
}

// Adds up the splits of a query, moved to the reference of the one with the highest score. Few blocks, each
// waiting for memory: so several groups of threads take splits in turn, and the first adds up and solves.
template <int kD, int kDv>
constexpr int kMergeGroups = kD + kDv <= 128 ? 4
                             : kD < 128      ? 2
                                             : 1;  // as many as the registers suffice for

template <int kD, int kDv>
struct MergeStorage {
  static constexpr int kSmall = 2 * kD + kDv, kFloats = 4 * (kD / 8 + kDv / 8);  // of a thread
  union {
    float small[kMaxSplits][kSmall];  // delta, sum w k', sum w v
    System<kD> system;
  };
  float others[std::max(kMergeGroups<kD, kDv> - 1, 1)][kFloats][kStepThreads<kD>];
};

template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(kMergeGroups<kD, kDv>* kStepThreads<kD>)
    merge_kernel(const __grid_constant__ StepArgs args) {
  using Record = Moments<kD, kDv>;
  using E = StepElement<Tag>;
  using S = Sums<kD, kDv>;
  using Storage = MergeStorage<kD, kDv>;
  constexpr int kThreads = kStepThreads<kD>, kGroups = kMergeGroups<kD, kDv>, kSmall = Storage::kSmall;
  extern __shared__ __align__(16) unsigned char storage[];
  auto& shared = *reinterpret_cast<Storage*>(storage);
  const int thread = threadIdx.x % kThreads, turn = threadIdx.x / kThreads;
  __shared__ float sC[kD];
  __shared__ __align__(8) float sKeySum[kD];
  __shared__ float sValueSum[kDv];
  __shared__ StepQuery<kD> sQuery;
  __shared__ float sTop[kMaxSplits], sSum[kMaxSplits], sFactor[kMaxSplits];
  const int splits = args.splits;
  const auto m = static_cast<uint32_t>(args.m), heads = static_cast<uint32_t>(args.heads);
  const uint32_t head = blockIdx.x / m, i = blockIdx.x % m, h = head % heads, b = head / heads;
  const uint32_t row = (b * m + i) * heads + h;
  QueryFeature<Tag>(args, b, i, h).put(sQuery);
  const float* first = args.moments + static_cast<int64_t>(blockIdx.x) * splits * Record::kFloats;
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) {
    sTop[s] = first[s * Record::kFloats + Record::kTop];
    sSum[s] = first[s * Record::kFloats + Record::kSum];
  }
  __syncthreads();
  int best = 0;
  for (int s = 1; s < splits; ++s)
    if (sTop[s] > sTop[best]) best = s;
  const float top = sTop[best];
  if (!(top > -INFINITY)) {  // no visible key; an impossible length has left NaN
    if (threadIdx.x < args.dv)
      static_cast<typename E::type*>(args.o)[static_cast<int64_t>(row) * args.dv + threadIdx.x] =
          E::round(isnan(top) ? NAN : 0.f);
    return;
  }
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) sFactor[s] = exp2f(sTop[s] - top);
  const float* c_best = first + best * Record::kFloats + Record::kC;
  for (int c = threadIdx.x; c < kD; c += kGroups * kThreads) sC[c] = c_best[c];
  for (int at = threadIdx.x; at < splits * kSmall; at += kGroups * kThreads) {
    const int s = at / kSmall, c = at % kSmall;
    // A split without keys has only said so.
    if (sSum[s] != 0.f)
      shared.small[s][c] = first[s * Record::kFloats + Record::kC + c] - (c < kD ? c_best[c] : 0.f);
  }
  __syncthreads();

  S sums;
#pragma unroll 1
  for (int s = turn; s < splits; s += kGroups) {
    const float sum = sSum[s], f = sFactor[s];
    if (sum == 0.f) continue;
    const float* from = first + s * Record::kFloats;
    const float *delta = shared.small[s], *m = delta + kD, *mv = m + kD;
    // A group of loads before their first use.
    const auto take = [&](auto chunks, int begin, const auto& add) {
      constexpr int kChunks = decltype(chunks)::value;
      float2 x[kChunks][2];
#pragma unroll
      for (int n = 0; n < kChunks; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          x[n][h] = __ldcg(
              reinterpret_cast<const float2*>(from + begin + S::row(2 * h) * 8 * kChunks + S::column(n, 0)));
#pragma unroll
      for (int n = 0; n < kChunks; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          add(n, 2 * h, S::row(2 * h), S::column(n, 0), x[n][h].x);
          add(n, 2 * h + 1, S::row(2 * h), S::column(n, 1), x[n][h].y);
        }
    };
    take(std::integral_constant<int, kD / 8>{}, Record::kKeyKey,
         [&](int n, int e, int row, int column, float x) {
           sums.key_key(n)[e] +=
               f * (x + delta[row] * (m[column] + sum * delta[column]) + m[row] * delta[column]);
         });
    take(std::integral_constant<int, kDv / 8>{}, Record::kKeyValue,
         [&](int n, int e, int row, int column, float x) {
           sums.key_value(n)[e] += f * (x + delta[row] * mv[column]);
         });
  }
  for (int c = threadIdx.x; c < kD + kDv; c += kGroups * kThreads) {
    float total = 0.f;
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float* of = shared.small[s];
      total += sFactor[s] * (of[kD + c] + (c < kD ? sSum[s] * of[c] : 0.f));
    }
    (c < kD ? sKeySum[c] : sValueSum[c - kD]) = total;
  }
  float l = 0.f;
  for (int s = 0; s < splits; ++s) l += sFactor[s] * sSum[s];
  // A fixed order: the bits repeat.
  if (turn > 0) {
#pragma unroll
    for (int x = 0; x < Storage::kFloats; ++x) shared.others[turn - 1][x][thread] = sums.x[x / 4][x % 4];
  }
  __syncthreads();
  if (turn > 0) return;
  for (int other = 0; other < kGroups - 1; ++other) {
#pragma unroll
    for (int x = 0; x < Storage::kFloats; ++x) sums.x[x / 4][x % 4] += shared.others[other][x][thread];
  }
  answer<Tag>(args, row, sQuery, top, l, sC, sKeySum, sValueSum, sums, storage);
}

// The blocks of both kernels, one after the other.
template <class Tag, int kD, int kDv, class Kernel, class... Maps>
cudaError_t launch_step(Kernel kernel, int shared_bytes, const StepArgs& args, cudaStream_t stream,
                        const Maps&... maps) {
  constexpr int kMergeBytes = sizeof(MergeStorage<kD, kDv>),
                kMergeThreads = kMergeGroups<kD, kDv> * kStepThreads<kD>;
  const bool merges = args.splits > 1 && !args.cluster;
  cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error == cudaSuccess && merges) error = allow_shared_memory(merge_kernel<Tag, kD, kDv>, kMergeBytes);
  if (error != cudaSuccess) return error;
  const auto queries = static_cast<unsigned>(args.batch * args.heads * args.m),
             splits = static_cast<unsigned>(args.splits);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {splits, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = queries * splits, config.blockDim = kStepThreads<kD>;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
  config.attrs = &cluster, config.numAttrs = args.cluster ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, maps..., args);
  if (error == cudaSuccess && merges)
    merge_kernel<Tag, kD, kDv><<<queries, kMergeThreads, kMergeBytes, stream>>>(args);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace nearfield::lla
