// The planning warp: draws work items and computes, while the others still work on the item before, everything about the
// next one that takes integer divisions. It takes microseconds for one warp and is on nobody's path.
#pragma once

#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

constexpr int kPlannedTiles = 2;  // being worked on, and the next

// Plans every work item of this CTA, then announces the end. `visits_per_tile` is how often each visited tile is met
// (once per query head of a group), `extra` counts visits beyond the neighborhood.
template <Direction kDirection, class Storage, class Params, class T>
__device__ void plan_tiles_of_cta(Storage& s, const Params& p, const Box& staying, const Box& moving,
                                  const Tokens<T>& index, int visits_per_tile, int extra) {
  const int lane = threadIdx.x % 32;
  RingIndex<kPlannedTiles> at;
  int drawn = static_cast<int>(blockIdx.x - gridDim.x);
  while (true) {
    const int work = static_cast<int>(gridDim.x) + __shfl_sync(0xffffffffu, drawn, 0);
    if (work >= p.schedule.total) break;
    if (lane == 0) drawn = atomicAdd(p.next_work, 1);
    const StayingTile tile = p.schedule.template decode<kDirection>(p.problem, staying, moving, work);
    if (tile.empty()) continue;
    s.ring_plan.wait_empty(at);
    s.plan[at.stage].template fill<kDirection>(tile, p.problem, staying, tile.batch + p.batch_offset, index,
                                               tile.num_visits() * visits_per_tile + extra, lane);
    if (lane == 0) s.ring_plan.arrive_full(at);
    at.advance();
  }
  s.ring_plan.wait_empty(at);
  if (lane == 0) {
    s.plan[at.stage].num_tiles = 0;
    s.ring_plan.arrive_full(at);
  }
}

// Calls visit(planned tile) for every work item of this CTA; for the producer warps.
template <class Storage, class Visit>
__device__ __forceinline__ void follow_plan(Storage& s, const Visit& visit) {
  RingIndex<kPlannedTiles> at;
  while (true) {
    s.ring_plan.wait_full(at);
    if (s.plan[at.stage].num_tiles == 0) return;
    visit(s.plan[at.stage].tile);
    __syncwarp();
    s.ring_plan.release(at);
    at.advance();
  }
}

}  // namespace nearfield::gna
