// Backward on Hopper, the pass that holds keys: dk and dv. A CTA keeps 128 keys of one head, a tile of 64 per
// consumer warpgroup, and streams tiles of 64 queries with everything the pair terms need of them; GQA visits
// the heads of its group in turn. All products are transposed, keys are rows:
//
//   S = K Q^T, T = K X^T, R = [V, -K] [dO, Y]^T        a = 1 + x.(k - kbar), r = Gam - Gbar - y.(k - kbar)
//   dV += (P o a) dO,  dK += scale dS Q + (P o r) X - (P o a) Y      dS = P o (a r - D)
//
// The products of the next queries are issued before the sums of these; exponentials run as soon as S is
// there. Units: BwdSm90Args; what varies with
// the query comes as one PairRow, what varies with the head is a power of two in HeadUnits.
#pragma once

#include "lla/rows_sm90.cuh"

namespace nearfield::lla {

// A weight is about p times this times share_of().
constexpr float kPairUnit = 256.f, kPairLog2 = 8.f;

// A power of two for the weights, so that dS = p (a r - D), which has the scale of q.k, is no larger than
// they are.
__device__ __forceinline__ float share_of(const QueryProblem& p, float q_unit, float k_unit) {
  return fminf(1.f / operand_unit(fabsf(p.scale * q_unit * k_unit)), 1.f);
}

// ---- Per query: the operands X and Y; shift of the exponent, x.kbar, r's constant, D's ----

// Eight features of a row of floats, 0 where there are none.
__device__ __forceinline__ void load_floats(const float* at, bool there, float (&out)[8]) {
  if (there && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 word = reinterpret_cast<const float4*>(at)[i];
      out[4 * i] = word.x, out[4 * i + 1] = word.y, out[4 * i + 2] = word.z, out[4 * i + 3] = word.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = there ? at[i] : 0.f;
  }
}

// Writes eight features as fp16 over a unit; returns the product of what was written with `mean`.
__device__ __forceinline__ float write_piece(const Operand& operand, int64_t at, float inverse,
                                             const float (&v)[8], const float (&mean)[8]) {
  __align__(16) __half2 packed[4];
  float product = 0.f;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    packed[e] = __floats2half2_rn(v[2 * e] * inverse, v[2 * e + 1] * inverse);
    const float2 rounded = __half22float2(packed[e]);
    product += rounded.x * mean[2 * e] + rounded.y * mean[2 * e + 1];
  }
  *reinterpret_cast<uint4*>(static_cast<__half*>(operand.tiles) + at) =
      *reinterpret_cast<const uint4*>(packed);
  return product;
}

// Grid: (tiles of Q, B * heads). x.kbar and y.kbar are taken from the operands as they were rounded, so that
// x.k - x.kbar and y.k - y.kbar stay exactly centred. `is_lone` says which rows see one key: x of those is
// zero, and so are the operands of rows that see none.
template <int kHeadDim, class IsLone>
__global__ void __launch_bounds__(256)
    write_pairs_kernel(const __grid_constant__ BwdSm90Args a, const __grid_constant__ IsLone is_lone) {
  constexpr int kLanes = kHeadDim / 8, kRows = 256 / kLanes;  // of a row, at once
  const QueryProblem& p = a.problem;
  const int tile = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kLanes, column = lane * 8;
  const int b = head / p.heads, h = head % p.heads;
  const int kv_head = b * p.kv_heads + h / (p.heads / p.kv_heads);
  const float k_unit = operand_unit(p.k, kv_head), k_inverse = 1.f / k_unit;
  const float x_unit = operand_unit(a.x_tiles, head), x_inverse = 1.f / x_unit;
  const float y_inverse = 1.f / operand_unit(a.minus_y_tiles, head);
  const float one = fminf(1.f / (k_unit * x_unit), 1.f);
  const float share = share_of(p, operand_unit(p.q, head), k_unit);
  const int64_t tile_of_head = static_cast<int64_t>(head) * p.q.tiles_per_head + tile;
#pragma unroll
  for (int n = 0; n < kTileRows / kRows; ++n) {
    const int in_tile = n * kRows + threadIdx.x / kLanes, row = tile * kTileRows + in_tile;
    const int64_t source = (static_cast<int64_t>(b) * p.m + row) * p.heads + h;
    const float lse = row < p.m ? a.lse[source] : -INFINITY;
    const bool sees = lse != -INFINITY, lone = sees && is_lone(row), there = sees && column < p.d;
    float x[8], minus_y[8], mean[8];
    load_floats(a.x.row(b, there ? row : 0, h) + column, there && !lone, x);
    load_floats(a.minus_y + source * p.d + column, there, minus_y);
    load_floats(a.kbar + source * p.d + column, there, mean);
#pragma unroll
    for (int e = 0; e < 8; ++e) mean[e] *= k_inverse;
    const int64_t at = tile_of_head * tile_elements(kHeadDim) + tile_offset<kHeadDim>(in_tile, column);
    float xbar = write_piece(a.x_tiles, at, x_inverse, x, mean);
    float ybar = write_piece(a.minus_y_tiles, at, y_inverse, minus_y, mean);
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) {
      xbar += __shfl_xor_sync(0xffffffffu, xbar, o);
      ybar += __shfl_xor_sync(0xffffffffu, ybar, o);
    }
    if (lane != 0) continue;
    PairRow out{0.f, 0.f, 0.f, INFINITY, 0.f};  // a query that sees nothing: exp2(anything - inf) = 0
    if (sees) {
      const RowSums sums = a.row_sums[source];
      out = {xbar, y_inverse * sums.gbar + ybar, one * y_inverse * sums.d, whole_shift(lse, lone) - kPairLog2,
             sums.weight * share};
    }
    a.pair_rows[tile_of_head * kTileRows + in_tile] = out;
  }
}

// ---- Layouts and storage ----

// kOnGrid: who sees whom is said by a grid, else by Visibility.
template <int kHeadDim_, bool kOnGrid_ = false>
struct KeyTraits {
  static constexpr bool kOnGrid = kOnGrid_;
  static constexpr int kHeadDim = kHeadDim_, kElements = tile_elements(kHeadDim);
  static constexpr KeyTileSizes kSizes = key_tile(kHeadDim);
  static constexpr int kStages = kSizes.kStages, kQueries = kSizes.kQueries, kParts = kTileRows / kQueries;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128, kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  using AtomK = typename QueryTraits<kHeadDim>::AtomK;
  using AtomMN = typename QueryTraits<kHeadDim>::AtomMN;
  using LayoutK = typename QueryTraits<kHeadDim>::LayoutQ;  // (64, D)
  // Stages hold four operands each: Q, X, Y, dO.
  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<_64, Int<kHeadDim>, Int<4 * kStages>>{}));
  using LayoutQt = decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kHeadDim>, _64, Int<4 * kStages>>{},
                                          Step<_2, _1, _3>{}));
  using ShapeS = cute::Shape<_64, Int<kQueries>, Int<kHeadDim>>;
  using MmaS =
      std::conditional_t<kSizes.kKeysInRegisters,
                         decltype(make_tiled_mma(GMMA::rs_op_selector<half, half, float, ShapeS>())),
                         decltype(make_tiled_mma(GMMA::ss_op_selector<half, half, float, ShapeS>()))>;
  using MmaSum = decltype(make_tiled_mma(
      GMMA::rs_op_selector<half, half, float, cute::Shape<_64, Int<kHeadDim>, Int<kQueries>>, GMMA::Major::K,
                           GMMA::Major::MN>()));

  struct alignas(1024) Storage {
    alignas(1024) half k[kConsumers][kElements];
    alignas(1024) half v[kConsumers][kElements];
    alignas(1024) half stage[kStages][4][kElements];
    alignas(16) PairRow rows[kStages][kTileRows];
    Ring<kStages> ring;
    std::conditional_t<kOnGrid, GridRows, char> grid;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

enum StagedOperand : int { kStagedQ, kStagedX, kStagedY, kStagedDo };

struct KeyBlock {
  int batch, kv_head;
  int key_tile[2];  // of the consumer warpgroups
  Range tiles;      // of queries that see any of the 128 keys; at least one; on a grid, visits
  int group;
  __device__ __forceinline__ KeyBlock(const QueryProblem& p, int index) {
    const int heads = p.batch * p.kv_heads;
    const int block = index / heads;  // the first keys of a causal problem are seen most
    key_tile[0] = p.mix_key_lengths ? block : 2 * block;
    key_tile[1] = p.mix_key_lengths ? 2 * p.key_blocks() - 1 - block : key_tile[0] + 1;
    batch = index % heads / p.kv_heads;
    kv_head = index % p.kv_heads;
    group = p.heads / p.kv_heads;
    const Range low = tiles_of(p, key_tile[0]), high = tiles_of(p, key_tile[1]);
    tiles = {min(low.begin, high.begin), max(low.end, high.end)};
  }
  // Of a tile that lies beyond n: those of the last key.
  static __device__ __forceinline__ Range tiles_of(const QueryProblem& p, int key_tile) {
    const int first = min(key_tile * kTileRows, p.n - 1);
    const Range queries = p.visible.any_seen_by(first, min(first + kTileRows, p.n) - 1);
    const int begin = min(queries.begin, p.m - 1) / kTileRows;
    return {begin, max(begin + 1, (queries.end + kTileRows - 1) / kTileRows)};
  }
};

// The powers of two (and the scale) of one query head.
struct HeadUnits {
  float scale_log2;
  float qk;                    // scale of the logits
  float one, slope;            // a' = one + slope (T - xbar), one * a
  float v_scale;               // of V, so that products with it are in the units of Y
  float dv_factor, dk_factor;  // of the accumulators

  __device__ __forceinline__ HeadUnits(const BwdSm90Args& a, int head, int kv_head) {
    const QueryProblem& p = a.problem;
    const float k_unit = operand_unit(p.k, kv_head), q_unit = operand_unit(p.q, head);
    const float d_unit = operand_unit(a.d_o, head), gam_unit = d_unit * operand_unit(p.v, kv_head);
    const float x_unit = k_unit * operand_unit(a.x_tiles, head), y_unit = operand_unit(a.minus_y_tiles, head);
    const float share = share_of(p, q_unit, k_unit);
    qk = p.scale * q_unit * k_unit;
    scale_log2 = qk * kLog2e;
    one = fminf(1.f / x_unit, 1.f);
    slope = x_unit * one;
    v_scale = 1.f / y_unit;
    dv_factor = d_unit / (kPairUnit * share * one);
    dk_factor = gam_unit * y_unit / (k_unit * kPairUnit * share * one);
  }
};

// ---- Producer: one thread ----

template <class Traits>
__device__ __forceinline__ void bwd_key_produce(typename Traits::Storage& s, const BwdSm90Args& a,
                                                const KeyBlock& block) {
  constexpr int kBytes = Traits::kElements * 2, kRowBytes = kTileRows * sizeof(PairRow);
  const QueryProblem& p = a.problem;
  RingIndex<Traits::kStages> at;
  for (int g = 0; g < block.group; ++g) {
    const int64_t head = static_cast<int64_t>(block.batch) * p.heads + block.kv_head * block.group + g;
    for (int t = block.tiles.begin; t < block.tiles.end; ++t) {
      int64_t tile = head * p.q.tiles_per_head;
      if constexpr (Traits::kOnGrid) {
        tile += s.grid.at(t);
      } else {
        tile += t;
      }
      s.ring.wait_empty(at);
      s.ring.expect_bytes(at, 4 * kBytes + kRowBytes);
      const void* operands[4] = {p.q.tiles, a.x_tiles.tiles, a.minus_y_tiles.tiles, a.d_o.tiles};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        SM90_BULK_COPY_G2S::copy(static_cast<const half*>(operands[i]) + tile * Traits::kElements,
                                 &s.ring.full[at.stage], s.stage[at.stage][i], kBytes);
      SM90_BULK_COPY_G2S::copy(a.pair_rows + tile * kTileRows, &s.ring.full[at.stage], s.rows[at.stage],
                               kRowBytes);
      at.advance();
    }
  }
}

// ---- Consumers ----

template <class Traits>
__device__ __forceinline__ void bwd_key_consume(typename Traits::Storage& s, const BwdSm90Args& a,
                                                const KeyBlock& block) {
  constexpr int kD = Traits::kHeadDim, kQueries = Traits::kQueries, kParts = Traits::kParts;
  constexpr bool kInRegisters = Traits::kSizes.kKeysInRegisters;
  const QueryProblem& p = a.problem;
  const int thread = threadIdx.x - 128, warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0),
            quad = thread % 4;
  const int key_tile = warpgroup == 0 ? block.key_tile[0] : block.key_tile[1];
  const int first_key = key_tile * kTileRows;
  const int first_head = block.batch * p.heads + block.kv_head * block.group;
  const int kv_head = block.batch * p.kv_heads + block.kv_head;
  int key[2];
  Range seen_by[2];
  const int tile_row = thread % 128 / 32 * 16 + thread % 32 / 4;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    key[i] = first_key + tile_row + 8 * i;
    seen_by[i] = key[i] < p.n ? p.visible.any_seen_by(key[i], key[i]) : Range{0, 0};
  }
  const int last_key = first_key + kTileRows - 1;
  const Range all_seen_by = last_key < p.n ? Range{p.visible.any_seen_by(last_key, last_key).begin,
                                                   p.visible.any_seen_by(first_key, first_key).end}
                                           : Range{0, 0};

  HeadUnits units(a, first_head, kv_head);
  half *sK_data = s.k[warpgroup], *sV_data = s.v[warpgroup];
  const auto load_tile = [&](half* to, const Operand& operand, float factor) {
    const bool there = key_tile < operand.tiles_per_head;
    const half* from =
        static_cast<const half*>(operand.tiles) +
        (static_cast<int64_t>(kv_head) * operand.tiles_per_head + key_tile) * Traits::kElements;
    const __half2 factors = __float2half2_rn(factor);
#pragma unroll 4
    for (int i = thread % 128; i < Traits::kElements / 8; i += 128) {
      uint4 piece{0, 0, 0, 0};
      if (there) piece = reinterpret_cast<const uint4*>(from)[i];
      __half2* pairs = reinterpret_cast<__half2*>(&piece);
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) pairs[e] = __hmul2(pairs[e], factors);
      reinterpret_cast<uint4*>(to)[i] = piece;
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
  };
  load_tile(sK_data, p.k, 1.f);
  load_tile(sV_data, p.v, units.v_scale);  // again when the head changes

  Tensor sK = make_tensor(make_smem_ptr(sK_data), typename Traits::LayoutK{});          // (keys, D)
  Tensor sV = make_tensor(make_smem_ptr(sV_data), typename Traits::LayoutK{});          // (keys, D)
  Tensor sQ = make_tensor(make_smem_ptr(s.stage[0][0]), typename Traits::LayoutQ{});    // (64, D, 4 * stage)
  Tensor sQt = make_tensor(make_smem_ptr(s.stage[0][0]), typename Traits::LayoutQt{});  // (D, 64, 4 * stage)
  Tensor sQpart =
      local_tile(sQ, cute::Shape<Int<kQueries>, Int<kD>>{}, make_coord(_, 0));  // (M, D, part, 4 * stage)
  Tensor sQtPart =
      local_tile(sQt, cute::Shape<Int<kD>, Int<kQueries>>{}, make_coord(0, _));  // (D, M, part, 4 * stage)
  typename Traits::MmaS mma_s;
  typename Traits::MmaSum mma_sum;
  auto thread_s = mma_s.get_slice(0);
  auto thread_sum = mma_sum.get_slice(0);
  Tensor tSrQ = thread_s.partition_fragment_B(sQpart);     // (MMA, 1, D/16, part, 4 * stage)
  Tensor tGrQ = thread_sum.partition_fragment_B(sQtPart);  // (MMA, 1, M/16, part, 4 * stage)
  Tensor tSrS = partition_fragment_C(mma_s, cute::Shape<_64, Int<kQueries>>{});
  Tensor tSrT = partition_fragment_C(mma_s, cute::Shape<_64, Int<kQueries>>{});
  Tensor tSrR = partition_fragment_C(mma_s, cute::Shape<_64, Int<kQueries>>{});
  Tensor tGrdK = partition_fragment_C(mma_sum, cute::Shape<_64, Int<kD>>{});
  Tensor tGrdV = partition_fragment_C(mma_sum, cute::Shape<_64, Int<kD>>{});
  // K and V as left operands: in registers where there is room, for a product of 64 x 32 wants its left
  // operand from shared memory faster than that can be read.
  const auto fetch = [&](auto& left, const half* data) {
    auto words = recast<uint32_t>(left);
    CUTE_UNROLL
    for (int e = 0; e < kD / 2; e += 2)
      words(e / 2) = *reinterpret_cast<const uint32_t*>(
          data + tile_offset<kD>(tile_row + e / 2 % 2 * 8, e / 4 * 8) + 2 * quad);
  };
  const auto left_operand = [&](const auto& tile, const half* data) {
    if constexpr (kInRegisters) {
      Tensor left = make_tensor<half>(accumulator_as_a(tGrdK.layout()));
      fetch(left, data);
      return left;
    } else {
      return thread_s.partition_fragment_A(tile);
    }
  };
  auto tSrK = left_operand(sK, sK_data);
  auto tSrV = left_operand(sV, sV_data);
  Tensor rA = make_tensor<half>(accumulator_as_a(tSrS.layout()));   // p a
  Tensor rDs = make_tensor<half>(accumulator_as_a(tSrS.layout()));  // p (a r - D)
  Tensor rR = make_tensor<half>(accumulator_as_a(tSrS.layout()));   // p r

  RingIndex<Traits::kStages> at_product, at_sum;
  const auto issue_products = [&](int part) {  // S, T, and R in two
    const int stage = 4 * at_product.stage;
    issue_gemm<true>(mma_s, tSrK, tSrQ(_, _, _, part, stage + kStagedQ), tSrS);
    issue_gemm<true>(mma_s, tSrK, tSrQ(_, _, _, part, stage + kStagedX), tSrT);
    issue_gemm<true>(mma_s, tSrV, tSrQ(_, _, _, part, stage + kStagedDo), tSrR);
    issue_gemm<false>(mma_s, tSrK, tSrQ(_, _, _, part, stage + kStagedY), tSrR);
  };
  const auto issue_sums = [&](int part) {
    const int stage = 4 * at_sum.stage;
    issue_gemm<false>(mma_sum, rA, tGrQ(_, _, _, part, stage + kStagedDo), tGrdV);
    issue_gemm<false>(mma_sum, rA, tGrQ(_, _, _, part, stage + kStagedY), tGrdK);
    issue_gemm<false>(mma_sum, rDs, tGrQ(_, _, _, part, stage + kStagedQ), tGrdK);
    issue_gemm<false>(mma_sum, rR, tGrQ(_, _, _, part, stage + kStagedX), tGrdK);
  };
  // Of the list that this warpgroup walks. Where the lengths are mixed, one tile of keys is seen by more
  // queries, and the other skips those: the first ones, for only causal problems are.
  Range own = block.tiles;
  if constexpr (Traits::kOnGrid) {
    own = s.grid.visits[warpgroup];
  } else if (p.mix_key_lengths) {
    own.begin = min(max(KeyBlock::tiles_of(p, key_tile).begin, block.tiles.begin), block.tiles.end - 1);
  }

  // On a grid, before the products of a visit are issued: which of its queries see the thread's keys, from
  // the thread's first column on.
  std::conditional_t<Traits::kOnGrid, SeenAhead, char> ahead;
  uint64_t seen[2] = {0, 0};
  const auto look = [&](int visit) {
    if constexpr (Traits::kOnGrid) {
      ahead.look(s.grid, warpgroup, tile_row, quad, own, visit, seen);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) seen[i] >>= 2 * quad;
    }
  };
  // S -> w, p times the unit of the weights
  const auto exponentials = [&](int tile, int part) {
    const PairRow* rows = s.rows[at_product.stage] + part * kQueries;
    const int first_query = tile * kTileRows + part * kQueries;
    const bool masked = first_query < all_seen_by.begin || first_query + kQueries > all_seen_by.end;
    const uint64_t seen_of_part[2] = {seen[0] >> part * kQueries, seen[1] >> part * kQueries};
    CUTE_UNROLL
    for (int j = 0; j < kQueries / 8; ++j) {
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * j + 2 * quad + c;
        const float2 row = *reinterpret_cast<const float2*>(&rows[column].shift);  // and weight
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int e = 4 * j + 2 * i + c;
          float exponent = fmaf(tSrS(e), units.scale_log2, -row.x);
          if constexpr (Traits::kOnGrid) {
            if ((seen_of_part[i] >> (8 * j + c) & 1) == 0) exponent = -INFINITY;
          } else if (masked) {
            const int query = first_query + column;
            if (query < seen_by[i].begin || query >= seen_by[i].end) exponent = -INFINITY;
          }
          tSrS(e) = row.y * exp2_approx(exponent);
        }
      }
    }
  };
  // w, T, R -> p a, p (a r - D), p r in place
  const auto weigh = [&](int part) {
    const PairRow* rows = s.rows[at_product.stage] + part * kQueries;
    warpgroup_fence_operand(tSrT);
    warpgroup_fence_operand(tSrR);
    CUTE_UNROLL
    for (int j = 0; j < kQueries / 8; ++j) {
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float4 row = *reinterpret_cast<const float4*>(&rows[8 * j + 2 * quad + c]);  // xbar, rbar, D
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int e = 4 * j + 2 * i + c;
          const float w = tSrS(e);
          const float slopes = fmaf(tSrT(e) - row.x, units.slope, units.one), r = tSrR(e) - row.y;
          tSrS(e) = w * slopes;
          tSrT(e) = w * units.qk * fmaf(slopes, r, -row.z);
          tSrR(e) = w * units.slope * r;
        }
      }
    }
  };
  const auto keep_above = [&](auto& values) {  // as in QueryTile
    warpgroup_fence_operand(values);
    s.ring.wait_full(at_product);
    warpgroup_fence_operand(values);
  };
  const auto round_weights = [&] {
    Tensor a_view = make_tensor(tSrS.data(), rA.layout());
    Tensor ds_view = make_tensor(tSrT.data(), rDs.layout());
    Tensor r_view = make_tensor(tSrR.data(), rR.layout());
    convert_to(a_view, rA);
    convert_to(ds_view, rDs);
    convert_to(r_view, rR);
  };

  float to_v = 1.f, to_k = 1.f;
  const auto enter_head = [&](int head) {
    const HeadUnits next(a, first_head + head, kv_head);
    to_v = units.dv_factor / next.dv_factor;
    to_k = units.dk_factor / next.dk_factor;
    units = next;
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);  // every warp's products with the last V are done
    load_tile(sV_data, p.v, units.v_scale);
    if constexpr (kInRegisters) fetch(tSrV, sV_data);
  };
  const auto change_units = [&] {  // the sums so far go over to the units of this head
    CUTE_UNROLL
    for (int e = 0; e < kD / 2; ++e) {
      tGrdV(e) *= to_v;
      tGrdK(e) *= to_k;
    }
  };
  const auto skip = [&](int count) {
    for (int i = 0; i < count; ++i) {
      s.ring.wait_full(at_product);
      s.ring.release(at_product);
      at_product.advance();
    }
  };

  // A walk goes over the tiles of all heads. On a grid, and where lengths are mixed, the list has tiles of
  // the other warpgroup before and behind those of this one, and nothing may be held in the ring while they
  // are skipped: a walk per head.
  const bool walk_per_head = Traits::kOnGrid || p.mix_key_lengths;
  const int tiles = own.end - own.begin, walks = walk_per_head ? block.group : 1;
  const int visits = (walk_per_head ? tiles : tiles * block.group) * kParts;
  for (int walk = 0; walk < walks; ++walk) {
    if (walk > 0) {
      enter_head(walk);
      change_units();
    }
    skip(own.begin - block.tiles.begin);
    at_sum = at_product;
    look(own.begin);
    s.ring.wait_full(at_product);
    issue_products(0);
    warpgroup_wait<3>();
    exponentials(own.begin, 0);
    keep_above(tSrS);
    warpgroup_wait<0>();
    weigh(0);
    round_weights();
    if (walk == 0) {
      clear(tGrdK);
      clear(tGrdV);
    }
    int head = 0, tile = 0;  // of the products, in the group and in the range
    for (int n = 1; n < visits; ++n) {
      const int part = n % kParts, part_of_sum = (n + kParts - 1) % kParts;
      bool next_head = false;
      if (part == 0) {
        at_product.advance();
        ++tile;
        if (!Traits::kOnGrid && tile == tiles) {  // not in a walk of one head
          tile = 0;
          ++head;
          next_head = true;
        }
        s.ring.wait_full(at_product);
        look(own.begin + tile);
      }
      if (next_head) enter_head(head);
      issue_products(part);
      issue_sums(part_of_sum);
      warpgroup_wait<7>();
      exponentials(own.begin + tile, part);
      keep_above(tSrS);  // under the other products
      warpgroup_wait<4>();
      weigh(part);
      warpgroup_fence_operand(tSrT);
      warpgroup_fence_operand(tSrR);
      keep_above(tSrS);  // under the sums
      warpgroup_wait<0>();
      if (part == 0) {
        s.ring.release(at_sum);
        at_sum.advance();
      }
      round_weights();
      if (next_head) change_units();
    }
    issue_sums(kParts - 1);
    warpgroup_wait<0>();
    s.ring.release(at_sum);
    at_product.advance();
    skip(block.tiles.end - own.end);
  }

  const auto store = [&](auto* out, int features, const auto& v, float factor) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (key[i] >= p.n) continue;
      auto* row =
          out + ((static_cast<int64_t>(block.batch) * p.n + key[i]) * p.kv_heads + block.kv_head) * features;
      CUTE_UNROLL
      for (int j = 0; j < kD / 8; ++j) {
        if (8 * j < features)
          store_pair(row + 8 * j + 2 * quad, v(4 * j + 2 * i) * factor, v(4 * j + 2 * i + 1) * factor);
      }
    }
  };
  if (a.is_bf16) {
    store(static_cast<__nv_bfloat16*>(a.dk), p.d, tGrdK, units.dk_factor);
    store(static_cast<__nv_bfloat16*>(a.dv), p.dv, tGrdV, units.dv_factor);
  } else {
    store(static_cast<__half*>(a.dk), p.d, tGrdK, units.dk_factor);
    store(static_cast<__half*>(a.dv), p.dv, tGrdV, units.dv_factor);
  }
}

// ---- Kernel and launch ----

template <class Traits>
__device__ __forceinline__ void bwd_key_roles(typename Traits::Storage& s, const BwdSm90Args& a,
                                              const KeyBlock& block) {
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) bwd_key_produce<Traits>(s, a, block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    bwd_key_consume<Traits>(s, a, block);
  }
}

template <class Traits>
__device__ __forceinline__ void prepare_key_ring(typename Traits::Storage& s) {
  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    s.ring.init(1, Traits::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) bwd_key_kernel(const __grid_constant__ BwdSm90Args a) {
  auto& s = *reinterpret_cast<typename Traits::Storage*>(dynamic_shared);
  prepare_key_ring<Traits>(s);
  bwd_key_roles<Traits>(s, a, KeyBlock(a.problem, blockIdx.x));
}

template <int kHeadDim, class IsLone>
void write_pairs(const BwdSm90Args& a, const IsLone& is_lone, cudaStream_t stream) {
  const dim3 blocks(a.problem.q.tiles_per_head, a.problem.batch * a.problem.heads);
  write_pairs_kernel<kHeadDim><<<blocks, 256, 0, stream>>>(a, is_lone);
}

struct LoneInSequence {
  Visibility visible;
  __device__ __forceinline__ bool operator()(int row) const { return visible.lone(row); }
};

template <int kHeadDim>
int bwd_key_sm90<kHeadDim>::run(const BwdSm90Args& a, void* stream_) {
  using Traits = KeyTraits<kHeadDim>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_key_kernel<Traits>, kShared)) return e;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const QueryProblem& p = a.problem;
  write_pairs<kHeadDim>(a, LoneInSequence{p.visible}, stream);
  const int grid = p.key_blocks() * p.batch * p.kv_heads;
  bwd_key_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace nearfield::lla
