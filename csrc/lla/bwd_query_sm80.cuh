// Backward on every GPU since Ampere, the passes that hold queries, in two kernels so that their operands fit
// shared memory: h = sum_j p_ij (Gam_ij - Gbar_i) k_j and the second solve y = A^-1 h; then dq. The passes
// and units are those of bwd_query_sm90.cuh.
#pragma once

#include "lla/solve_sm80.cuh"

namespace nearfield::lla {

// Weights are p times this, so that rows of up to 2^16 keys stay above the underflow of fp16.
constexpr float kWeightUnitSm80 = 64.f, kWeightLog2Sm80 = 6.f;

// Residents: Q; dO, later the direction.
template <class Tag, int kHeadDim, bool kOnGrid>
using SolvePortable = PortableTraits<Tag, kHeadDim, kOnGrid, 4, 2,
                                     sizeof(operand_t<Tag>) == 2 ? 64
                                     : kHeadDim <= 64            ? 32
                                                                 : 16>;
// Residents: Q, dO, -y, x and (fp16 only) what rounding leaves of it.
template <class Tag, int kHeadDim, bool kOnGrid>
using DqPortable =
    PortableTraits<Tag, kHeadDim, kOnGrid, kHeadDim <= 64 ? 4 : 2, sizeof(operand_t<Tag>) == 2 ? 5 : 4,
                   sizeof(operand_t<Tag>) == 2 ? (kHeadDim <= 64 ? 64 : 32) : (kHeadDim <= 64 ? 32 : 16)>;

// Sets the shift of a row's exponent to the integer next to its lse, the same number in all passes whatever
// integer they add: exp2(s - lse) would carry the rounding of lse. The rest is a factor, 1 over the sum of
// the weights.
template <class Rows>
__device__ __forceinline__ void shift_by_lse(Rows& rows, const float* saved, float (&lse)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    lse[i] = rows.inside[i] ? saved[rows.output_row(i)] : -INFINITY;
    rows.shift[i] = whole_log2(lse[i], rows.fit[i] == 0.f) - kWeightLog2Sm80;
  }
}

// 1 over the power of two above a row of a resident.
template <class Rows>
__device__ __forceinline__ void units_of_resident(const Rows& rows, int which, float (&unit)[2]) {
  unit[0] = unit[1] = 0.f;
  CUTE_UNROLL
  for (int j = 0; j < Rows::kQuads; ++j) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float2 pair = load_operand_pair(rows.pair_at(which, j, i));
      unit[i] = fmaxf(unit[i], fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  max_over_row(unit);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) unit[i] = operand_unit(unit[i]);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    bwd_solve_portable_kernel(const __grid_constant__ BwdSm80Args a) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kQuads = Traits::kQuads;
  const QueryProblem& p = a.problem;
  QueryRows<Traits> rows(s, a);
  const float k_unit = operand_unit(p.k, rows.kv_head),
              gam_unit = operand_unit(a.d_o, rows.head) * operand_unit(p.v, rows.kv_head);
  rows.scale_log2 = p.scale * operand_unit(p.q, rows.head) * k_unit * kLog2eSm80;
  rows.load_resident(0, p.q);
  rows.load_resident(1, a.d_o);
  float4 *r_kept = rows.scratch(a.scratch, 0), *y_kept = rows.scratch(a.scratch, 1),
         *kbar = rows.scratch(a.scratch, 2);
  typename Traits::Vector v;
  typename Traits::Scores scores, gam;
  rows.load(v, rows.dense(a.kbar), 1.f / k_unit);
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j)
    kbar[32 * j] = float4{v.tile[0][j][0], v.tile[0][j][1], v.tile[0][j][2], v.tile[0][j][3]};
  float lse[2], d_unit[2], d_inverse[2];
  shift_by_lse(rows, a.lse, lse);
  units_of_resident(rows, 1, d_unit);
  d_inverse[0] = 1.f / d_unit[0], d_inverse[1] = 1.f / d_unit[1];

  // ---- h, in `v`, and Gbar, both over the unit of the row of dO; sum_j p_ij ----
  float omega[2] = {0.f, 0.f}, gbar[2] = {0.f, 0.f}, row_sum[2] = {0.f, 0.f};
  v.clear();
  rows.template walk<2>({&p.v, &p.k}, [&](int operand, int t, const Element* tile) {
    if (operand == 0) {
      gam.clear();
      multiply_transposed<kD>(gam, rows.resident(1), tile);
      return;
    }
    scores.clear();
    multiply_transposed<kD>(scores, rows.resident(0), tile);
    rows.exponentials(scores, t);
    for_each_value(scores, [&](int j, int c, int i, float& e) {
      omega[i] += e;
      e *= gam.tile[0][j][c] * d_inverse[i];
      gbar[i] += e;
    });
    rows.round(scores, row_sum);
    multiply<kD>(v, scores, tile);
  });
  add_over_row(omega);
  add_over_row(gbar);
  add_over_row(row_sum);
  float inverse_omega[2], h_unit[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    inverse_omega[i] = omega[i] != 0.f ? 1.f / omega[i] : 0.f;
    gbar[i] *= inverse_omega[i];
  }
  // sum_j E_ij (k_j - kbar) is h whatever constant is taken off Gam. It is solved for over a power of two per
  // row.
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 mean = kbar[32 * j];
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      float& h = v.tile[0][j][c];
      h = rows.fit[c / 2] != 0.f ? (h - row_sum[c / 2] * value_of(mean, c)) * inverse_omega[c / 2] : 0.f;
    }
  }
  largest_of_rows(v, h_unit);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) h_unit[i] = operand_unit(h_unit[i]);
  for_each_value(v, [&](int, int, int i, float& h) { h *= 1.f / h_unit[i]; });

  // ---- y; D_i = lam_i x_i.y_i + x_i.e_i, or x_i.h_i for a given x ----
  const RowRidgeSm80 ridge = a.solve ? RowRidgeSm80(rows, a.ridge, lse, k_unit) : RowRidgeSm80();
  if (a.solve) {
    ConjugateGradientSm80<Traits, 0, 1> cg{
        rows, ridge, r_kept, y_kept, kbar, {inverse_omega[0], inverse_omega[1]}, 0.f};
    cg.solve(v, a.tol, a.max_iters);
  } else {
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      r_kept[32 * j] = float4{v.tile[0][j][0], v.tile[0][j][1], v.tile[0][j][2], v.tile[0][j][3]};
      y_kept[32 * j] = float4{0.f, 0.f, 0.f, 0.f};
    }
    const float unit = k_unit * gam_unit;
    rows.store(v, a.dx, nearfield::Element::kFp32, p.d,
               {unit * d_unit[0] * h_unit[0], unit * d_unit[1] * h_unit[1]});
  }
  rows.load(v, a.x, k_unit);
  float ridge_term[2] = {0.f, 0.f}, rest[2] = {0.f, 0.f}, xy[2] = {0.f, 0.f}, lam_factor[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float absolute = a.ridge.absolute && lse[i] != -INFINITY ? expf(-lse[i]) : 1.f;
    lam_factor[i] =
        lse[i] == -INFINITY ? 0.f : -absolute * gam_unit * d_unit[i] * h_unit[i] / (k_unit * k_unit);
  }
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 y = y_kept[32 * j], rj = r_kept[32 * j];
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int i = c / 2, column = rows.column_of(j, c);
      float& x = v.tile[0][j][c];
      const float product = x * value_of(y, c);
      xy[i] += product;
      if (a.solve) ridge_term[i] += ridge.at(i, column) * product;
      rest[i] += x * value_of(rj, c);
      if (a.solve && a.ridge.channels > 1 && rows.inside[i] && column < p.d)
        a.dlam[rows.output_row(i) * p.d + column] = lam_factor[i] * product;
      x = -value_of(y, c) * h_unit[i];  // of minus y, over d_unit
    }
  }
  add_over_row(xy);
  add_over_row(ridge_term);
  add_over_row(rest);
  rows.store(v, a.minus_y, nearfield::Element::kFp32, p.d, d_unit);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (!rows.inside[i] || rows.quad != 0) continue;
    const float d_lse = a.ridge.absolute ? ridge_term[i] * h_unit[i] : 0.f;
    const float d = (ridge_term[i] + rest[i]) * h_unit[i] - d_lse;
    if (a.solve && a.ridge.channels == 1) a.dlam[rows.output_row(i)] = lam_factor[i] * xy[i];
    a.row_sums[rows.output_row(i)] = {gbar[i] * d_unit[i], d * d_unit[i], kWeightUnitSm80 * inverse_omega[i]};
    a.d_lse[rows.output_row(i)] = d_lse * d_unit[i];
  }
}

// dq = scale sum_j dS_ij k_j + y; dS = p (a r - D), r = Gam - Gbar - y.(k - kbar)
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    bwd_dq_portable_kernel(const __grid_constant__ BwdSm80Args a) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kQuads = Traits::kQuads, kMoving = Traits::kMoving;
  constexpr bool kSplit = Traits::kIsHalf;
  const QueryProblem& p = a.problem;
  QueryRows<Traits> rows(s, a);
  const float k_unit = operand_unit(p.k, rows.kv_head),
              gam_unit = operand_unit(a.d_o, rows.head) * operand_unit(p.v, rows.kv_head);
  rows.scale_log2 = p.scale * operand_unit(p.q, rows.head) * k_unit * kLog2eSm80;
  rows.load_resident(0, p.q);
  rows.load_resident(1, a.d_o);
  float4* kbar = rows.scratch(a.scratch, 2);
  const auto mean_keys = [&](int j) { return kbar[32 * j]; };
  typename Traits::Vector v;
  rows.load(v, rows.dense(a.kbar), 1.f / k_unit);
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j)
    kbar[32 * j] = float4{v.tile[0][j][0], v.tile[0][j][1], v.tile[0][j][2], v.tile[0][j][3]};
  float lse[2], d_unit[2], d_inverse[2];
  shift_by_lse(rows, a.lse, lse);
  units_of_resident(rows, 1, d_unit);
  d_inverse[0] = 1.f / d_unit[0], d_inverse[1] = 1.f / d_unit[1];
  rows.load(v, a.x, k_unit);
  const auto x = rows.round_to_resident(v, 3, kSplit ? 4 : -1, mean_keys);
  rows.load(v, rows.dense(a.minus_y), 1.f);
  for_each_value(v, [&](int, int, int i, float& e) { e *= d_inverse[i]; });
  const auto y = rows.round_to_resident(v, 2, -1, mean_keys);

  // Everything is over the unit of the row of dO, and over that of -y where that is above one.
  float one[2], slope[2], y_one[2], y_scale[2], gam_scale[2], factor[2], rbar[2], offset[2], d_lse[2],
      row_sum[2] = {0.f, 0.f};
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool sees = lse[i] != -INFINITY;
    const RowSums sums = sees ? a.row_sums[rows.output_row(i)] : RowSums{0.f, 0.f, 0.f};
    d_lse[i] = sees ? a.d_lse[rows.output_row(i)] * d_inverse[i] : 0.f;
    one[i] = fminf(x.inverse[i], 1.f);
    slope[i] = x.unit[i] * one[i];
    y_one[i] = fminf(y.inverse[i], 1.f);
    y_scale[i] = y.unit[i] * y_one[i];
    gam_scale[i] = y_one[i] * d_inverse[i];
    factor[i] = sums.weight;
    rbar[i] = gam_scale[i] * sums.gbar + y_scale[i] * y.mean[i];
    offset[i] = one[i] * gam_scale[i] * sums.d;
  }
  typename Traits::Scores scores, slopes, gam, minus_y;
  constexpr int kLefts = kSplit ? 4 : 3;
  const Element* lefts[kLefts] = {rows.resident(0), rows.resident(2), rows.resident(3)};
  if constexpr (kSplit) lefts[3] = rows.resident(4);
  v.clear();
  rows.template walk<2>({&p.v, &p.k}, [&](int operand, int t, const Element* tile) {
    if (operand == 0) {
      gam.clear();
      multiply_transposed<kD>(gam, rows.resident(1), tile);
      return;
    }
    scores.clear();
    slopes.clear();
    minus_y.clear();
    multiply_together<kD, kMoving>(lefts, tile, [&](int l) -> auto& {
      return l == 0 ? scores : l == 1 ? minus_y : slopes;
    });
    rows.exponentials(scores, t);
    for_each_value(scores, [&](int j, int c, int i, float& e) {
      const float to = fmaf(slopes.tile[0][j][c] - x.mean[i], slope[i], one[i]);
      const float r = gam.tile[0][j][c] * gam_scale[i] + (minus_y.tile[0][j][c] * y_scale[i] - rbar[i]);
      e *= factor[i] * fmaf(to, r, -offset[i]);
    });
    rows.round(scores, row_sum);
    multiply<kD>(v, scores, tile);
  });
  add_over_row(row_sum);
  // sum_j dS_ij k_j = sum_j dS_ij (k_j - kbar_i) + d_lse_i kbar_i
  float dq_factor[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float unit = kWeightUnitSm80 * one[i] * y_one[i];
    row_sum[i] -= unit * d_lse[i];
    dq_factor[i] = rows.fit[i] * p.scale * k_unit * gam_unit * d_unit[i] / unit;
  }
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 mean = kbar[32 * j];
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int i = c / 2, column = rows.column_of(j, c);
      const float y_back =
          rows.inside[i] && column < p.d ? a.minus_y[rows.output_row(i) * p.d + column] : 0.f;
      float& dq = v.tile[0][j][c];
      dq = (dq - row_sum[i] * value_of(mean, c)) * dq_factor[i] - y_back * (gam_unit / k_unit);
    }
  }
  rows.store(v, a.dq, a.type, p.d, {1.f, 1.f});
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_queries(const BwdSm80Args& a, void* stream) {
  const auto run = [&](auto on_grid) {
    using Traits = SolvePortable<Tag, kHeadDim, decltype(on_grid)::value>;
    return launch_portable<Traits>(bwd_solve_portable_kernel<Traits>, a, query_grid<Traits>(a.problem),
                                   stream);
  };
  return a.grid.given() ? run(std::true_type{}) : run(std::false_type{});
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_dq(const BwdSm80Args& a, void* stream) {
  const auto run = [&](auto on_grid) {
    using Traits = DqPortable<Tag, kHeadDim, decltype(on_grid)::value>;
    return launch_portable<Traits>(bwd_dq_portable_kernel<Traits>, a, query_grid<Traits>(a.problem), stream);
  };
  return a.grid.given() ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace nearfield::lla
