// One sweep of 64 resident queries over the key tiles they see: the motion that every pass of the forward and
// of the backward makes.
//
//   products:  one tile of scores S, then what else the pass multiplies with the same keys
//   weigh:     S -> rounded weights E, in registers: exponentials of S first, the other products into them
//              later
//   sum:       out += E K, or E V; and the sum of E in each row
//
// The products of the next tile are issued before the sum of this one. Exponentials run as soon as S is
// there, under the other products and the sum; the other warpgroup fills the rest. A producer thread streams
// the tiles through one ring, in an order that both sides count in positions: K of every tile, or K and V of
// every tile in turn.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/half.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "lla/grid_sm90.cuh"
#include "lla/operand_layout.cuh"
#include "lla/sm90.h"
#include "lla/tiles.h"
#include "nearfield/mma.cuh"
#include "nearfield/pairs.cuh"
#include "nearfield/pipeline.cuh"
#include "nearfield/shared_memory.cuh"
#include "nearfield/softmax.cuh"

namespace nearfield::lla {
using namespace cute;
using half = cutlass::half_t;

constexpr int kKeys = kTileRows;  // of a tile

// ---- Layouts and storage ----

// kOnGrid: who sees whom is said by a grid, else by Visibility. kResident: a warpgroup sees few tiles, and
// the first pass leaves their rounded weights in shared memory for all others.
template <int kHeadDim_, bool kOnGrid_ = false, bool kResident_ = false>
struct QueryTraits {
  static constexpr bool kOnGrid = kOnGrid_, kResident = kResident_;
  static constexpr int kHeadDim = kHeadDim_, kElements = tile_elements(kHeadDim);
  static constexpr QueryTileSizes kSizes = query_tile(kHeadDim, kResident);
  static constexpr int kStages = kSizes.kStages;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128, kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kQuads =
      kHeadDim / 8;  // float4 of a thread in a (64, D) accumulator: 2 rows x 2 columns

  using AtomK = GMMA::Layout_K_SW128_Atom<half>;
  using AtomMN = GMMA::Layout_MN_SW128_Atom<half>;
  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<_64, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(AtomK{}, cute::Shape<_64, Int<kHeadDim>, Int<kStages>>{}));
  // A tile as the B operand of a sum over its rows: (D, rows), D contiguous.
  using LayoutKt =
      decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kHeadDim>, _64, Int<kStages>>{}, Step<_2, _1, _3>{}));

  using ShapeS = cute::Shape<_64, Int<kKeys>, Int<kHeadDim>>;
  using MmaS = decltype(make_tiled_mma(GMMA::ss_op_selector<half, half, float, ShapeS>()));
  using MmaDirection = decltype(make_tiled_mma(GMMA::rs_op_selector<half, half, float, ShapeS>()));
  using MmaSum =
      decltype(make_tiled_mma(GMMA::rs_op_selector<half, half, float, cute::Shape<_64, Int<kHeadDim>, _64>,
                                                   GMMA::Major::K, GMMA::Major::MN>()));

  // A (64, D) float vector per warpgroup that only its own threads touch, each its own elements: quad j of a
  // thread is at [j * 128 + thread].
  static constexpr int kPrivate = kQuads * 128;  // float4
  // The same for the weights of a tile: eight of a thread at once.
  static constexpr int kPrivateWeights = kKeys * 64 / 8;  // uint4
  static constexpr int kResidentTiles = kResident ? resident_tiles(kHeadDim) : 0;

  struct alignas(1024) Storage {
    alignas(1024) half q[kConsumers][kElements];
    alignas(1024) half stage[kStages][kElements];
    // Private vectors of the solver; later each holds two (64, D) operands, the high and the low part of a
    // vector. With resident weights they are in registers, and the place of x has the mean keys of the
    // forward.
    alignas(1024) float4 x[kConsumers][kPrivate];
    alignas(kResident ? 16 : 1024) float4 r[kConsumers][kResident ? 1 : kPrivate];
    float4 kbar[kConsumers][kSizes.kKeepKbar && !kResident ? kPrivate : 1];
    uint4 weights[kConsumers][kResident ? kResidentTiles : 1][kResident ? kPrivateWeights : 1];
    Ring<kStages> ring;
    uint64_t bar_verdict;
    int alive[2][kConsumerWarps];  // per parity of the iteration
    std::conditional_t<kOnGrid, GridRows, char> grid;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

constexpr int kStorageAlignment = 1024;
extern __shared__ __align__(kStorageAlignment) char dynamic_shared[];

// ---- Work of a CTA ----

// Longest rows first: the last blocks of a causal problem see the most keys.
struct QueryBlock {
  int batch, head, kv_head;
  int row_tile[2];  // of the consumer warpgroups
  Range tiles;      // of keys that any of the 128 queries sees; at least one
  __device__ __forceinline__ QueryBlock(const QueryProblem& p, int index) {
    const int heads = p.batch * p.heads;
    const int block = index / heads, tiles_of_rows = 2 * p.query_blocks();
    row_tile[0] = p.mix_lengths ? block : tiles_of_rows - 2 - 2 * block;
    row_tile[1] = p.mix_lengths ? tiles_of_rows - 1 - block : row_tile[0] + 1;
    batch = index % heads / p.heads;
    head = index % p.heads;
    kv_head = head / (p.heads / p.kv_heads);
    const Range low = tiles_of(p, row_tile[0]), high = tiles_of(p, row_tile[1]);
    tiles = {min(low.begin, high.begin), max(low.end, high.end)};
  }
  static __device__ __forceinline__ Range tiles_of(const QueryProblem& p, int row_tile) {
    const int first = min(row_tile * kTileRows, p.m - 1);
    const Range keys = p.visible.any_sees(first, min(first + kTileRows, p.m) - 1);
    const int begin = min(keys.begin, p.n - 1) / kKeys;
    return {begin, max(begin + 1, (keys.end + kKeys - 1) / kKeys)};
  }
};

// ---- Producer: one thread ----

template <class Traits>
struct Producer {
  typename Traits::Storage& s;
  const half *keys, *values;  // tiles of this head
  uint32_t position = 0;

  __device__ __forceinline__ Producer(typename Traits::Storage& s_, const QueryProblem& p,
                                      const QueryBlock& block)
      : s(s_) {
    const int64_t head = static_cast<int64_t>(block.batch) * p.kv_heads + block.kv_head;
    keys = static_cast<const half*>(p.k.tiles) + head * p.k.tiles_per_head * Traits::kElements;
    values = static_cast<const half*>(p.v.tiles) + head * p.v.tiles_per_head * Traits::kElements;
  }

  __device__ __forceinline__ void load(const half* tile) {
    constexpr int kStages = Traits::kStages, kBytes = Traits::kElements * 2;
    const RingIndex<kStages> at{static_cast<int>(position % kStages), position / kStages % 2};
    s.ring.wait_empty(at);
    s.ring.expect_bytes(at, kBytes);
    SM90_BULK_COPY_G2S::copy(tile, &s.ring.full[at.stage], s.stage[at.stage], kBytes);
    ++position;
  }
  __device__ __forceinline__ void load_keys(int begin, int end) {
    for (int t = begin; t < end; ++t) load(keys + offset(t));
  }
  __device__ __forceinline__ void load_pairs(Range tiles) {
    for (int t = tiles.begin; t < tiles.end; ++t) {
      load(keys + offset(t));
      load(values + offset(t));
    }
  }
  // Of tile t; on a grid, of visit t.
  __device__ __forceinline__ int64_t offset(int t) const {
    if constexpr (Traits::kOnGrid) t = s.grid.at(t);
    return static_cast<int64_t>(t) * Traits::kElements;
  }
};

// ---- Consumers ----

// Which operands the ring carries, and which of the two the sum reads.
enum class Stream { kKeys, kPairsSumKeys, kPairsSumValues };

// Sums of the rounded weights of a row, exactly those that a product multiplies: a product with ones. It
// takes 4 instructions of a warp per tile where unpacking and adding 32 weights a thread takes 64, and every
// thread of a row has the whole sum.
struct WeightSums {
  float c[4] = {0.f, 0.f, 0.f, 0.f};  // a thread's part of a (16, 8) accumulator, whose columns are equal

  __device__ __forceinline__ float operator[](int i) const { return c[2 * i]; }
  __device__ __forceinline__ void scale(const float (&factor)[2]) {
    CUTE_UNROLL
    for (int e = 0; e < 4; ++e) c[e] *= factor[e / 2];
  }
  template <class Weights>
  __device__ __forceinline__ void add(const Weights& weights) {
    const auto words = recast<uint32_t>(weights);  // 4 for each 16 keys
    constexpr uint32_t kOnes = 0x3c003c00u;
    CUTE_UNROLL
    for (int w = 0; w < size(words); w += 4) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(words(w)), "r"(words(w + 1)), "r"(words(w + 2)), "r"(words(w + 3)), "r"(kOnes));
    }
  }
};
struct NoWeightSums {
  template <class Weights>
  __device__ __forceinline__ void add(const Weights&) {}
};

template <class Traits>
struct QueryTile {
  static constexpr int kD = Traits::kHeadDim, kStages = Traits::kStages, kQuads = Traits::kQuads;
  static constexpr int kScores =
      kKeys / 2;  // scores of a thread, as of an accumulator: element e is in row e / 2 % 2

  typename Traits::Storage& s;
  const QueryProblem& p;
  const QueryBlock& block;
  const int thread, warpgroup, quad;  // of 256, of 2, of 4
  int row[2];                         // query index; may lie beyond m
  bool inside[2];
  Range keys[2];  // that the rows see; on a grid their number counts
  Range tiles;    // that any row of the warpgroup sees; on a grid, visits
  Range all_see;  // keys that every row of the warpgroup sees; not on a grid
  // On a grid: what the two rows see of the visit whose products come next, from the thread's first column
  // on; and whether that is all for every row of the warp.
  std::conditional_t<Traits::kOnGrid, SeenAhead, char> ahead;
  uint64_t seen[2];
  bool sees_all;
  uint4 recalled[Traits::kResident ? 4 : 1];  // weights of the tile whose products come next
  float scale_log2;                           // logits in units of log2(e) from products of operands
  float shift[2];                             // weights are exp2(scale_log2 s - shift)
  uint32_t position = 0;

  typename Traits::MmaS mma_s;
  typename Traits::MmaDirection mma_direction;
  typename Traits::MmaSum mma_sum;

  __device__ __forceinline__ QueryTile(typename Traits::Storage& s_, const QueryProblem& p_,
                                       const QueryBlock& block_)
      : s(s_),
        p(p_),
        block(block_),
        thread(threadIdx.x - 128),
        warpgroup(__shfl_sync(0xffffffffu, thread / 128, 0)),
        quad(thread % 4) {
    const int first = row_tile() * kTileRows;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      row[i] = first + tile_row() + 8 * i;
      inside[i] = row[i] < p.m;
      if constexpr (Traits::kOnGrid) {
        keys[i] = {0, s.grid.count(warpgroup, tile_row() + 8 * i)};
      } else {
        keys[i] = inside[i] ? p.visible.keys(row[i]) : Range{0, 0};
      }
    }
    if constexpr (Traits::kOnGrid) {
      tiles = s.grid.visits[warpgroup];
      return;
    }
    tiles =
        first < p.m ? QueryBlock::tiles_of(p, row_tile()) : Range{block.tiles.begin, block.tiles.begin + 1};
    tiles.begin = max(tiles.begin, block.tiles.begin);
    tiles.end = max(min(tiles.end, block.tiles.end), tiles.begin + 1);
    const int last = first + kTileRows - 1;
    all_see = last < p.m ? Range{p.visible.keys(last).begin, p.visible.keys(first).end} : Range{0, 0};
    // The host has seen to that, unless packed sequences have bounds that are none.
    if constexpr (Traits::kResident) tiles.end = min(tiles.end, tiles.begin + Traits::kResidentTiles);
  }

  __device__ __forceinline__ static int row_of(int e) { return e / 2 % 2; }
  __device__ __forceinline__ int column_of(int e) const { return e / 4 * 8 + 2 * quad + e % 2; }
  __device__ __forceinline__ bool lone(int i) const { return keys[i].end - keys[i].begin == 1; }
  // Row of a [B, m, Hq] tensor.
  __device__ __forceinline__ int64_t output_row(int i) const {
    return (static_cast<int64_t>(block.batch) * p.m + row[i]) * p.heads + block.head;
  }

  // ---- Ring ----

  __device__ __forceinline__ RingIndex<kStages> at(uint32_t where) const {
    return {static_cast<int>(where % kStages), where / kStages % 2};
  }
  __device__ __forceinline__ void wait(uint32_t where) { s.ring.wait_full(at(where)); }
  __device__ __forceinline__ void release(uint32_t where) { s.ring.release(at(where)); }
  __device__ __forceinline__ void skip(int count) {
    for (int i = 0; i < count; ++i) {
      wait(position);
      release(position);
      ++position;
    }
  }

  // Behind it comes a wait for products: what makes `values` stays in front of that and runs under them.
  // ptxas would move it behind, into the basic block of the wait, but not out of its own: hence a look at a
  // barrier that is known to be complete, of a stage that is held.
  template <class Values>
  __device__ __forceinline__ void keep_above(Values& values, uint32_t held) {
    warpgroup_fence_operand(values);
    wait(held);
    warpgroup_fence_operand(values);
  }

  // ---- Operands ----

  __device__ __forceinline__ auto staged_keys(int stage) {
    Tensor sK = make_tensor(make_smem_ptr(s.stage[0]), typename Traits::LayoutK{});  // (keys, D, stage)
    return mma_s.get_slice(0).partition_fragment_B(sK)(_, _, _, stage);
  }
  __device__ __forceinline__ auto staged_sum(int stage) {
    Tensor sKt = make_tensor(make_smem_ptr(s.stage[0]), typename Traits::LayoutKt{});  // (D, keys, stage)
    return mma_sum.get_slice(0).partition_fragment_B(sKt)(_, _, _, stage);
  }
  __device__ __forceinline__ auto resident(const half* tile) {  // (64, D) of this warpgroup as a left operand
    Tensor sQ = make_tensor(make_smem_ptr(tile), typename Traits::LayoutQ{});
    return mma_s.get_slice(0).partition_fragment_A(sQ);
  }
  __device__ __forceinline__ auto make_scores() {
    return partition_fragment_C(mma_s, cute::Shape<_64, Int<kKeys>>{});
  }
  __device__ __forceinline__ auto make_sum() {
    return partition_fragment_C(mma_sum, cute::Shape<_64, Int<kD>>{});
  }

  // This warpgroup's tile of an operand of the queries.
  __device__ __forceinline__ const half* tile_of(const Operand& operand) const {
    const int64_t head = static_cast<int64_t>(block.batch) * p.heads + block.head;
    return static_cast<const half*>(operand.tiles) +
           (head * operand.tiles_per_head + row_tile()) * Traits::kElements;
  }
  __device__ __forceinline__ int row_tile() const {
    return warpgroup == 0 ? block.row_tile[0] : block.row_tile[1];
  }
  // Row, inside the tile, of this thread's first row; the second is 8 below.
  __device__ __forceinline__ int tile_row() const { return thread % 128 / 32 * 16 + thread % 32 / 4; }

  // Copies a (64, D) operand tile of this warpgroup to shared memory; visible to matrix multiplies after
  // sync().
  __device__ __forceinline__ void copy_tile(half* to, const half* from) {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kElements / 8 / 128; ++i) {
      const int at = i * 128 + thread % 128;
      reinterpret_cast<uint4*>(to)[at] = reinterpret_cast<const uint4*>(from)[at];
    }
  }
  __device__ __forceinline__ void sync() {
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
  }
  // ---- Rows ----

  __device__ __forceinline__ static void add_over_row(float (&v)[2]) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      v[i] += __shfl_xor_sync(0xffffffffu, v[i], 1);
      v[i] += __shfl_xor_sync(0xffffffffu, v[i], 2);
    }
  }
  __device__ __forceinline__ static void max_over_row(float (&v)[2]) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      v[i] = fmaxf(v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
      v[i] = fmaxf(v[i], __shfl_xor_sync(0xffffffffu, v[i], 2));
    }
  }

  // On a grid, before the products of a visit are issued: what the rows see of it.
  __device__ __forceinline__ void look(int visit) {
    if constexpr (Traits::kOnGrid) {
      ahead.look(s.grid, warpgroup, tile_row(), quad, tiles, visit, seen);
      sees_all = __all_sync(0xffffffffu, (seen[0] & seen[1]) == ~uint64_t{0});
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) seen[i] >>= 2 * quad;
    }
  }

  // -inf where a query does not see the key.
  template <class Scores>
  __device__ __forceinline__ void mask(Scores& scores, int tile) {
    if constexpr (Traits::kOnGrid) {
      if (sees_all) return;
      CUTE_UNROLL
      for (int e = 0; e < kScores; ++e) {
        if ((seen[row_of(e)] >> (e / 4 * 8 + e % 2) & 1) == 0) scores(e) = -INFINITY;
      }
      return;
    }
    const int first = tile * kKeys;
    if (first >= all_see.begin && first + kKeys <= all_see.end) return;
    CUTE_UNROLL
    for (int e = 0; e < kScores; ++e) {
      const int key = first + column_of(e), i = row_of(e);
      if (key < keys[i].begin || key >= keys[i].end) scores(e) = -INFINITY;
    }
  }

  // ---- Resident weights ----

  __device__ __forceinline__ uint4& kept(int n, int quarter) {  // of the n-th tile of the warpgroup
    return s.weights[warpgroup][n][quarter * 128 + thread % 128];
  }
  __device__ __forceinline__ void recall(int n) {
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w) recalled[w] = kept(n, w);
  }
  // Rounds the weights of the n-th tile to shared memory.
  template <class Scores>
  __device__ __forceinline__ void keep(const Scores& weights, int n) {
    const auto rounded = [&](int e) { return pack<half>(weights(e), weights(e + 1)); };
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w)
      kept(n, w) = {rounded(8 * w), rounded(8 * w + 2), rounded(8 * w + 4), rounded(8 * w + 6)};
  }
  // Elements e and e + 1 of the recalled tile, e even.
  __device__ __forceinline__ float2 recalled_pair(int e) const {
    const uint4& v = recalled[e / 8];
    const uint32_t word = e / 2 % 4 == 0 ? v.x : e / 2 % 4 == 1 ? v.y : e / 2 % 4 == 2 ? v.z : v.w;
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }

  // S -> exp2(scale_log2 S - shift), 0 where not seen.
  template <class Scores>
  __device__ __forceinline__ void exponentials(Scores& scores, int tile) {
    CUTE_UNROLL
    for (int e = 0; e < kScores; ++e) scores(e) = fmaf(scores(e), scale_log2, -shift[row_of(e)]);
    mask(scores, tile);
    CUTE_UNROLL
    for (int e = 0; e < kScores; ++e) scores(e) = exp2_approx(scores(e));
  }

  // ---- The sweep ----

  // issue(key stage, value stage) starts the products of a tile, kProducts groups of which the first is
  // `scores`; begin_weights(tile) finds it there, weigh() also the others, and between them they turn it into
  // weights; rescale() may change what was summed so far. The weights are rounded only when the sum before
  // has read its own: registers of a multiply in flight must not be written, and ptxas serializes all
  // multiplies if it cannot prove that. kRecalls: the weights of a tile are resident, and are fetched before
  // its products are issued.
  template <Stream kStream, int kProducts, bool kRecalls = false, class Sum, class Sums, class Scores,
            class Issue, class Begin, class Weigh, class Rescale>
  __device__ __forceinline__ void sweep(Sum& out, Sums& sums, Scores& scores, Issue&& issue,
                                        Begin&& begin_weights, Weigh&& weigh, Rescale&& rescale) {
    constexpr int kPer = kStream == Stream::kKeys ? 1 : 2;
    constexpr bool kSumsValues = kStream == Stream::kPairsSumValues;
    constexpr bool kNeedsPair = kStream == Stream::kPairsSumKeys;  // the products read V as well
    Tensor weights = make_tensor<half>(accumulator_as_a(scores.layout()));
    const auto round_weights = [&] {
      Tensor view = make_tensor(scores.data(), weights.layout());
      convert_to(view, weights);
    };
    const auto prepare = [&](int t) {
      if constexpr (kRecalls) {
        recall(t - tiles.begin);
      } else {
        look(t);
      }
    };
    const uint32_t begin = position;
    skip((tiles.begin - block.tiles.begin) * kPer);

    uint32_t key = position;
    wait(key);
    if constexpr (kNeedsPair) wait(key + 1);
    prepare(tiles.begin);
    issue(at(key).stage, at(key + 1).stage);
    warpgroup_wait<kProducts - 1>();
    begin_weights(tiles.begin);
    if constexpr (kProducts > 1) {
      keep_above(scores, key);
      warpgroup_wait<0>();
    }
    if constexpr (kSumsValues) release(key);
    if constexpr (kNeedsPair) release(key + 1);
    weigh();
    round_weights();
    sums.add(weights);
    clear(out);

    for (int t = tiles.begin; t + 1 < tiles.end; ++t) {
      const uint32_t following = key + kPer, summed = kSumsValues ? key + 1 : key;
      wait(following);
      if constexpr (kNeedsPair) wait(following + 1);
      prepare(t + 1);
      issue(at(following).stage, at(following + 1).stage);
      if constexpr (kSumsValues) wait(summed);
      issue_gemm<false>(mma_sum, weights, staged_sum(at(summed).stage), out);
      warpgroup_wait<kProducts>();
      begin_weights(t + 1);
      if constexpr (kProducts > 1) {
        keep_above(scores, following);
        warpgroup_wait<1>();
      }
      if constexpr (kSumsValues) release(following);
      if constexpr (kNeedsPair) release(following + 1);
      weigh();
      keep_above(scores, summed);
      warpgroup_wait<0>();
      release(summed);
      round_weights();
      rescale();
      sums.add(weights);
      key = following;
    }
    const uint32_t summed = kSumsValues ? key + 1 : key;
    if constexpr (kSumsValues) wait(summed);
    issue_gemm<false>(mma_sum, weights, staged_sum(at(summed).stage), out);
    warpgroup_wait<0>();
    release(summed);
    position = key + kPer;
    skip(static_cast<int>(begin + (block.tiles.end - block.tiles.begin) * kPer - position));
  }
};

template <class Traits>
__device__ __forceinline__ void prepare_barriers(typename Traits::Storage& s) {
  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    s.ring.init(1, Traits::kConsumerWarps);
    cutlass::arch::ClusterTransactionBarrier::init(&s.bar_verdict, Traits::kConsumerWarps + 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
}

}  // namespace nearfield::lla
