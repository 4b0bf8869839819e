// The planning warp: draws work items and computes, while the others still work on the item before,
// everything about the next one that takes integer divisions. It takes microseconds for one warp and is on
// nobody's path.
#pragma once

#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

constexpr int kPlannedTiles = 2;  // being worked on, and the next

// Work is drawn late, so that CTAs stay balanced to the end: when this many visits of the current tile are
// left to load, which is just longer than planning takes.
constexpr int kDrawAhead = 8;

// Called by the loading thread before its first visit and then after each one; `before` is what was left
// before it.
template <class Storage>
__device__ __forceinline__ void allow_draw(Storage& s, int left, int before) {
  if (left == kDrawAhead || (left == before && left < kDrawAhead)) s.ring_draw.arrive_full({});
}

struct NothingBeside {
  // CTAs that begin together with the work of their number; the first draw.
  __device__ __forceinline__ int at_once() const { return static_cast<int>(gridDim.x); }
  __device__ __forceinline__ int first(int*) const { return blockIdx.x; }
  __device__ __forceinline__ void prepare(const StayingTile&) const {}
  template <class Due>
  __device__ __forceinline__ void work(const Due&) const {}
};

// Plans every work item of this CTA, then announces the end. `visits_per_tile` is how often each visited tile
// is met (once per query head of a group), `extra` counts visits beyond the neighborhood. Before a tile is
// announced beside.prepare(tile) is called, and where the warp would wait for the next draw beside.work(due),
// with a function that says when that is due.
template <Direction kDirection, class Storage, class Params, class T, class Beside>
__device__ void plan_tiles_of_cta(Storage& s, const Params& p, const Box& staying, const Box& moving,
                                  const Tokens<T>& index, int visits_per_tile, int extra, Beside&& beside) {
  const int lane = threadIdx.x % 32;
  RingIndex<kPlannedTiles> at;
  RingIndex<1> at_draw;
  int work = beside.first(p.next_work);
  while (work < p.schedule.total) {
    s.ring_plan.wait_empty(at);
    auto& plan = s.plan[at.stage];
    // Straight to shared memory: some of the producers have 24 registers.
    p.schedule.template decode_by_warp<kDirection>(p.problem, staying, moving, work, plan.tile, lane);
    if (!plan.tile.empty()) {
      plan.num_tiles = plan.tile.num_visits() * visits_per_tile + extra;
      plan.template fill<kDirection>(s.plan_scratch, p.problem, staying, plan.tile.batch + p.batch_offset,
                                     index, p.schedule.line > 0, lane);
      beside.prepare(plan.tile);
      if (lane == 0) s.ring_plan.arrive_full(at);
      at.advance();
      beside.work([&] { return Ring<1>::Barrier::test_wait(&s.ring_draw.full[0], at_draw.phase, true); });
      s.ring_draw.wait_full(at_draw);
      at_draw.advance();
    }
    int drawn = 0;
    if (lane == 0) drawn = atomicAdd(p.next_work, 1);
    work = beside.at_once() + __shfl_sync(0xffffffffu, drawn, 0);
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
