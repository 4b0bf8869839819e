// Gradient of the queries on every GPU since Ampere, queries staying:
//   S = Q K^T, dP = dO V^T, dS = exp2(S - lse) (dP - delta), dQ += dS K.
// V of the next tile arrives under the last product, K behind it.
#pragma once

#include "gna/walk_sm80.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim>
using DqPortable = PortableTraits<Tag, kHeadDim, portable_dq_tile, 2, Direction::kForward>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.kCtas)
    bwd_dq_portable_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  constexpr int kD = Traits::kHeadDim, kRowTiles = Traits::kRowTiles, kRows = 2 * kRowTiles;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles;

  for_each_tile<Traits>(s, p, [&] {
    Walk<Traits> walk(s, p);
    walk.template gather_moving<0>();
    walk.template gather_moving<1>();
    Accumulator<kRowTiles, Traits::kMoving> scores, dprobs;
    Accumulator<kRowTiles, kD> dq;
    auto score_rows = scores.rows_cols();
    auto dprob_rows = dprobs.rows_cols();
    auto dq_rows = dq.rows_cols();
    RowStats stats[kRows];
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = s.plan.row[first_row + 8 * i + lane / 4];
      stats[i] = row >= 0 ? p.stats.data[row] : RowStats{INFINITY, 0.f};
    }
    dq.clear();
    for (bool more = true; more;) {
      wait_for_copies();
      scores.clear();
      multiply_transposed<kD>(scores, s.staying[0] + first_row * Traits::kRow, s.moving[0]);
      walk.add_bias(score_rows, first_row);
      walk.mask(score_rows, first_row);
      dprobs.clear();
      multiply_transposed<kD>(dprobs, s.staying[1] + first_row * Traits::kRow, s.moving[1]);
      __syncthreads();  // everyone has read V
      more = walk.advance();
      if (more) walk.template gather_moving<1>();
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < Traits::kMoving / 4; ++j) {
          const float prob = exp2_approx(score_rows(i, j) * p.scale_log2 - stats[i].lse);
          dprob_rows(i, j) = prob * (dprob_rows(i, j) - stats[i].delta);
        }
      }
      multiply<kD>(dq, dprobs, s.moving[0]);
      __syncthreads();  // everyone has read K
      if (more) walk.template gather_moving<0>();
    }
    float factor[kRows];
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) factor[i] = p.scale;
    scale_rows(dq_rows, factor);
    store_rows(dq, s.plan.row + first_row, p.result[0], static_cast<int>(p.problem.dim), 0);
  });
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_dq(const BwdSm80Args& a, void* stream) {
  using Traits = DqPortable<Tag, kHeadDim>;
  using Element = typename Traits::Element;
  const Problem& problem = a.problem;
  const int line[3] = {1, 1, static_cast<int>(problem.additional)};
  typename Traits::Params p{};
  p.problem = problem;
  p.schedule = Schedule(problem, a.q_box, problem.heads);
  p.staying_box = a.q_box;
  p.moving_box = a.kv_box;
  p.staying[0] = operand<Element>(a.q, problem.dim, problem.batch, problem.heads, problem.size);
  p.staying[1] = operand<Element>(a.dout, problem.dim_v, problem.batch, problem.heads, problem.size);
  p.moving[0] = operand<Element>(a.k, problem.dim, problem.batch, problem.heads_kv, problem.size);
  p.moving[1] = operand<Element>(a.v, problem.dim_v, problem.batch, problem.heads_kv, problem.size);
  p.line[0] = operand<Element>(a.add_k, problem.dim, problem.batch, problem.heads_kv, line);
  p.line[1] = operand<Element>(a.add_v, problem.dim_v, problem.batch, problem.heads_kv, line);
  p.line_length = line[2];
  p.stats = a.stats;
  p.rows = rows_of(a.stats, 1);
  p.result[0] = static_cast<Element*>(a.dq_out.data);
  p.set_scale(a.scale, a.bias);
  p.next_work = a.next_work;
  return launch_portable<Traits>(bwd_dq_portable_kernel<Traits>, p, a.num_sms,
                                 static_cast<cudaStream_t>(stream));
}

}  // namespace nearfield::gna
