// Backward on Hopper, the passes that hold queries: h = sum_j p_ij (Gam_ij - Gbar_i) k_j, the second solve y
// = A^-1 h, and dq. Every row is written by its own CTA, so there is nothing to reduce and the result is the
// same bit for bit. The roles, the storage and the sweeps are those of the forward. Units: BwdSm90Args.
#pragma once

#include "lla/rows_sm90.cuh"
#include "lla/solve_sm90.cuh"

namespace nearfield::lla {

// The row maximum is not saved. Weights are about p times this, so that rows of up to 2^16 keys stay above
// the underflow of fp16.
constexpr float kWeightUnit = 64.f, kWeightLog2 = 6.f;

template <class Traits>
__device__ __forceinline__ void bwd_query_consume(typename Traits::Storage& s, const BwdSm90Args& a,
                                                  const QueryBlock& block) {
  constexpr int kD = Traits::kHeadDim, kQuads = Traits::kQuads;
  constexpr bool kResident = Traits::kResident;
  using Tile = QueryTile<Traits>;
  const QueryProblem& p = a.problem;
  const bool solves = kResident || a.solve;
  Tile tile(s, p, block);
  const int q_head = block.batch * p.heads + block.head, kv_head = block.batch * p.kv_heads + block.kv_head;
  const float k_unit = operand_unit(p.k, kv_head),
              gam_unit = operand_unit(a.d_o, q_head) * operand_unit(p.v, kv_head);
  tile.scale_log2 = p.scale * operand_unit(p.q, q_head) * k_unit * kLog2e;
  half* sQ = s.q[tile.warpgroup];
  half *sX = reinterpret_cast<half*>(s.r[tile.warpgroup]),
       *sXlow = sX + Traits::kElements;  // of the last sweep
  half *sY = reinterpret_cast<half*>(s.x[tile.warpgroup]),
       *sDo = sY + Traits::kElements;  // dO of the first as well
  tile.copy_tile(sQ, tile.tile_of(p.q));
  tile.copy_tile(sDo, tile.tile_of(a.d_o));
  tile.sync();

  Tensor v = tile.make_sum();
  // With resident weights the kept mean keys have the place of dO and y, during the solve alone.
  const MeanKeys<Traits> kbar{tile, a.kbar, 1.f / k_unit};
  const MeanKeys<Traits, Traits::kSizes.kKeepKbar && !kResident> kbar_of_last{tile, a.kbar, 1.f / k_unit};
  const auto keep_means = [&] {
    if constexpr (Traits::kSizes.kKeepKbar) {
      float4 means[kQuads];
      kbar.read(means);
      CUTE_UNROLL
      for (int j = 0; j < kQuads; ++j) *kbar.kept(j) = means[j];
    }
  };
  if constexpr (!kResident) keep_means();
  float lse[2], d_inverse[2];  // 1 over the unit of a row of dO
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    lse[i] = tile.inside[i] ? a.lse[tile.output_row(i)] : -INFINITY;
    tile.shift[i] = whole_shift(lse[i], tile.lone(i)) - kWeightLog2;
  }
  CUTE_UNROLL
  for (int e = 0; e < 4 * kQuads; e += 2) {
    const float2 pair = operand_pair(tile, sDo, e);
    v(e) = pair.x, v(e + 1) = pair.y;
  }
  SplitRows::largest_of_rows(tile, v, d_inverse);
  float d_unit[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    d_unit[i] = operand_unit(d_inverse[i]);
    d_inverse[i] = 1.f / d_unit[i];
  }

  const auto tSrQ = tile.resident(sQ), tSrDo = tile.resident(sDo);
  Tensor tSrS = tile.make_scores();
  Tensor tSrR = tile.make_scores();

  // ---- The sum of the weights; h, in `v`, and Gbar, both over the unit of the row of dO ----
  float omega[2] = {0.f, 0.f}, gbar[2] = {0.f, 0.f};
  WeightSums h_sum;
  tile.template sweep<Stream::kPairsSumKeys, 2>(
      v, h_sum, tSrS,
      [&](int key, int value) {
        issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(key), tSrS);
        issue_gemm<true>(tile.mma_s, tSrDo, tile.staged_keys(value), tSrR);
      },
      [&](int t) {
        tile.exponentials(tSrS, t);
        if constexpr (kResident) tile.keep(tSrS, t - tile.tiles.begin);
        CUTE_UNROLL
        for (int e = 0; e < tile.kScores; ++e) omega[tile.row_of(e)] += tSrS(e);
      },
      [&] {
        warpgroup_fence_operand(tSrR);
        CUTE_UNROLL
        for (int e = 0; e < tile.kScores; ++e) {
          const int i = tile.row_of(e);
          tSrS(e) *= tSrR(e) * d_inverse[i];
          gbar[i] += tSrS(e);
        }
      },
      [] {});
  if constexpr (kResident) {
    tile.sync();  // dO has been read
    keep_means();
  }
  tile.add_over_row(omega);
  tile.add_over_row(gbar);
  float inverse_omega[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (omega[i] == 0.f) omega[i] = kWeightUnit;  // sees no key
    inverse_omega[i] = 1.f / omega[i];
  }
  // sum_j E_ij (k_j - kbar) is h whatever constant is taken off Gam. It is solved for over a power of two per
  // row.
  const auto means_of_h = kbar.gather();
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 mean = means_of_h(j);
    CUTE_UNROLL
    for (int e = 4 * j; e < 4 * j + 4; ++e) {
      const int i = tile.row_of(e);
      const float m = e % 4 == 0 ? mean.x : e % 4 == 1 ? mean.y : e % 4 == 2 ? mean.z : mean.w;
      v(e) = (v(e) - h_sum[i] * m) * inverse_omega[i];
    }
  }
  float h_unit[2];
  SplitRows::largest_of_rows(tile, v, h_unit);
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    gbar[i] *= inverse_omega[i];
    h_unit[i] = operand_unit(h_unit[i]);
    const float inverse = 1.f / h_unit[i];
    CUTE_UNROLL
    for (int e = 0; e < 4 * kQuads; ++e)
      if (tile.row_of(e) == i) v(e) *= inverse;
  }
  tile.sync();  // dO has been read: the solver's x takes its place

  // ---- y; D_i = lam_i x_i.y_i + x_i.e_i, or x_i.h_i for a given x ----
  const RowRidge ridge = solves ? load_ridge(tile, a.ridge, lse, k_unit) : RowRidge{};
  ConjugateGradient<Traits, MeanKeys<Traits>> cg{
      tile, kbar, ridge, {inverse_omega[0], inverse_omega[1]}, 0.f};
  if (solves) {
    solve(tile, cg, v, a.tol, a.max_iters);
  } else {
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      cg.r(j) = {v(4 * j), v(4 * j + 1), v(4 * j + 2), v(4 * j + 3)};
      cg.x(j) = {0.f, 0.f, 0.f, 0.f};
    }
    const float unit = k_unit * gam_unit;
    store_rows(tile, a.dx, p.d, v, {unit * d_unit[0] * h_unit[0], unit * d_unit[1] * h_unit[1]});
  }
  load_rows(tile, a.x, k_unit, v);
  float ridge_term[2] = {0.f, 0.f}, rest[2] = {0.f, 0.f}, xy[2] = {0.f, 0.f}, d_lse[2], lam_factor[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float absolute = a.ridge.absolute && lse[i] != -INFINITY ? expf(-lse[i]) : 1.f;
    lam_factor[i] =
        lse[i] == -INFINITY ? 0.f : -absolute * gam_unit * d_unit[i] * h_unit[i] / (k_unit * k_unit);
  }
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 y = cg.x(j), r = cg.r(j);
    CUTE_UNROLL
    for (int e = 4 * j; e < 4 * j + 4; ++e) {
      const int i = tile.row_of(e);
      const float product = v(e) * cg.get(y, e % 4);
      xy[i] += product;
      ridge_term[i] += (solves ? ridge.at(i, tile.column_of(e)) : 0.f) * product;
      rest[i] += v(e) * cg.get(r, e % 4);
      if (solves && a.ridge.channels > 1 && tile.inside[i] && tile.column_of(e) < p.d)
        a.dlam[tile.output_row(i) * p.d + tile.column_of(e)] = lam_factor[i] * product;
    }
  }
  tile.add_over_row(xy);
  tile.add_over_row(ridge_term);
  tile.add_over_row(rest);
  float d_sum[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    d_lse[i] = a.ridge.absolute ? ridge_term[i] * h_unit[i] : 0.f;
    d_sum[i] = (ridge_term[i] + rest[i]) * h_unit[i] - d_lse[i];
    if (!tile.inside[i] || tile.quad != 0) continue;
    if (solves && a.ridge.channels == 1) a.dlam[tile.output_row(i)] = lam_factor[i] * xy[i];
    a.row_sums[tile.output_row(i)] = {gbar[i] * d_unit[i], d_sum[i] * d_unit[i],
                                      kWeightUnit * inverse_omega[i]};
  }

  // ---- dq = scale sum_j dS_ij k_j + y; dS = p (a r - D), where r is one chain of products [dO, -y] [V, K]^T
  // ----
  const auto means = kbar_of_last.gather();
  const SplitRows x(tile, v, means);
  {
    // Rows that see one key are blanked in the operand.
    const float inverse = 1.f / k_unit, largest[2] = {tile.lone(0) ? 0.f : x.largest[0] * inverse,
                                                      tile.lone(1) ? 0.f : x.largest[1] * inverse};
    note_largest(a.x_tiles.largest + q_head, fmaxf(largest[0], largest[1]));
  }
  Tensor tSrX = make_tensor<half>(accumulator_as_a(v.layout())), tSrXlow = make_fragment_like(tSrX);
  if constexpr (kResident) {
    x.split(v, tSrX, tSrXlow);
  } else {
    tile.sync();  // everyone has read its part of the residual
    x.store(tile, sX, sXlow, v);
  }
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 y = cg.x(j);
    CUTE_UNROLL
    for (int e = 4 * j; e < 4 * j + 4; ++e) v(e) = -cg.get(y, e % 4) * h_unit[tile.row_of(e)];
  }
  store_rows(tile, a.minus_y, p.d, v, d_unit);
  float y_inverse[2], ybar[2] = {0.f, 0.f};
  SplitRows::largest_of_rows(tile, v, y_inverse);
  note_largest(a.minus_y_tiles.largest + q_head, fmaxf(tile.inside[0] ? y_inverse[0] * d_unit[0] : 0.f,
                                                       tile.inside[1] ? y_inverse[1] * d_unit[1] : 0.f));
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) y_inverse[i] = fminf(1.f / operand_unit(y_inverse[i]), 1.f);
  tile.sync();  // everyone has read its part of y
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 mean = means(j);
    CUTE_UNROLL
    for (int e = 4 * j; e < 4 * j + 4; e += 2) {
      const int i = tile.row_of(e);
      const int where = tile_offset<kD>(tile.tile_row() + 8 * i, 8 * j) + 2 * tile.quad;
      const __half2 y = __floats2half2_rn(v(e) * y_inverse[i], v(e + 1) * y_inverse[i]);
      *reinterpret_cast<__half2*>(sY + where) = y;
      ybar[i] += __low2float(y) * (i == 0 ? mean.x : mean.z) + __high2float(y) * (i == 0 ? mean.y : mean.w);
      // dO again, in the scale of y
      const __half2 d_o = *reinterpret_cast<const __half2*>(tile.tile_of(a.d_o) + where);
      const float factor = d_inverse[i] * y_inverse[i];
      *reinterpret_cast<__half2*>(sDo + where) =
          __floats2half2_rn(__low2float(d_o) * factor, __high2float(d_o) * factor);
    }
  }
  tile.add_over_row(ybar);
  tile.sync();

  float one[2], slope[2], rbar[2], offset[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    one[i] = fminf(x.inverse[i], 1.f);
    slope[i] = x.unit[i] * one[i];
    rbar[i] = y_inverse[i] * gbar[i] + ybar[i];
    offset[i] = one[i] * y_inverse[i] * d_sum[i];
  }
  Tensor tSrT = tile.make_scores();
  const auto tSrY = tile.resident(sY);
  WeightSums dq_sum;
  const auto issue_r = [&](int key, int value) {
    issue_gemm<true>(tile.mma_s, tSrDo, tile.staged_keys(value), tSrR);
    issue_gemm<false>(tile.mma_s, tSrY, tile.staged_keys(key), tSrR);
  };
  const auto ds_over_p = [&](int e) {
    const int i = tile.row_of(e);
    const float slopes = fmaf(tSrT(e) - x.mean[i], slope[i], one[i]);
    return fmaf(slopes, tSrR(e) - rbar[i], -offset[i]);
  };
  if constexpr (kResident) {
    tile.template sweep<Stream::kPairsSumKeys, 4, true>(
        v, dq_sum, tSrT,
        [&](int key, int value) {
          issue_gemm<true>(tile.mma_direction, tSrX, tile.staged_keys(key), tSrT);
          issue_gemm<false>(tile.mma_direction, tSrXlow, tile.staged_keys(key), tSrT);
          issue_r(key, value);
        },
        [](int) {},
        [&] {
          warpgroup_fence_operand(tSrT);
          warpgroup_fence_operand(tSrR);
          CUTE_UNROLL
          for (int e = 0; e < tile.kScores; e += 2) {
            const float2 weight = tile.recalled_pair(e);
            tSrT(e) = weight.x * ds_over_p(e);
            tSrT(e + 1) = weight.y * ds_over_p(e + 1);
          }
        },
        [] {});
  } else {
    const auto tSsX = tile.resident(sX), tSsXlow = tile.resident(sXlow);
    tile.template sweep<Stream::kPairsSumKeys, 5>(
        v, dq_sum, tSrS,
        [&](int key, int value) {
          issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(key), tSrS);
          issue_gemm<true>(tile.mma_s, tSsX, tile.staged_keys(key), tSrT);
          issue_gemm<false>(tile.mma_s, tSsXlow, tile.staged_keys(key), tSrT);
          issue_r(key, value);
        },
        [&](int t) { tile.exponentials(tSrS, t); },
        [&] {
          warpgroup_fence_operand(tSrT);
          warpgroup_fence_operand(tSrR);
          CUTE_UNROLL
          for (int e = 0; e < tile.kScores; ++e) tSrS(e) *= ds_over_p(e);
        },
        [] {});
  }
  // sum_j dS_ij k_j = sum_j dS_ij (k_j - kbar_i) + d_lse_i kbar_i
  float dq_factor[2], row_sum[2];
  const float y_factor = -gam_unit / k_unit;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float weight_unit = omega[i] * one[i] * y_inverse[i];
    row_sum[i] = dq_sum[i] - weight_unit * d_lse[i];
    dq_factor[i] = p.scale * k_unit * gam_unit * d_unit[i] / weight_unit;
  }
  const auto means_of_dq = kbar_of_last.gather();
  CUTE_UNROLL
  for (int j = 0; j < kQuads; ++j) {
    const float4 mean = means_of_dq(j);
    CUTE_UNROLL
    for (int e = 4 * j; e < 4 * j + 4; e += 2) {
      const int i = tile.row_of(e);
      float2 minus_y{0.f, 0.f};
      if (tile.inside[i] && 8 * j < p.d)
        minus_y =
            *reinterpret_cast<const float2*>(a.minus_y + tile.output_row(i) * p.d + 8 * j + 2 * tile.quad);
      v(e) = (v(e) - row_sum[i] * (i == 0 ? mean.x : mean.z)) * dq_factor[i] + minus_y.x * y_factor;
      v(e + 1) = (v(e + 1) - row_sum[i] * (i == 0 ? mean.y : mean.w)) * dq_factor[i] + minus_y.y * y_factor;
    }
  }
  store_rows_16bit(tile, a.is_bf16, a.dq, p.d, v, {1.f, 1.f});
}

template <class Traits>
__device__ __forceinline__ void bwd_query_produce(typename Traits::Storage& s, const BwdSm90Args& a,
                                                  const QueryBlock& block) {
  Producer<Traits> producer(s, a.problem, block);
  producer.load_pairs(block.tiles);
  if (a.solve) stream_solve(producer, block.tiles, a.max_iters);
  producer.load_pairs(block.tiles);
}

template <class Traits>
__device__ __forceinline__ void bwd_query_roles(typename Traits::Storage& s, const BwdSm90Args& a,
                                                const QueryBlock& block) {
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) bwd_query_produce<Traits>(s, a, block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    bwd_query_consume<Traits>(s, a, block);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_query_kernel(const __grid_constant__ BwdSm90Args a) {
  auto& s = *reinterpret_cast<typename Traits::Storage*>(dynamic_shared);
  prepare_barriers<Traits>(s);
  bwd_query_roles<Traits>(s, a, QueryBlock(a.problem, blockIdx.x));
}

template <class Traits>
int launch_bwd_query(const BwdSm90Args& a, void* stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_query_kernel<Traits>, kShared)) return e;
  const int grid = a.problem.query_blocks() * a.problem.batch * a.problem.heads;
  bwd_query_kernel<Traits><<<grid, Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

template <int kHeadDim>
int bwd_query_sm90<kHeadDim>::run(const BwdSm90Args& a, void* stream) {
  if constexpr (resident_tiles(kHeadDim) > 0) {
    if (a.problem.resident) return launch_bwd_query<QueryTraits<kHeadDim, false, true>>(a, stream);
  }
  return launch_bwd_query<QueryTraits<kHeadDim>>(a, stream);
}

}  // namespace nearfield::lla
