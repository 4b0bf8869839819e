// Forward on every GPU since Ampere: statistics, solve (or a given x) and readout of 64 queries of one head,
// 16 per warp. The passes are those of fwd_sm90.cuh.
#pragma once

#include "lla/solve_sm80.cuh"

namespace nearfield::lla {

// Residents: Q; the direction, later x; what rounding leaves of x (fp16 only).
template <class Tag, int kHeadDim, bool kOnGrid>
using FwdPortable = PortableTraits<Tag, kHeadDim, kOnGrid, 4, sizeof(operand_t<Tag>) == 2 ? 3 : 2,
                                   sizeof(operand_t<Tag>) == 2 ? 64
                                   : kHeadDim <= 64            ? 32
                                                               : 16>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    fwd_portable_kernel(const __grid_constant__ FwdSm80Args a) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kQuads = Traits::kQuads, kMoving = Traits::kMoving;
  constexpr bool kSplit = Traits::kIsHalf;
  const QueryProblem& p = a.problem;
  QueryRows<Traits> rows(s, a);
  const float q_unit = operand_unit(p.q, rows.head), k_unit = operand_unit(p.k, rows.kv_head),
              v_unit = operand_unit(p.v, rows.kv_head);
  rows.scale_log2 = p.scale * q_unit * k_unit * kLog2eSm80;
  rows.load_resident(0, p.q);
  float4 *r = rows.scratch(a.scratch, 0), *x_kept = rows.scratch(a.scratch, 1),
         *kbar = rows.scratch(a.scratch, 2);
  const auto mean_keys = [&](int j) { return kbar[32 * j]; };

  typename Traits::Vector v;
  typename Traits::Scores scores;

  // ---- Statistics: row max, omega = sum_j w_ij, kbar = sum_j w_ij k_j / omega ----
  float top[2] = {-INFINITY, -INFINITY}, omega[2] = {0.f, 0.f}, rounded_omega[2] = {0.f, 0.f};
  rows.shift[0] = rows.shift[1] = 0.f;
  v.clear();
  rows.template walk<1>({&p.k}, [&](int, int t, const Element* keys) {
    scores.clear();
    multiply_transposed<kD>(scores, rows.resident(0), keys);
    for_each_value(scores, [&](int, int, int, float& e) { e *= rows.scale_log2; });
    rows.mask(scores, t);
    float highest[2] = {top[0], top[1]}, shrink[2];
    for_each_value(scores, [&](int, int, int i, float e) { highest[i] = fmaxf(highest[i], e); });
    max_over_row(highest);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      // A row that has seen no key has maximum -inf; -inf - -inf would be NaN.
      rows.shift[i] = highest[i] == -INFINITY ? 0.f : highest[i];
      shrink[i] = exp2_approx(top[i] - rows.shift[i]);
      top[i] = highest[i];
      omega[i] *= shrink[i];
      rounded_omega[i] *= shrink[i];
    }
    for_each_value(scores, [&](int, int, int i, float& e) {
      e = exp2_approx(e - rows.shift[i]);
      omega[i] += e;
    });
    rows.round(scores, rounded_omega);
    for_each_value(v, [&](int, int, int i, float& e) { e *= shrink[i]; });
    multiply<kD>(v, scores, keys);
  });
  add_over_row(omega);
  add_over_row(rounded_omega);
  float inverse_omega[2], lse[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool sees = omega[i] != 0.f;
    inverse_omega[i] = sees ? 1.f / omega[i] : 0.f;
    lse[i] = sees ? (rows.shift[i] + log2f(omega[i])) * kLn2Sm80 : -INFINITY;
    rounded_omega[i] = sees ? 1.f / rounded_omega[i] : 0.f;
    if (rows.inside[i] && rows.quad == 0) a.lse[rows.output_row(i)] = lse[i];
  }
  for_each_value(v, [&](int, int, int i, float& e) { e *= rounded_omega[i]; });
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j)
    kbar[32 * j] = float4{v.tile[0][j][0], v.tile[0][j][1], v.tile[0][j][2], v.tile[0][j][3]};
  rows.store(v, a.kbar, nearfield::Element::kFp32, p.d, {k_unit, k_unit});

  // ---- x, in `v` ----
  if (a.solve) {
    const float q_factor = q_unit / k_unit;
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 q = load_operand_pair(rows.pair_at(0, j, i));
        float* g = &v.tile[0][j][2 * i];
        const bool sees = omega[i] != 0.f;
        g[0] = sees ? q.x * q_factor - g[0] : 0.f;
        g[1] = sees ? q.y * q_factor - g[1] : 0.f;
      }
    }
    const RowRidgeSm80 ridge(rows, a.ridge, lse, k_unit);
    ConjugateGradientSm80<Traits, 0, 1> cg{rows, ridge, r, x_kept, kbar, {inverse_omega[0], inverse_omega[1]},
                                           1.f};
    cg.solve(v, a.tol, a.max_iters);
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 x = x_kept[32 * j];
      v.tile[0][j][0] = x.x, v.tile[0][j][1] = x.y, v.tile[0][j][2] = x.z, v.tile[0][j][3] = x.w;
    }
    const float inverse = 1.f / k_unit;
    rows.store(v, a.x, nearfield::Element::kFp32, p.d, {inverse, inverse});
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (!rows.inside[i] || rows.quad != 0) continue;
      a.iterations[rows.output_row(i)] = cg.iterations[i];
      a.ratio[rows.output_row(i)] = cg.ratio[i];
    }
  } else {
    rows.load(v, a.given, k_unit);
  }

  // ---- Readout: o = sum_j w_ij (1 + x.(k_j - kbar)) v_j / omega, with omega summed again from these w_ij
  // ----
  const auto x = rows.round_to_resident(v, 1, kSplit ? 2 : -1, mean_keys);
  // The weights are divided by the unit of x where that is above one, so that they stay inside the range of
  // fp16.
  float one[2], slope[2], total[2] = {0.f, 0.f};
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    one[i] = rows.fit[i] == 0.f ? 1.f : fminf(x.inverse[i], 1.f);
    slope[i] = x.unit[i] * one[i] * rows.fit[i];
  }
  typename Traits::Scores slopes;
  constexpr int kLefts = kSplit ? 3 : 2;
  const Element* lefts[kLefts];
  CUTE_UNROLL
  for (int l = 0; l < kLefts; ++l) lefts[l] = rows.resident(l);
  v.clear();
  rows.template walk<2>({&p.k, &p.v}, [&](int operand, int t, const Element* tile) {
    if (operand == 1) {
      multiply<kD>(v, scores, tile);
      return;
    }
    scores.clear();
    slopes.clear();
    multiply_together<kD, kMoving>(lefts, tile, [&](int l) -> auto& { return l == 0 ? scores : slopes; });
    rows.exponentials(scores, t);
    for_each_value(scores, [&](int j, int c, int i, float& e) {
      total[i] += e;
      e *= fmaf(slopes.tile[0][j][c] - x.mean[i], slope[i], one[i]);
    });
  });
  add_over_row(total);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) total[i] = total[i] != 0.f ? v_unit / (total[i] * one[i]) : 0.f;
  rows.store(v, a.o, a.type, p.dv, total);
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::fwd(const FwdSm80Args& a, void* stream) {
  const auto run = [&](auto on_grid) {
    using Traits = FwdPortable<Tag, kHeadDim, decltype(on_grid)::value>;
    return launch_portable<Traits>(fwd_portable_kernel<Traits>, a, query_grid<Traits>(a.problem), stream);
  };
  return a.grid.given() ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace nearfield::lla
