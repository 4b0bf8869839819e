// The backward on Hopper for neighborhoods of a grid, the passes that hold queries: the kernel of
// bwd_query_sm90.cuh, whose CTA first writes down who sees whom.
#pragma once

#include "lla/bwd_query_sm90.cuh"
#include "lla/grid_sm90.h"

namespace nearfield::lla {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_query_grid_kernel(const __grid_constant__ BwdSm90Args a, const __grid_constant__ Grid grid) {
  auto& s = *reinterpret_cast<typename Traits::Storage*>(dynamic_shared);
  QueryBlock block(a.problem, blockIdx.x);
  s.grid.prepare(grid, block.row_tile, a.problem.m / kBoxRows, false);
  prepare_barriers<Traits>(s);
  block.tiles = {0, s.grid.total};
  bwd_query_roles<Traits>(s, a, block);
}

template <class Traits>
int launch_bwd_query_grid(const BwdSm90Args& a, const Grid& grid, void* stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_query_grid_kernel<Traits>, kShared)) return e;
  const int blocks = a.problem.query_blocks() * a.problem.batch * a.problem.heads;
  bwd_query_grid_kernel<Traits>
      <<<blocks, Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(a, grid);
  return cudaGetLastError();
}

template <int kHeadDim>
int bwd_query_grid_sm90<kHeadDim>::run(const BwdSm90Args& a, const Grid& grid, void* stream) {
  if constexpr (resident_tiles(kHeadDim) > 0) {
    if (a.problem.resident) return launch_bwd_query_grid<QueryTraits<kHeadDim, true, true>>(a, grid, stream);
  }
  return launch_bwd_query_grid<QueryTraits<kHeadDim, true>>(a, grid, stream);
}

}  // namespace nearfield::lla
