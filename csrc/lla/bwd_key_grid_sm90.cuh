// The backward on Hopper for neighborhoods of a grid, the pass that holds keys: the kernel of
// bwd_key_sm90.cuh, whose CTA first writes down which queries see its keys.
#pragma once

#include "lla/bwd_key_sm90.cuh"
#include "lla/grid_sm90.h"

namespace nearfield::lla {

struct LoneOnGrid {
  Grid grid;
  __device__ __forceinline__ bool operator()(int row) const { return grid.reach(row, false).count() == 1; }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_key_grid_kernel(const __grid_constant__ BwdSm90Args a, const __grid_constant__ Grid grid) {
  auto& s = *reinterpret_cast<typename Traits::Storage*>(dynamic_shared);
  KeyBlock block(a.problem, blockIdx.x);
  s.grid.prepare(grid, block.key_tile, a.problem.n / kBoxRows, true);
  prepare_key_ring<Traits>(s);
  block.tiles = {0, s.grid.total};
  bwd_key_roles<Traits>(s, a, block);
}

template <int kHeadDim>
int bwd_key_grid_sm90<kHeadDim>::run(const BwdSm90Args& a, const Grid& grid, void* stream_) {
  using Traits = KeyTraits<kHeadDim, true>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_key_grid_kernel<Traits>, kShared)) return e;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const QueryProblem& p = a.problem;
  write_pairs<kHeadDim>(a, LoneOnGrid{grid}, stream);
  const int blocks = p.key_blocks() * p.batch * p.kv_heads;
  bwd_key_grid_kernel<Traits><<<blocks, Traits::kThreads, kShared, stream>>>(a, grid);
  return cudaGetLastError();
}

}  // namespace nearfield::lla
