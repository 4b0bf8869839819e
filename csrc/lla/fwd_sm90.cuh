// Forward on Hopper: statistics, solve (or a given x), readout, for 128 queries of one head per CTA. Two
// consumer warpgroups hold 64 queries each and all their vectors; one producer thread streams the keys once
// per pass. Plan, budgets and measurements: README.md.
#pragma once

#include "lla/rows_sm90.cuh"
#include "lla/solve_sm90.cuh"

namespace nearfield::lla {

// Sums of the rounded weights that also leave them in shared memory, beside the shift they were made with: a
// thread keeps its own where its mean keys will be.
template <class Traits>
struct KeptWeightSums : WeightSums {
  QueryTile<Traits>& tile;
  int count = 0;  // tiles

  __device__ __forceinline__ explicit KeptWeightSums(QueryTile<Traits>& tile_) : tile(tile_) {}
  __device__ __forceinline__ float2& shift(int n) {
    return reinterpret_cast<float2*>(&tile.s.x[tile.warpgroup][n / 2 * 128 + tile.thread % 128])[n % 2];
  }
  template <class Weights>
  __device__ __forceinline__ void add(const Weights& weights) {
    WeightSums::add(weights);
    const auto words = recast<uint32_t>(weights);
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w)
      tile.kept(count, w) = {words(4 * w), words(4 * w + 1), words(4 * w + 2), words(4 * w + 3)};
    shift(count) = {tile.shift[0], tile.shift[1]};
    ++count;
  }
  // All to the last shift. Shifts are integers, so this changes no digit of a weight above 2^-14.
  __device__ __forceinline__ void finish() {
    for (int n = 0; n < count; ++n) {
      const float2 then = shift(n);
      const __half2 factor[2] = {__float2half2_rn(exp2_approx(fminf(then.x - tile.shift[0], 0.f))),
                                 __float2half2_rn(exp2_approx(fminf(then.y - tile.shift[1], 0.f)))};
      const auto scale = [](uint32_t& word, __half2 by) {
        const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(word), by);
        word = reinterpret_cast<const uint32_t&>(scaled);
      };
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) {
        uint4 words = tile.kept(n, w);
        scale(words.x, factor[0]);
        scale(words.y, factor[1]);
        scale(words.z, factor[0]);
        scale(words.w, factor[1]);
        tile.kept(n, w) = words;
      }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void fwd_consume(typename Traits::Storage& s, const FwdSm90Args& a,
                                            const QueryBlock& block) {
  constexpr int kQuads = Traits::kQuads;
  constexpr bool kResident = Traits::kResident;
  using Tile = QueryTile<Traits>;
  const QueryProblem& p = a.problem;
  Tile tile(s, p, block);
  const int q_head = block.batch * p.heads + block.head, kv_head = block.batch * p.kv_heads + block.kv_head;
  const float q_unit = operand_unit(p.q, q_head), k_unit = operand_unit(p.k, kv_head),
              v_unit = operand_unit(p.v, kv_head);
  tile.scale_log2 = p.scale * q_unit * k_unit * kLog2e;
  half* sQ = s.q[tile.warpgroup];
  tile.copy_tile(sQ, tile.tile_of(p.q));
  tile.sync();

  Tensor v = tile.make_sum();
  Tensor tSrS = tile.make_scores();

  // ---- Statistics: row max, omega = sum_j w_ij, kbar = sum_j w_ij k_j / omega ----
  float top[2] = {-INFINITY, -INFINITY}, omega[2] = {0.f, 0.f}, shrink[2];
  const auto make_sums = [&] {
    if constexpr (kResident) {
      return KeptWeightSums<Traits>(tile);
    } else {
      return WeightSums{};
    }
  };
  auto rounded_omega = make_sums();
  const auto tSrQ = tile.resident(sQ);
  tile.template sweep<Stream::kKeys, 1>(
      v, rounded_omega, tSrS,
      [&](int stage, int) { issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(stage), tSrS); },
      [&](int t) {
        CUTE_UNROLL
        for (int e = 0; e < tile.kScores; ++e) tSrS(e) *= tile.scale_log2;
        tile.mask(tSrS, t);
        float highest[2] = {top[0], top[1]};
        CUTE_UNROLL
        for (int e = 0; e < tile.kScores; ++e)
          highest[tile.row_of(e)] = fmaxf(highest[tile.row_of(e)], tSrS(e));
        tile.max_over_row(highest);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          // The weight of a lone key is one, so that its mean is the key.
          if (kResident && !tile.lone(i)) highest[i] = ceilf(highest[i]);
          // A row that has seen no key has maximum -inf; -inf - -inf would be NaN.
          tile.shift[i] = highest[i] == -INFINITY ? 0.f : highest[i];
          shrink[i] = exp2_approx(top[i] - tile.shift[i]);
          top[i] = highest[i];
          omega[i] *= shrink[i];
        }
        CUTE_UNROLL
        for (int e = 0; e < tile.kScores; e += 2) {
          const int i = tile.row_of(e);
          tSrS(e) = exp2_approx(tSrS(e) - tile.shift[i]);
          tSrS(e + 1) = exp2_approx(tSrS(e + 1) - tile.shift[i]);
          omega[i] += tSrS(e) + tSrS(e + 1);
        }
      },
      [] {},
      [&] {
        CUTE_UNROLL
        for (int e = 0; e < 4 * kQuads; ++e) v(e) *= shrink[tile.row_of(e)];
        rounded_omega.scale(shrink);
      });
  tile.add_over_row(omega);
  if constexpr (kResident) rounded_omega.finish();
  float inverse_omega[2], lse[2];
  const MeanKeys<Traits> kbar{tile, a.kbar, 1.f / k_unit};
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool sees = omega[i] != 0.f;
    lse[i] = sees ? (tile.shift[i] + log2f(omega[i])) * kLn2 : -INFINITY;
    const float inverse = sees ? 1.f / rounded_omega[i] : 0.f;
    // All passes have the rounded weights if those are resident, else only the first.
    inverse_omega[i] = kResident ? inverse : sees ? 1.f / omega[i] : 0.f;
    CUTE_UNROLL
    for (int e = 0; e < 4 * kQuads; ++e)
      if (tile.row_of(e) == i) v(e) *= inverse;
    if (tile.inside[i] && tile.quad == 0) a.lse[tile.output_row(i)] = lse[i];
  }
  if constexpr (Traits::kSizes.kKeepKbar) {
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) *kbar.kept(j) = {v(4 * j), v(4 * j + 1), v(4 * j + 2), v(4 * j + 3)};
  }
  store_rows(tile, a.kbar, p.d, v, {k_unit, k_unit});

  // ---- x, in `v` ----
  if (kResident || a.solve) {
    // g = q - kbar
    const float q_factor = q_unit / k_unit;
    CUTE_UNROLL
    for (int e = 0; e < 4 * kQuads; e += 2) {
      const int i = tile.row_of(e);
      const float2 q = operand_pair(tile, sQ, e);
      const bool sees = omega[i] != 0.f;
      v(e) = sees ? q.x * q_factor - v(e) : 0.f;
      v(e + 1) = sees ? q.y * q_factor - v(e + 1) : 0.f;
    }
    const RowRidge ridge = load_ridge(tile, a.ridge, lse, k_unit);
    ConjugateGradient<Traits, MeanKeys<Traits>> cg{
        tile, kbar, ridge, {inverse_omega[0], inverse_omega[1]}, 1.f};
    solve(tile, cg, v, a.tol, a.max_iters);
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 xj = cg.x(j);
      v(4 * j) = xj.x, v(4 * j + 1) = xj.y, v(4 * j + 2) = xj.z, v(4 * j + 3) = xj.w;
    }
    const float inverse = 1.f / k_unit;
    store_rows(tile, a.x, p.d, v, {inverse, inverse});
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (!tile.inside[i] || tile.quad != 0) continue;
      a.iterations[tile.output_row(i)] = cg.iterations[i];
      a.ratio[tile.output_row(i)] = cg.ratio[i];
    }
  } else if (a.given_16bit.data == nullptr) {
    load_rows(tile, a.given, k_unit, v);
  } else if (a.is_bf16) {
    load_rows(tile, view_as<__nv_bfloat16>(a.given_16bit), k_unit, v);
  } else {
    load_rows(tile, view_as<__half>(a.given_16bit), k_unit, v);
  }

  // ---- Readout: o = sum_j w_ij (1 + x.(k_j - kbar)) v_j / omega, with x in two terms, or in one that holds
  // all bits of a 16-bit x ----
  const bool two_terms = kResident || a.given_16bit.data == nullptr;
  const SplitRows x(tile, v, kbar.gather(), two_terms);
  // The weights are divided by the unit of x where that is above one, so that they stay inside the range of
  // fp16.
  float one[2], slope[2], factor[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    one[i] = fminf(x.inverse[i], 1.f);
    slope[i] = tile.lone(i) ? 0.f : x.unit[i] * one[i];
    factor[i] = v_unit * inverse_omega[i] / one[i];
  }
  Tensor tSrT = tile.make_scores();
  NoWeightSums none;
  if constexpr (kResident) {
    Tensor tSrHigh = make_tensor<half>(accumulator_as_a(v.layout())), tSrLow = make_fragment_like(tSrHigh);
    x.split(v, tSrHigh, tSrLow);
    const auto weigh = [&] {
      warpgroup_fence_operand(tSrT);
      CUTE_UNROLL
      for (int e = 0; e < tile.kScores; e += 2) {
        const int i = tile.row_of(e);
        const float2 weight = tile.recalled_pair(e);
        tSrT(e) = weight.x * fmaf(tSrT(e) - x.mean[i], slope[i], one[i]);
        tSrT(e + 1) = weight.y * fmaf(tSrT(e + 1) - x.mean[i], slope[i], one[i]);
      }
    };
    tile.template sweep<Stream::kPairsSumValues, 2, true>(
        v, none, tSrT,
        [&](int stage, int) {
          issue_gemm<true>(tile.mma_direction, tSrHigh, tile.staged_keys(stage), tSrT);
          issue_gemm<false>(tile.mma_direction, tSrLow, tile.staged_keys(stage), tSrT);
        },
        [](int) {}, weigh, [] {});
    store_rows_16bit(tile, a.is_bf16, a.o, p.dv, v, factor);
    return;
  }
  half *high = reinterpret_cast<half*>(s.r[tile.warpgroup]), *low = high + Traits::kElements;
  tile.sync();  // everyone has read its part of r
  x.store(tile, high, low, v);
  tile.sync();
  const auto tSrHigh = tile.resident(high), tSrLow = tile.resident(low);
  const auto exponentials = [&](int t) { tile.exponentials(tSrS, t); };
  const auto weigh = [&] {
    warpgroup_fence_operand(tSrT);
    CUTE_UNROLL
    for (int e = 0; e < tile.kScores; ++e) {
      const int i = tile.row_of(e);
      tSrS(e) *= fmaf(tSrT(e) - x.mean[i], slope[i], one[i]);
    }
  };
  if (two_terms) {
    tile.template sweep<Stream::kPairsSumValues, 3>(
        v, none, tSrS,
        [&](int stage, int) {
          issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(stage), tSrS);
          issue_gemm<true>(tile.mma_s, tSrHigh, tile.staged_keys(stage), tSrT);
          issue_gemm<false>(tile.mma_s, tSrLow, tile.staged_keys(stage), tSrT);
        },
        exponentials, weigh, [] {});
  } else {
    tile.template sweep<Stream::kPairsSumValues, 2>(
        v, none, tSrS,
        [&](int stage, int) {
          issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(stage), tSrS);
          issue_gemm<true>(tile.mma_s, tSrHigh, tile.staged_keys(stage), tSrT);
        },
        exponentials, weigh, [] {});
  }
  store_rows_16bit(tile, a.is_bf16, a.o, p.dv, v, factor);
}

template <class Traits>
__device__ __forceinline__ void fwd_produce(typename Traits::Storage& s, const FwdSm90Args& a,
                                            const QueryBlock& block) {
  Producer<Traits> producer(s, a.problem, block);
  producer.load_keys(block.tiles.begin, block.tiles.end);
  if (a.solve) stream_solve(producer, block.tiles, a.max_iters);
  producer.load_pairs(block.tiles);
}

template <class Traits>
__device__ __forceinline__ void fwd_roles(typename Traits::Storage& s, const FwdSm90Args& a,
                                          const QueryBlock& block) {
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) fwd_produce<Traits>(s, a, block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    fwd_consume<Traits>(s, a, block);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) fwd_kernel(const __grid_constant__ FwdSm90Args a) {
  auto& s = *reinterpret_cast<typename Traits::Storage*>(dynamic_shared);
  prepare_barriers<Traits>(s);
  fwd_roles<Traits>(s, a, QueryBlock(a.problem, blockIdx.x));
}

template <class Traits>
int launch_fwd(const FwdSm90Args& a, void* stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(fwd_kernel<Traits>, kShared)) return e;
  const int grid = a.problem.query_blocks() * a.problem.batch * a.problem.heads;
  fwd_kernel<Traits><<<grid, Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

template <int kHeadDim>
int fwd_sm90<kHeadDim>::run(const FwdSm90Args& a, void* stream) {
  if constexpr (resident_tiles(kHeadDim) > 0) {
    if (a.problem.resident) return launch_fwd<QueryTraits<kHeadDim, false, true>>(a, stream);
  }
  return launch_fwd<QueryTraits<kHeadDim>>(a, stream);
}

}  // namespace nearfield::lla
