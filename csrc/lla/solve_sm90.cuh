// Conjugate gradients for the 64 rows of a consumer warpgroup, each row a system of its own (README.md,
// cpu_solve.h).
//
// The direction is rounded to fp16 (over a power of two per row) and *is* that rounded vector: x and r take
// steps along what the matrix product saw, so r stays the residual of x, and the step alpha = r.p / p.A p is
// the best along it. It lives in registers as the left operand of its products; r and x live in shared
// memory, or in registers as well where the weights are resident.
#pragma once

#include "lla/sweep_sm90.cuh"

namespace nearfield::lla {

// The ridge of a thread's two rows, in operand units.
struct RowRidge {
  const float* row[2];  // per channel: the row of lam; null for a row that sees nothing
  int64_t channel_stride;
  bool per_channel;
  float factor[2];  // multiplies lam
  float value[2];   // of all channels
  int channels;

  __device__ __forceinline__ float at(int i, int column) const {
    return per_channel ? of_channel(i, column) : value[i];
  }
  __device__ __forceinline__ float of_channel(int i, int column) const {
    return row[i] != nullptr && column < channels ? row[i][column * channel_stride] * factor[i] : 1.f;
  }
};

// lam_i, or lam_i exp(-lse_i) for an absolute ridge, over key_unit^2. A row without keys gets 1.
template <class Tile>
__device__ __forceinline__ RowRidge load_ridge(const Tile& tile, const Ridge<float>& ridge,
                                               const float (&lse)[2], float key_unit) {
  constexpr float kLargest =
      1e25f;  // exp(-lse) may overflow; a ridge this large already is softmax attention
  RowRidge out;
  out.per_channel = ridge.channels > 1;
  out.channel_stride = ridge.stride[3];
  out.channels = tile.p.d;
  const float inverse = 1.f / key_unit;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool sees = tile.inside[i] && lse[i] != -INFINITY;
    out.row[i] = sees ? ridge.data + tile.block.batch * ridge.stride[0] + tile.row[i] * ridge.stride[1] +
                            tile.block.head * ridge.stride[2]
                      : nullptr;
    const float factor = ridge.absolute ? expf(-lse[i]) : 1.f;
    out.factor[i] = fminf(factor, kLargest) * inverse * inverse;
    out.value[i] = sees && !out.per_channel ? fminf(kLargest, *out.row[i] * factor) * inverse * inverse : 1.f;
  }
  return out;
}

template <class Traits, class Kbar>
struct ConjugateGradient {
  using Tile = QueryTile<Traits>;
  static constexpr int kD = Traits::kHeadDim, kQuads = Traits::kQuads;
  static constexpr bool kInRegisters = Traits::kResident;  // r and x
  using Sum = decltype(partition_fragment_C(typename Traits::MmaSum{}, cute::Shape<_64, Int<kD>>{}));
  using Direction = decltype(make_tensor<half>(accumulator_as_a(Sum{}.layout())));

  Tile& tile;
  const Kbar& kbar;  // MeanKeys
  const RowRidge& ridge;
  float inverse_omega[2];  // 1 / sum of the weights of a row
  float unit_of_acc;       // 1: error relative to the size of the weights, 0: to x itself

  Direction direction;
  float unit[2];  // the direction is unit * direction
  float pbar[2];  // direction . kbar
  float rp[2];    // r . direction
  float rz[2], acc[2], ratio[2];
  int iterations[2];
  bool live[2];
  float4 own_r[kInRegisters ? kQuads : 1], own_x[kInRegisters ? kQuads : 1];

  static constexpr float kExhausted = 1.1754944e-38f / 1.1920929e-7f;

  __device__ __forceinline__ float4& r(int j) {
    if constexpr (kInRegisters) return own_r[j];
    return tile.s.r[tile.warpgroup][j * 128 + tile.thread % 128];
  }
  __device__ __forceinline__ float4& x(int j) {
    if constexpr (kInRegisters) return own_x[j];
    return tile.s.x[tile.warpgroup][j * 128 + tile.thread % 128];
  }
  static __device__ __forceinline__ float get(const float4& v, int e) {
    return e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
  }

  // `v` is the right-hand side.
  __device__ __forceinline__ void start(const Sum& v) {
    rz[0] = rz[1] = 0.f;
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      r(j) = float4{v(4 * j), v(4 * j + 1), v(4 * j + 2), v(4 * j + 3)};
      x(j) = float4{0.f, 0.f, 0.f, 0.f};
      CUTE_UNROLL
      for (int e = 4 * j; e < 4 * j + 4; ++e) rz[Tile::row_of(e)] += v(e) * v(e);
    }
    Tile::add_over_row(rz);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      live[i] = !(rz[i] < kExhausted);  // a NaN lives on, and shows in the result
      acc[i] = 0.f;
      iterations[i] = 0;
      ratio[i] = live[i] ? INFINITY : 0.f;
    }
    form_direction<true>(v, {0.f, 0.f}, kbar.gather());
  }

  __device__ __forceinline__ bool any_live() const { return __any_sync(0xffffffffu, live[0] || live[1]); }

  // v = sum_j E_ij k_j of the direction and row_sum = sum_j E_ij; takes the step and forms the next
  // direction. Leaves the residual in v.
  __device__ __forceinline__ void step(Sum& v, const WeightSums& row_sum, float tol2) {
    const auto means = kbar.gather();
    float pap[2] = {0.f, 0.f};
    const auto finish_product = [&](const auto& ridge_at) {
      CUTE_UNROLL
      for (int j = 0; j < kQuads; ++j) {
        const float4 mean = means(j);
        CUTE_UNROLL
        for (int e = 4 * j; e < 4 * j + 4; ++e) {
          const int i = Tile::row_of(e);
          const float p = static_cast<float>(direction(e));
          v(e) = (v(e) - row_sum[i] * get(mean, e % 4)) * inverse_omega[i] + ridge_at(i, e) * p;
          pap[i] += p * v(e);
        }
      }
    };
    if (ridge.per_channel) {
      finish_product([&](int i, int e) { return ridge.of_channel(i, tile.column_of(e)); });
    } else {
      finish_product([&](int i, int) { return ridge.value[i]; });
    }
    Tile::add_over_row(pap);
    float alpha[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (pap[i] < 1.1754944e-38f) live[i] = false;  // not positive: possible through rounding only
      alpha[i] = live[i] ? rp[i] / pap[i] : 0.f;
    }
    float rz_new[2] = {0.f, 0.f};
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      float4 xj = x(j);
      const float4 rj = r(j);
      CUTE_UNROLL
      for (int e = 4 * j; e < 4 * j + 4; ++e) {
        const int i = Tile::row_of(e);
        v(e) = get(rj, e % 4) - alpha[i] * v(e);
        rz_new[i] += v(e) * v(e);
      }
      xj.x += alpha[0] * static_cast<float>(direction(4 * j));
      xj.y += alpha[0] * static_cast<float>(direction(4 * j + 1));
      xj.z += alpha[1] * static_cast<float>(direction(4 * j + 2));
      xj.w += alpha[1] * static_cast<float>(direction(4 * j + 3));
      x(j) = xj;
      r(j) = float4{v(4 * j), v(4 * j + 1), v(4 * j + 2), v(4 * j + 3)};
    }
    Tile::add_over_row(rz_new);
    float beta[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (live[i]) {
        const float removed = alpha[i] * rp[i];
        acc[i] += removed;
        const float remaining = removed / (unit_of_acc + acc[i]);
        const bool exact = rz_new[i] < kExhausted;
        ++iterations[i];
        ratio[i] = exact ? 0.f : sqrtf(remaining);
        if (exact || remaining <= tol2) live[i] = false;
      }
      beta[i] = live[i] ? rz_new[i] / rz[i] * unit[i] : 0.f;
      rz[i] = rz_new[i];
    }
    form_direction<false>(v, beta, means);
  }

 private:
  // The next direction, residual + beta direction. It is formed twice, the first time for its largest
  // element: so the residual stays in registers, for the product with what was rounded.
  template <bool kFirst, class Means>
  __device__ __forceinline__ void form_direction(const Sum& residual, const float (&beta)[2],
                                                 const Means& means) {
    const auto exact = [&](int e) {
      if constexpr (kFirst) {
        return residual(e);
      } else {
        return fmaf(beta[Tile::row_of(e)], static_cast<float>(direction(e)), residual(e));
      }
    };
    float largest[2] = {0.f, 0.f}, inverse[2];
    CUTE_UNROLL
    for (int e = 0; e < 4 * kQuads; ++e)
      largest[Tile::row_of(e)] = fmaxf(largest[Tile::row_of(e)], fabsf(exact(e)));
    Tile::max_over_row(largest);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      unit[i] = operand_unit(live[i] ? largest[i] : 0.f);
      inverse[i] = 1.f / unit[i];
      pbar[i] = rp[i] = 0.f;
    }
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 mean = means(j);
      CUTE_UNROLL
      for (int e = 4 * j; e < 4 * j + 4; e += 2) {
        const int i = Tile::row_of(e);
        __half2 h = __floats2half2_rn(exact(e) * inverse[i], exact(e + 1) * inverse[i]);
        if (!live[i]) h = __half2{};
        recast<uint32_t>(direction)(e / 2) = reinterpret_cast<const uint32_t&>(h);
        const float2 p = __half22float2(h);
        pbar[i] += p.x * get(mean, e % 4) + p.y * get(mean, e % 4 + 1);
        rp[i] += p.x * residual(e) + p.y * residual(e + 1);
      }
    }
    Tile::add_over_row(pbar);
    Tile::add_over_row(rp);
  }
};

// Solves in place of x: sweeps until every row of the CTA has stopped. The producer's side is stream_solve.
template <class Traits, class Cg>
__device__ __forceinline__ void solve(QueryTile<Traits>& tile, Cg& cg, typename Cg::Sum& v, float tol,
                                      int max_iters) {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  auto& s = tile.s;
  const int ahead = min(Traits::kStages, tile.block.tiles.end - tile.block.tiles.begin);
  Tensor tSrT = tile.make_scores();
  const auto issue_slopes = [&](int stage) {
    issue_gemm<true>(tile.mma_direction, cg.direction, tile.staged_keys(stage), tSrT);
  };
  cg.start(v);
  bool alive = true;  // any row of the warp
  for (int it = 0; it < max_iters; ++it) {
    // A warp with a row to go on with knows the verdict, and does not wait for the other warpgroup.
    if (!alive) {
      Barrier::wait(&s.bar_verdict, (it - 1) % 2);
      CUTE_UNROLL
      for (int w = 0; w < Traits::kConsumerWarps; ++w) alive |= s.alive[(it - 1) % 2][w] != 0;
      if (!alive) {
        tile.skip(ahead);
        break;
      }
    }
    WeightSums row_sum;
    if constexpr (Traits::kResident) {
      tile.template sweep<Stream::kKeys, 1, true>(
          v, row_sum, tSrT, [&](int stage, int) { issue_slopes(stage); },
          [&](int) {
            warpgroup_fence_operand(tSrT);
            CUTE_UNROLL
            for (int e = 0; e < tile.kScores; e += 2) {
              const float2 p = tile.recalled_pair(e);
              tSrT(e) = p.x * (tSrT(e) - cg.pbar[tile.row_of(e)]);
              tSrT(e + 1) = p.y * (tSrT(e + 1) - cg.pbar[tile.row_of(e)]);
            }
          },
          [] {}, [] {});
    } else {
      Tensor tSrS = tile.make_scores();
      const auto tSrQ = tile.resident(s.q[tile.warpgroup]);
      tile.template sweep<Stream::kKeys, 2>(
          v, row_sum, tSrS,
          [&](int stage, int) {
            issue_gemm<true>(tile.mma_s, tSrQ, tile.staged_keys(stage), tSrS);
            issue_slopes(stage);
          },
          [&](int t) { tile.exponentials(tSrS, t); },
          [&] {
            warpgroup_fence_operand(tSrT);
            CUTE_UNROLL
            for (int e = 0; e < tile.kScores; ++e) tSrS(e) *= tSrT(e) - cg.pbar[tile.row_of(e)];
          },
          [] {});
    }
    cg.step(v, row_sum, tol * tol);
    if (it + 1 < max_iters) {
      alive = cg.any_live();
      if (it > 0) Barrier::wait(&s.bar_verdict, (it - 1) % 2);  // all have voted on the iteration before
      if (tile.thread % 32 == 0) {
        s.alive[it % 2][tile.thread / 32] = alive;
        Barrier::arrive(&s.bar_verdict);
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void stream_solve(Producer<Traits>& producer, Range tiles, int max_iters) {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  auto& s = producer.s;
  const int ahead = min(Traits::kStages, tiles.end - tiles.begin);
  for (int it = 0; it < max_iters; ++it) {
    // The first tiles of an iteration are on their way before it is known whether there will be one.
    producer.load_keys(tiles.begin, tiles.begin + ahead);
    if (it > 0) {
      Barrier::arrive(&s.bar_verdict);
      Barrier::wait(&s.bar_verdict, (it - 1) % 2);
      bool alive = false;
      for (int w = 0; w < Traits::kConsumerWarps; ++w) alive |= s.alive[(it - 1) % 2][w] != 0;
      if (!alive) return;
    }
    producer.load_keys(tiles.begin + ahead, tiles.end);
  }
}

}  // namespace nearfield::lla
