// Backward on every GPU since Ampere, the pass that holds keys: dk and dv. The warps of a CTA keep 16 keys
// each and walk over tiles of queries with everything the pair terms need of them; GQA visits the heads of
// its group in turn. All products are transposed, keys are rows, as in bwd_key_sm90.cuh:
//
//   S = K Q^T, T = K X^T, R = V dO^T - K Y^T        a = 1 + x.(k - kbar), r = Gam - Gbar - y.(k - kbar)
//   dV += (P o a) dO,  dK += scale dS Q + (P o r) X - (P o a) Y      dS = P o (a r - D)
#pragma once

#include "lla/sweep_sm80.cuh"

namespace nearfield::lla {

// A weight is p times this times PairUnits::share.
constexpr float kPairUnitSm80 = 256.f, kPairLog2Sm80 = 8.f;

// Residents: K, V. Moving: Q, X, -Y, dO.
template <class Tag, int kHeadDim, bool kOnGrid>
using KeyPortable =
    PortableTraits<Tag, kHeadDim, kOnGrid, (sizeof(operand_t<Tag>) == 4 && kHeadDim > 64) ? 2 : 4, 2,
                   (sizeof(operand_t<Tag>) == 2 ? 32 : 16) / (kHeadDim <= 64 ? 1 : 2), 4>;

// The powers of two (and the scale) of one query head.
struct PairUnits {
  float scale_log2;
  float one, slope;            // one a = one + slope (T - xbar)
  float share, ds, r;          // factors of the weights of a, of a r - D and of r
  float v_scale;               // of products with V, which then are in the units of Y
  float dv_factor, dk_factor;  // of the accumulators

  __device__ __forceinline__ PairUnits(const BwdSm80Args& a, int head, int kv_head) {
    const QueryProblem& p = a.problem;
    const float k_unit = operand_unit(p.k, kv_head), q_unit = operand_unit(p.q, head);
    const float d_unit = operand_unit(a.d_o, head), gam_unit = d_unit * operand_unit(p.v, kv_head);
    const float x_unit = k_unit * operand_unit(a.x_tiles, head), y_unit = operand_unit(a.minus_y_tiles, head);
    const float qk = p.scale * q_unit * k_unit;
    scale_log2 = qk * kLog2eSm80;
    one = fminf(1.f / x_unit, 1.f);
    slope = x_unit * one;
    share = fminf(1.f / operand_unit(fabsf(qk)), 1.f);
    ds = qk * share;
    r = slope * share;
    v_scale = 1.f / y_unit;
    dv_factor = d_unit / (kPairUnitSm80 * share * one);
    dk_factor = gam_unit * y_unit / (k_unit * kPairUnitSm80 * share * one);
  }
};

// One warp per query. From the operands as they were rounded, so that x.k - x.kbar and y.k - y.kbar stay
// centred.
template <class Element, int kD>
__global__ void __launch_bounds__(256) pair_rows_portable_kernel(const __grid_constant__ BwdSm80Args a) {
  const QueryProblem& p = a.problem;
  const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  const int rows = p.q.tiles_per_head * kTileRows;  // a multiple of 8
  const int64_t source = (static_cast<int64_t>(head / p.heads) * p.m + row) * p.heads + head % p.heads;
  const float lse = row < p.m ? a.lse[source] : -INFINITY;
  PairRow out{0.f, 0.f, 0.f, INFINITY, 0.f};  // a query that sees nothing: exp2(anything - inf) = 0
  if (lse != -INFINITY) {
    const int kv_head = head / p.heads * p.kv_heads + head % p.heads / (p.heads / p.kv_heads);
    const PairUnits units(a, head, kv_head);
    const float inverse = 1.f / operand_unit(p.k, kv_head);
    const Element* xs = operand_of<Element, kD>(a.x_tiles, head);
    const Element* ys = operand_of<Element, kD>(a.minus_y_tiles, head);
    float xbar = 0.f, ybar = 0.f;
    for (int c = lane; c < p.d; c += 32) {
      const int64_t at = operand_offset<Element, kD>(row, c);
      const float mean = a.kbar[source * p.d + c] * inverse;
      xbar += static_cast<float>(xs[at]) * mean;
      ybar += static_cast<float>(ys[at]) * mean;
    }
    for (int o = 16; o > 0; o /= 2) {
      xbar += __shfl_xor_sync(0xffffffffu, xbar, o);
      ybar += __shfl_xor_sync(0xffffffffu, ybar, o);
    }
    const RowSums sums = a.row_sums[source];
    const bool lone = a.grid.given() ? a.grid.reach(row, false).count() == 1 : p.visible.lone(row);
    out = {xbar, sums.gbar * units.v_scale + ybar, units.one * units.v_scale * sums.d,
           whole_log2(lse, lone) - kPairLog2Sm80, sums.weight};
  }
  if (lane == 0) a.pair_rows[static_cast<int64_t>(head) * rows + row] = out;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    bwd_dkv_portable_kernel(const __grid_constant__ BwdSm80Args a) {
  extern __shared__ __align__(16) char shared[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(shared);
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kQueries = Traits::kMoving;
  enum { kQ, kX, kY, kDo };
  const QueryProblem& p = a.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  // The first keys of a causal problem are seen most: they start first.
  const int heads = p.batch * p.kv_heads, first = static_cast<int>(blockIdx.x) / heads * Traits::kRows;
  const int kv_head = static_cast<int>(blockIdx.x) % heads, batch = kv_head / p.kv_heads;
  const int group = p.heads / p.kv_heads, first_head = batch * p.heads + kv_head % p.kv_heads * group;
  const int own = first + warp * 16;
  int key[2];
  // Visits of tiles of queries; on a grid they go along its boxes, else a visit is the tile's number.
  Range seen_by[2], all_seen_by{0, 0};
  int begin, end;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) key[i] = own + lane / 4 + 8 * i;
  if constexpr (Traits::kOnGrid) {
    const Grid::Tiles boxes = a.grid.reached(first / kBoxRows, true);
    begin = 0, end = boxes.total() * Traits::kTilesOfBox;
    if (threadIdx.x == 0) s.boxes = boxes;
    if (threadIdx.x < Traits::kRows) s.reach[threadIdx.x] = a.grid.reach(first + threadIdx.x, true);
    __syncthreads();
  } else {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i)
      seen_by[i] = key[i] < p.n ? p.visible.any_seen_by(key[i], key[i]) : Range{0, 0};
    if (own + 15 < p.n)
      all_seen_by = {p.visible.any_seen_by(own + 15, own + 15).begin, p.visible.any_seen_by(own, own).end};
    const Range queries = p.visible.any_seen_by(first, min(first + Traits::kRows, p.n) - 1);
    begin = min(queries.begin, p.m - 1) / kQueries;
    end = max(begin + 1, (queries.end + kQueries - 1) / kQueries);
  }

  const auto start = [&](int head, int n, int buffer) {
    int t = n;
    if constexpr (Traits::kOnGrid)
      t = s.boxes.at(n / Traits::kTilesOfBox) * Traits::kTilesOfBox + n % Traits::kTilesOfBox;
    const Operand* const operands[4] = {&p.q, &a.x_tiles, &a.minus_y_tiles, &a.d_o};
    CUTE_UNROLL
    for (int o = 0; o < 4; ++o) {
      copy_rows<Element, kD, kQueries, Traits::kThreads>(
          s.moving[buffer][o], operand_of<Element, kD>(*operands[o], first_head + head), t * kQueries,
          threadIdx.x);
    }
    if (threadIdx.x < 2 * kQueries) {
      const PairRow* from = a.pair_rows +
                            static_cast<int64_t>(first_head + head) * p.q.tiles_per_head * kTileRows +
                            t * kQueries;
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
          reinterpret_cast<const cute::uint128_t*>(from)[threadIdx.x],
          reinterpret_cast<cute::uint128_t*>(s.pairs[buffer])[threadIdx.x]);
    }
  };
  static_assert(2 * kQueries <= Traits::kThreads && sizeof(PairRow) == 32);

  // Rows of K and V that lie beyond their tiles are never seen; they stay out of the reading, too.
  Element* sK = s.resident[0] + warp * 16 * Traits::kRow;
  Element* sV = s.resident[1] + warp * 16 * Traits::kRow;
  if (own < p.k.tiles_per_head * kTileRows) {
    copy_rows<Element, kD, 16, 32>(sK, operand_of<Element, kD>(p.k, kv_head), own, lane);
    copy_rows<Element, kD, 16, 32>(sV, operand_of<Element, kD>(p.v, kv_head), own, lane);
  }
  if (!Traits::kOnGrid || begin < end) start(0, begin, 0);

  PairUnits units(a, first_head, kv_head);
  typename Traits::Vector dk, dv;
  typename Traits::Scores scores, slopes, r, minus_y;
  dk.clear();
  dv.clear();
  int head = 0, buffer = 0;
  for (int t = begin; head < group && (!Traits::kOnGrid || begin < end); buffer ^= 1) {
    wait_for_copies();  // this tile has arrived, and everyone has read the one before
    int next_head = head, next = t + 1;
    if (next == end) next = begin, ++next_head;
    if (next_head < group) start(next_head, next, buffer ^ 1);

    const Element(&moving)[4][kQueries * Traits::kRow] = s.moving[buffer];
    scores.clear();
    slopes.clear();
    r.clear();
    minus_y.clear();
    multiply_transposed<kD>(r, sV, moving[kDo]);
    multiply_transposed<kD>(scores, sK, moving[kQ]);
    multiply_transposed<kD>(slopes, sK, moving[kX]);
    multiply_transposed<kD>(minus_y, sK, moving[kY]);
    const int query = t * kQueries;
    const bool masked = query < all_seen_by.begin || query + kQueries > all_seen_by.end;
    uint64_t seen[2];  // bit 8 j + c is the thread's own column
    if constexpr (Traits::kOnGrid) {
      int box[3];
      s.boxes.at(t / Traits::kTilesOfBox, box);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i)
        seen[i] = a.grid.rows_reached(s.reach[key[i] - first], box) >>
                  (t % Traits::kTilesOfBox * kQueries + 2 * quad);
    }
    CUTE_UNROLL
    for (int j = 0; j < kQueries / 8; ++j) {
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * j + 2 * quad + c;
        const PairRow row = s.pairs[buffer][column];
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& at = scores.tile[0][j][2 * i + c];
          float& slope = slopes.tile[0][j][2 * i + c];
          float& rest = r.tile[0][j][2 * i + c];
          float exponent = fmaf(at, units.scale_log2, -row.shift);
          const bool hidden = Traits::kOnGrid ? (seen[i] >> (8 * j + c) & 1) == 0
                                              : masked && (query + column < seen_by[i].begin ||
                                                           query + column >= seen_by[i].end);
          if (hidden) exponent = -INFINITY;
          const float w = exp2_approx(exponent) * row.weight;
          const float to = fmaf(slope - row.xbar, units.slope, units.one);
          const float gap = fmaf(rest, units.v_scale, minus_y.tile[0][j][2 * i + c]) - row.rbar;
          at = w * units.share * to;
          slope = w * units.ds * fmaf(to, gap, -row.d);
          rest = w * units.r * gap;
        }
      }
    }
    multiply<kD>(dv, scores, moving[kDo]);
    multiply<kD>(dk, scores, moving[kY]);
    multiply<kD>(dk, slopes, moving[kQ]);
    multiply<kD>(dk, r, moving[kX]);

    if (next_head != head && next_head < group) {  // the sums so far go over to the units of the next head
      const PairUnits other(a, first_head + next_head, kv_head);
      const float to_v = units.dv_factor / other.dv_factor, to_k = units.dk_factor / other.dk_factor;
      for_each_value(dv, [&](int, int, int, float& e) { e *= to_v; });
      for_each_value(dk, [&](int, int, int, float& e) { e *= to_k; });
      units = other;
    }
    head = next_head, t = next;
  }

  const auto store = [&](void* out, int features, typename Traits::Vector& v, float factor) {
    for_each_value(v, [&](int j, int c, int i, float x) {
      const int column = 8 * j + 2 * quad + c % 2;
      if (key[i] >= p.n || column >= features) return;
      const int64_t row = (static_cast<int64_t>(batch) * p.n + key[i]) * p.kv_heads + kv_head % p.kv_heads;
      store_element(out, a.type, row * features + column, x * factor);
    });
  };
  store(a.dk, p.d, dk, units.dk_factor);
  store(a.dv, p.dv, dv, units.dv_factor);
}

template <class Tag, int kHeadDim>
int portable_sm80<Tag, kHeadDim>::bwd_dkv(const BwdSm80Args& a, void* stream) {
  const QueryProblem& p = a.problem;
  const dim3 rows(static_cast<unsigned>(p.q.tiles_per_head * kTileRows / 8),
                  static_cast<unsigned>(p.batch * p.heads));
  pair_rows_portable_kernel<operand_t<Tag>, kHeadDim><<<rows, 256, 0, static_cast<cudaStream_t>(stream)>>>(a);
  const auto run = [&](auto on_grid) {
    using Traits = KeyPortable<Tag, kHeadDim, decltype(on_grid)::value>;
    const int64_t grid = int64_t{(p.n + Traits::kRows - 1) / Traits::kRows} * p.batch * p.kv_heads;
    return launch_portable<Traits>(bwd_dkv_portable_kernel<Traits>, a, grid, stream);
  };
  return a.grid.given() ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace nearfield::lla
