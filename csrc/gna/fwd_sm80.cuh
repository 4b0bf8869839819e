// Neighborhood attention forward on every GPU since Ampere. A CTA holds a box of queries; keys and values of
// the visited boxes have one buffer each: V of a tile arrives under its product with K, K of the next tile
// under the softmax and the product with V. A second CTA of the SM fills the waits.
#pragma once

#include "gna/walk_sm80.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim>
using FwdPortable = PortableTraits<Tag, kHeadDim, portable_fwd_tile, 1, Direction::kForward>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.kCtas)
    fwd_portable_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  constexpr int kD = Traits::kHeadDim, kRowTiles = Traits::kRowTiles, kRows = 2 * kRowTiles;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles;

  for_each_tile<Traits>(s, p, [&] {
    Walk<Traits> walk(s, p);
    walk.template gather_moving<0>();
    Accumulator<kRowTiles, Traits::kMoving> scores;
    Accumulator<kRowTiles, kD> out;
    auto score_rows = scores.rows_cols();
    auto out_rows = out.rows_cols();
    OnlineSoftmax<kRows> softmax(p.scale_log2);
    out.clear();
    for (bool more = true; more;) {
      wait_for_copies();  // K; everyone has read V of the tile before
      walk.template gather_moving<1>();
      scores.clear();
      multiply_transposed<kD>(scores, s.staying[0] + first_row * Traits::kRow, s.moving[0]);  // S = Q K^T
      walk.add_bias(score_rows, first_row);
      walk.mask(score_rows, first_row);
      wait_for_copies();  // V; everyone has read K
      more = walk.advance();
      if (more) walk.template gather_moving<0>();
      float rescale[kRows];
      softmax.step(score_rows, rescale);
      bool changed = false;
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) changed |= rescale[i] != 1.f;
      if (__any_sync(0xffffffffu, changed)) scale_rows(out_rows, rescale);  // rarely, after the first tiles
      multiply<kD>(out, scores, s.moving[1]);                               // O += P V
    }
    float inverse[kRows], lse[kRows];
    softmax.finish(inverse, lse);
    scale_rows(out_rows, inverse);
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = s.plan.row[first_row + 8 * i + lane / 4];
      if (lane % 4 == 0 && row >= 0) p.lse[row] = lse[i];
    }
    store_rows(out, s.plan.row + first_row, p.result[0], static_cast<int>(p.problem.dim_v), 0);
  });
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::fwd(const FwdSm90Args& a, void* stream) {
  using Traits = FwdPortable<Tag, kHeadDim>;
  using Element = typename Traits::Element;
  const Problem& problem = a.problem;
  const int line[3] = {1, 1, static_cast<int>(problem.additional)};
  typename Traits::Params p{};
  p.problem = problem;
  p.schedule = Schedule(problem, a.q_box, problem.heads);
  p.staying_box = a.q_box;
  p.moving_box = a.kv_box;
  p.staying[0] = operand<Element>(a.q, problem.dim, problem.batch, problem.heads, problem.size);
  p.moving[0] = operand<Element>(a.k, problem.dim, problem.batch, problem.heads_kv, problem.size);
  p.moving[1] = operand<Element>(a.v, problem.dim_v, problem.batch, problem.heads_kv, problem.size);
  p.line[0] = operand<Element>(a.add_k, problem.dim, problem.batch, problem.heads_kv, line);
  p.line[1] = operand<Element>(a.add_v, problem.dim_v, problem.batch, problem.heads_kv, line);
  p.line_length = line[2];
  p.rows = rows_of(a.lse, 1);
  p.result[0] = static_cast<Element*>(a.out.data);
  p.lse = a.lse.data;
  p.set_scale(a.scale, a.bias);
  p.next_work = a.next_work;
  return launch_portable<Traits>(fwd_portable_kernel<Traits>, p, a.num_sms,
                                 static_cast<cudaStream_t>(stream));
}

}  // namespace nearfield::gna
