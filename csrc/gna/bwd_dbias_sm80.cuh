// Gradient of the bias on every GPU since Ampere: dS as for the queries, then summed over all pairs with the
// same offset. The tiles of a head are dealt out to a fixed number of CTAs, each of which adds to a table of
// its own: every sum has a fixed order, and the tables are added afterwards.
#pragma once

#include "gna/walk_sm80.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim>
using DbiasPortable = PortableTraits<Tag, kHeadDim, portable_dbias_tile, 2, Direction::kForward>;

template <class Traits>
struct DbiasStorage : Traits::Storage {
  static constexpr int kOwnPlaces = portable_dbias_places(Traits::kHeadDim, sizeof(typename Traits::Element));
  float dscores[Traits::kStaying * Traits::kMoving];
  float table[kOwnPlaces];  // the CTA's, if it fits
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.kCtas)
    bwd_dbias_portable_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<DbiasStorage<Traits>*>(shared);
  constexpr int kD = Traits::kHeadDim, kRowTiles = Traits::kRowTiles, kRows = 2 * kRowTiles;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles + lane / 4;
  float* total = p.dbias.table.data + blockIdx.x / p.schedule.heads * p.dbias.part +
                 blockIdx.x % p.schedule.heads * p.dbias.table.head;
  const int places = p.dbias.table.size <= s.kOwnPlaces ? p.dbias.table.size : 0;
  float* table = places > 0 ? s.table : total;
  for (int i = threadIdx.x; i < places; i += Traits::kThreads) s.table[i] = 0.f;

  for_each_tile<Traits, true>(s, p, [&] {
    Walk<Traits> walk(s, p);
    RowStats stats[kRows];
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = s.plan.row[first_row + 8 * i];
      stats[i] = row >= 0 ? p.stats.data[row] : RowStats{INFINITY, 0.f};
    }
    do {
      walk.template gather_moving<0>();
      walk.template gather_moving<1>();
      wait_for_copies();  // everyone has summed the tile before
      Accumulator<kRowTiles, Traits::kMoving> scores, dprobs;
      auto score_rows = scores.rows_cols();
      auto dprob_rows = dprobs.rows_cols();
      const int staying = (first_row - lane / 4) * Traits::kRow;
      scores.clear();
      multiply_transposed<kD>(scores, s.staying[0] + staying, s.moving[0]);
      walk.add_bias(score_rows, first_row - lane / 4);
      walk.mask(score_rows, first_row - lane / 4);
      dprobs.clear();
      multiply_transposed<kD>(dprobs, s.staying[1] + staying, s.moving[1]);
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < Traits::kMoving / 4; ++j) {
          const float score = score_rows(i, j);
          const float prob = exp2_approx(score * p.scale_log2 - stats[i].lse);
          const int column = 8 * (j / 2) + lane % 4 * 2 + j % 2;
          // Values that are not seen may be NaN.
          s.dscores[(first_row + 8 * i) * Traits::kMoving + column] =
              score == -INFINITY ? 0.f : prob * (dprob_rows(i, j) - stats[i].delta);
        }
      }
      __syncthreads();  // everyone has read K and V and written dS
      walk.sum_offsets(s.dscores, table);
    } while (walk.advance());
  });
  for (int i = threadIdx.x; i < places; i += Traits::kThreads) total[i] += s.table[i];
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_dbias(const BwdSm80Args& a, void* stream) {
  using Traits = DbiasPortable<Tag, kHeadDim>;
  using Element = typename Traits::Element;
  const Problem& problem = a.problem;
  typename Traits::Params p{};
  p.problem = problem;
  p.schedule = Schedule(problem, a.q_box, problem.heads);
  p.staying_box = a.q_box;
  p.moving_box = a.kv_box;
  p.staying[0] = operand<Element>(a.q, problem.dim, problem.batch, problem.heads, problem.size);
  p.staying[1] = operand<Element>(a.dout, problem.dim_v, problem.batch, problem.heads, problem.size);
  p.moving[0] = operand<Element>(a.k, problem.dim, problem.batch, problem.heads_kv, problem.size);
  p.moving[1] = operand<Element>(a.v, problem.dim_v, problem.batch, problem.heads_kv, problem.size);
  p.stats = a.stats;
  p.rows = rows_of(a.stats, 1);
  p.set_scale(a.scale, a.bias);
  p.dbias = a.dbias;
  if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  constexpr int kShared = sizeof(DbiasStorage<Traits>);
  static_assert(kShared <= 99 * 1024, "what a CTA has on every GPU since Ampere");
  const auto kernel = bwd_dbias_portable_kernel<Traits>;
  const cudaError_t e = allow_shared_memory(kernel, kShared);
  if (e != cudaSuccess) return e;
  const auto grid = static_cast<unsigned>(p.schedule.heads * a.dbias.parts);
  kernel<<<grid, Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace nearfield::gna
