// The splits of a query as a thread-block cluster, which adds up their sums through distributed shared memory: one launch
// and no scratch memory, where merge_kernel needs a launch of its own and brings all records to one SM per query.
//
//   1  every block says what its highest score, its weight and its reference are
//   2  it moves its sums to the reference of the one with the highest score and leaves them in its own shared memory
//   3  block r adds up chunks r, r + splits, ... of all blocks, in a fixed order: the bits repeat
//   4  the first block collects the totals and goes on to the output
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "lla/step_answer.cuh"

namespace nearfield::lla {

// What the blocks of a cluster read of each other. `chunk` may share its memory with what is no longer needed once all
// blocks have done their tiles.
template <int kD, int kDv>
struct ClusterShared {
  static constexpr int kChunks = kD / 8 + kDv / 8;
  using Chunks = float4[kChunks][kStepThreads<kD>];
  float2 head;                  // the exponent of the weights, and their sum
  float reference[kD], delta[kD];  // of the cluster; from this block's to that
};

// The same place in the shared memory of another block.
template <class T>
__device__ __forceinline__ const T& of_block(const T& here, int rank) {
  return *static_cast<const T*>(__cluster_map_shared_rank(&here, static_cast<unsigned>(rank)));
}

// c, key_sum and value_sum are in shared memory, in units of the inputs like the sums. True in the first block, where all
// arguments then are those of the whole; without a visible key top is left as it was.
template <int kD, int kDv>
__device__ __forceinline__ bool add_up_cluster(const StepWork& work, int splits, ClusterShared<kD, kDv>& shared,
                                               typename ClusterShared<kD, kDv>::Chunks& chunk, float& top,
                                               float& l, const float* c, float* key_sum, float* value_sum,
                                               Sums<kD, kDv>& sums) {
  constexpr int kChunks = ClusterShared<kD, kDv>::kChunks;
  const int thread = threadIdx.x;
  if (thread == 0) shared.head = {top, l};
  cute::cluster_sync();

  // All at once: a rank that does not exist repeats the last one.
  const auto existing = [&](int s) { return min(s, splits - 1); };
  float2 head[kMaxCluster];
#pragma unroll
  for (int s = 0; s < kMaxCluster; ++s) head[s] = of_block(shared.head, existing(s));
  float highest = head[0].x, total = 0.f;
  int best = 0;
#pragma unroll
  for (int s = 1; s < kMaxCluster; ++s)
    if (head[s].x > highest) highest = head[s].x, best = s;
  if (highest > -INFINITY) {
#pragma unroll
    for (int s = 0; s < kMaxCluster; ++s)
      if (s < splits) total += exp2f(head[s].x - highest) * head[s].y;
    if (thread < kD) {
      shared.reference[thread] = of_block(c[thread], best);
      shared.delta[thread] = c[thread] - shared.reference[thread];
    }
    __syncthreads();
    const UnitChange by(Units{top}, Units{highest}, false);
    move_sums(sums, by, shared.delta, key_sum, value_sum, l);
    __syncthreads();
    if (thread < kD) key_sum[thread] = by.weight * (key_sum[thread] + l * shared.delta[thread]);
    if (thread < kDv) value_sum[thread] *= by.weight;
#pragma unroll
    for (int n = 0; n < kChunks; ++n)
      chunk[n][thread] = {sums.x[n][0], sums.x[n][1], sums.x[n][2], sums.x[n][3]};
    top = highest, l = total;
    cute::cluster_sync();

    const auto add_up = [&](const auto& add) {
#pragma unroll
      for (int s = 0; s < kMaxCluster; ++s)
        if (s < splits) add(s);
    };
#pragma unroll 1
    for (int n = work.split; n < kChunks; n += splits) {
      float4 x[kMaxCluster];
#pragma unroll
      for (int s = 0; s < kMaxCluster; ++s) x[s] = of_block(chunk[n][thread], existing(s));
      float4 sum = {};
      add_up([&](int s) { sum.x += x[s].x, sum.y += x[s].y, sum.z += x[s].z, sum.w += x[s].w; });
      chunk[n][thread] = sum;  // which only this block and, later, the first one read
    }
    if (work.split == 0) {
      const auto collect = [&](float& of) {
        float x[kMaxCluster], sum = 0.f;
#pragma unroll
        for (int s = 0; s < kMaxCluster; ++s) x[s] = of_block(of, existing(s));
        add_up([&](int s) { sum += x[s]; });
        of = sum;
      };
      if (thread < kD) collect(key_sum[thread]);
      if (thread < kDv) collect(value_sum[thread]);
    }
    cute::cluster_sync();
    if (work.split == 0) {
      int rank = 0;
#pragma unroll
      for (int n = 0; n < kChunks; ++n, rank = rank + 1 < splits ? rank + 1 : 0) {
        const float4 x = of_block(chunk[n][thread], rank);
        sums.x[n][0] = x.x, sums.x[n][1] = x.y, sums.x[n][2] = x.z, sums.x[n][3] = x.w;
      }
    }
  }
  cute::cluster_sync();  // nobody ends while others read its memory
  return work.split == 0;
}

}  // namespace nearfield::lla
