// The splits of a query as a thread-block cluster, which adds up their sums through distributed shared
// memory: one launch and no scratch memory, where merge_kernel needs a launch of its own and brings all
// records to one SM per query.
//
// 1. Every block tells the others its highest score, its weight and its reference.
// 2. It moves its sums to the reference of the one with the highest score and sends every chunk to the block
//    that owns it.
// 3. An owner adds up its chunks of all blocks, in a fixed order (the bits repeat), and sends the totals to
//    the first.
// 4. The first block goes on to the output.
//
// Blocks only write to each other, and a write says to a barrier of its target that it has arrived: nobody
// asks over the network and waits, and no fence has to reach the whole GPU, which is what barriers of a
// cluster cost.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "lla/step_sums.cuh"

namespace nearfield::lla {

template <int kD, int kDv>
struct ClusterShared {
  static constexpr int kChunks = kD / 8 + kDv / 8, kThreads = kStepThreads<kD>;
  // Chunk n belongs to block splits - 1 - n % splits: the first, which receives all totals, owns the fewest.
  static constexpr int kSlots = [] {
    int most = 0;
    for (int splits = 2; splits <= kMaxCluster; ++splits)
      most = std::max(
          {most, kChunks / splits * (splits - 1) + kChunks, (kChunks + splits - 1) / splits * splits});
    return most;
  }();

  struct Head {
    float reference[kD];
    float top, sum, unused[2];
  };
  // In the memory of the tiles: blocks send it when they know that all have done theirs.
  struct Exchange {
    // Of an owner: [its chunks][splits]. Behind those of the first block: the totals of the others.
    float4 slot[kSlots][kThreads];
    float small[kMaxCluster][kD + kDv];  // of the first block: sums of w k' and w v
  };

  enum { kHeads, kSums, kTotals, kBarriers };
  uint64_t arrived[kBarriers];
  alignas(16) Head head[kMaxCluster];
  float delta[kD];  // from this block's reference to that of all

  // One thread, before cluster_arrive: what each barrier will see.
  __device__ __forceinline__ void expect(int rank, int splits) {
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    constexpr int kChunkBytes = kThreads * static_cast<int>(sizeof(float4));
    const int owned = (kChunks + rank) / splits, first = rank == 0;
    for (int i = 0; i < kBarriers; ++i) Barrier::init(&arrived[i], 1);
    cutlass::arch::fence_barrier_init();
    Barrier::arrive_and_expect_tx(&arrived[kHeads], splits * static_cast<int>(sizeof(Head)));
    Barrier::arrive_and_expect_tx(&arrived[kSums], splits * (owned * kChunkBytes + first * (kD + kDv) * 4));
    if (first) Barrier::arrive_and_expect_tx(&arrived[kTotals], (kChunks - owned) * kChunkBytes);
  }
};

// To the place of `to` in the memory of another block.
__device__ __forceinline__ void send(const float4& x, const float4& to, const uint64_t& barrier, int rank) {
  const auto block = static_cast<uint32_t>(rank);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :
               : "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(&to), block)), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w), "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(&barrier), block))
               : "memory");
}

// c, key_sum and value_sum are in shared memory, in units of the inputs like the sums. True in the first
// block, where all arguments then are those of the whole. Without a visible key top remains what it was.
template <int kD, int kDv>
__device__ __forceinline__ bool add_up_cluster(int rank, int splits, ClusterShared<kD, kDv>& shared,
                                               typename ClusterShared<kD, kDv>::Exchange& exchange,
                                               float& top, float& l, float* c, float* key_sum,
                                               float* value_sum, Sums<kD, kDv>& sums) {
  using Shared = ClusterShared<kD, kDv>;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kChunks = Shared::kChunks, kThreads = Shared::kThreads;
  const int thread = threadIdx.x, owned = (kChunks + rank) / splits;
  cute::cluster_wait();  // for barriers to exist

  constexpr int kPieces = kD / 4;
  for (int at = thread; at < splits * (kPieces + 1); at += kThreads) {
    const int to = at / (kPieces + 1), piece = at % (kPieces + 1);
    const float4 x = piece < kPieces ? reinterpret_cast<const float4*>(c)[piece] : float4{top, l, 0.f, 0.f};
    send(x, reinterpret_cast<const float4*>(&shared.head[rank])[piece], shared.arrived[Shared::kHeads], to);
  }
  Barrier::wait(&shared.arrived[Shared::kHeads], 0);
  float highest = shared.head[0].top, total = 0.f;
  int best = 0;
  for (int s = 1; s < splits; ++s)
    if (shared.head[s].top > highest) highest = shared.head[s].top, best = s;
  if (!(highest > -INFINITY)) return rank == 0;
  for (int s = 0; s < splits; ++s) total += exp2f(shared.head[s].top - highest) * shared.head[s].sum;
  if (thread < kD) shared.delta[thread] = c[thread] - shared.head[best].reference[thread];
  __syncthreads();
  const UnitChange by(Units{top}, Units{highest}, false);
  move_sums(sums, by, shared.delta, key_sum, value_sum, l);
  const auto send_small = [&](float x, int at) {
    cute::store_shared_remote(__float_as_uint(x), cute::cast_smem_ptr_to_uint(&exchange.small[rank][at]),
                              cute::cast_smem_ptr_to_uint(&shared.arrived[Shared::kSums]), 0);
  };
  if (thread < kD) send_small(by.weight * (key_sum[thread] + l * shared.delta[thread]), thread);
  if (thread < kDv) send_small(by.weight * value_sum[thread], kD + thread);
  int owner = splits, round = 0;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    if (--owner < 0) owner = splits - 1, ++round;
    send({sums.x[n][0], sums.x[n][1], sums.x[n][2], sums.x[n][3]},
         exchange.slot[round * splits + rank][thread], shared.arrived[Shared::kSums], owner);
  }

  Barrier::wait(&shared.arrived[Shared::kSums], 0);
#pragma unroll 1
  for (int i = 0; i < owned; ++i) {
    float4 sum = {};
    for (int s = 0; s < splits; ++s) {
      const float4 x = exchange.slot[i * splits + s][thread];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    if (rank == 0) exchange.slot[i * splits][thread] = sum;
    else  // behind the slots of what the first block owns, without gaps for that
      send(sum, exchange.slot[kChunks / splits * splits + i * (splits - 1) + splits - 1 - rank][thread],
           shared.arrived[Shared::kTotals], 0);
  }
  if (rank != 0) return false;
  __syncthreads();  // nobody reads c and the sums of this block any more
  const auto add_up = [&](int at) {
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) sum += exchange.small[s][at];
    return sum;
  };
  if (thread < kD) c[thread] = shared.head[best].reference[thread], key_sum[thread] = add_up(thread);
  if (thread < kDv) value_sum[thread] = add_up(kD + thread);
  Barrier::wait(&shared.arrived[Shared::kTotals], 0);
  owner = splits, round = 0;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    if (--owner < 0) owner = splits - 1, ++round;
    const float4 x = exchange.slot[owner == 0 ? round * splits : owned * splits + n - round][thread];
    sums.x[n][0] = x.x, sums.x[n][1] = x.y, sums.x[n][2] = x.z, sums.x[n][3] = x.w;
  }
  top = highest, l = total;
  __syncthreads();  // the memory of the exchange may be overwritten
  return true;
}

}  // namespace nearfield::lla
