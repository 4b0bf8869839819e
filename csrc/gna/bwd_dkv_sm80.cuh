// Gradients of keys and values on every GPU since Ampere, keys staying, so that each is summed by one warp in
// a fixed order. Everything is transposed: P^T and dS^T leave the tensor cores in the layout in which they
// are the left operand of the next product.
//   S^T = K Q^T, P^T = exp2(S^T - lse), dP^T = V dO^T, dV += P^T dO, dS^T = P^T (dP^T - delta),
//   dK += dS^T Q.
// dO of the next tile arrives under the last product, Q behind it. Above 128 features dK and dV are computed
// 128 at a time, each time with all scores. The additional tokens are a launch of their own, in which they
// stay and the whole grid moves.
#pragma once

#include "gna/walk_sm80.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim>
using DkvPortable = PortableTraits<Tag, kHeadDim, portable_dkv_tile, 2, Direction::kBackward>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.kCtas)
    bwd_dkv_portable_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  constexpr int kD = Traits::kHeadDim, kRowTiles = Traits::kRowTiles, kRows = 2 * kRowTiles;
  constexpr int kFeatures = kD < kPortableKeyFeatures ? kD : kPortableKeyFeatures;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles;

  for_each_tile<Traits>(s, p, [&] {
    for (int feature = 0; feature < kD; feature += kFeatures) {
      Walk<Traits> walk(s, p);
      walk.template gather_moving<0>();
      walk.template gather_moving<1>();
      walk.gather_stats();
      Accumulator<kRowTiles, Traits::kMoving> scores, dprobs;
      Accumulator<kRowTiles, kFeatures> dk, dv;
      auto score_rows = scores.rows_cols();
      auto dprob_rows = dprobs.rows_cols();
      auto dk_rows = dk.rows_cols();
      dk.clear();
      dv.clear();
      for (bool more = true; more;) {
        wait_for_copies();
        scores.clear();
        multiply_transposed<kD>(scores, s.staying[0] + first_row * Traits::kRow, s.moving[0]);
        walk.add_bias(score_rows, first_row);
        walk.mask(score_rows, first_row);
        dprobs.clear();
        multiply_transposed<kD>(dprobs, s.staying[1] + first_row * Traits::kRow, s.moving[1]);
        CUTE_UNROLL
        for (int j = 0; j < Traits::kMoving / 4; ++j) {
          const RowStats stats = s.stats[8 * (j / 2) + lane % 4 * 2 + j % 2];
          CUTE_UNROLL
          for (int i = 0; i < kRows; ++i) {
            score_rows(i, j) = exp2_approx(score_rows(i, j) * p.scale_log2 - stats.lse);
            dprob_rows(i, j) = score_rows(i, j) * (dprob_rows(i, j) - stats.delta);
          }
        }
        multiply<kD>(dv, scores, s.moving[1] + feature);
        __syncthreads();  // everyone has read dO and the statistics
        more = walk.advance();
        if (more) {
          walk.template gather_moving<1>();
          walk.gather_stats();
        }
        multiply<kD>(dk, dprobs, s.moving[0] + feature);
        __syncthreads();  // everyone has read Q
        if (more) walk.template gather_moving<0>();
      }
      float factor[kRows];
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) factor[i] = p.scale;
      scale_rows(dk_rows, factor);
      store_rows(dk, s.plan.row + first_row, p.result[0], static_cast<int>(p.problem.dim), feature);
      store_rows(dv, s.plan.row + first_row, p.result[1], static_cast<int>(p.problem.dim_v), feature);
    }
  });
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_dkv(const BwdSm80Args& a, void* stream) {
  using Traits = DkvPortable<Tag, kHeadDim>;
  using Element = typename Traits::Element;
  const Problem& problem = a.problem;
  const int additional = static_cast<int>(problem.additional);
  const int line[3] = {1, 1, additional};
  typename Traits::Params p{};
  p.problem = problem;
  p.schedule = a.to_additional ? Schedule(problem, additional, Traits::kStaying, problem.heads_kv)
                               : Schedule(problem, a.kv_box, problem.heads_kv);
  p.staying_box = a.to_additional ? Box{{1, 1, Traits::kStaying}} : a.kv_box;
  p.moving_box = a.q_box;
  p.staying[0] = a.to_additional
                     ? operand<Element>(a.add_k, problem.dim, problem.batch, problem.heads_kv, line)
                     : operand<Element>(a.k, problem.dim, problem.batch, problem.heads_kv, problem.size);
  p.staying[1] = a.to_additional
                     ? operand<Element>(a.add_v, problem.dim_v, problem.batch, problem.heads_kv, line)
                     : operand<Element>(a.v, problem.dim_v, problem.batch, problem.heads_kv, problem.size);
  p.moving[0] = operand<Element>(a.q, problem.dim, problem.batch, problem.heads, problem.size);
  p.moving[1] = operand<Element>(a.dout, problem.dim_v, problem.batch, problem.heads, problem.size);
  p.stats = a.stats;
  p.rows = rows_of(a.dk, problem.dim);
  p.result[0] = static_cast<Element*>(a.dk.data);
  p.result[1] = static_cast<Element*>(a.dv.data);
  p.set_scale(a.scale, a.to_additional ? BiasTable<const float>{} : a.bias);
  p.next_work = a.next_work;
  return launch_portable<Traits>(bwd_dkv_portable_kernel<Traits>, p, a.num_sms,
                                 static_cast<cudaStream_t>(stream));
}

}  // namespace nearfield::gna
