// Decoding on Hopper: what step_sm80.cuh does, with warpgroup products that read both operands from shared
// memory, so that a tile costs its threads a read and a write of its elements and little else.
//
//   scores      q k^T of the next tile, [64 keys, 8] of which one column is q
//   transform   a thread's pieces of keys and values, in registers since the last tile, become w^1/2 (k - c)
//   2^e
//               and w^1/2 v 2^f in float16, in place of the raw ones
//   sums        K'^T [K' V'], the transposed tile times itself, and K'^T w, V'^T w
//
// The sums of a tile and the scores of the next are in flight together, while every thread fetches its pieces
// of the next tile and looks for their largest. One barrier carries the vote whether any score or operand is
// too large for the units of the sums (seldom), one says that a tile is transformed. The other blocks on the
// SM fill the gaps.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/half.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "lla/step_cluster_sm90.cuh"
#include "lla/step_merge.cuh"
#include "nearfield/mma.cuh"
#include "nearfield/softmax.cuh"
#include "nearfield/tma.h"

namespace nearfield::lla {
using namespace cute;

// ---- Layouts and storage ----

template <class Tag, int kD_, int kDv_>
struct StepTraits {
  static constexpr int kD = kD_, kDv = kDv_;
  using Raw = std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t, cutlass::half_t>;
  using Half = cutlass::half_t;
  // An image: 64 rows (keys) of 64 elements, 16-byte pieces swizzled, as the copy engine leaves it. A tile is
  // the images of its keys, then those of its values. A warpgroup owns 64 rows of the sums.
  static constexpr int kImage = 64 * 64;
  static constexpr int kGroups = kD / 64, kKeyImages = kD / 64, kValueImages = kDv / 64;
  static constexpr int kMyValueImages = kValueImages / kGroups;  // of a warpgroup; it has one image of keys
  static constexpr int kTile = (kKeyImages + kValueImages) * kImage, kTileBytes = 2 * kTile;
  static constexpr int kBlocks = kD + kDv <= 128 ? 3 : kD < 128 ? 2 : 1;  // per SM
  static constexpr int kStages = kD < 128 ? 4 : 6;
  static constexpr bool kClusters = step_sm90<Tag, kD, kDv>::kClusters;
  static_assert(kStepTile == 64 && kValueImages % kGroups == 0 && kStepThreads<kD> == 128 * kGroups);

  using MmaScores =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Raw, Raw, float, cute::Shape<_64, _8, Int<kD>>>()));
  using LayoutKeys = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Raw>{}, cute::Shape<_64, Int<kD>>{}));
  using LayoutQ = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Raw>{}, cute::Shape<_8, Int<kD>>{}));

  using MmaSums =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Half, Half, float, cute::Shape<_64, Int<kD + kDv>, _64>,
                                                   GMMA::Major::MN, GMMA::Major::MN>()));
  using MmaWeights = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Half, Half, float, cute::Shape<_64, _8, _64>, GMMA::Major::MN, GMMA::Major::K>()));
  using LayoutImage = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Half>{}, cute::Shape<_64, _64>{}));
  using LayoutTile = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Half>{},
                                            cute::Shape<Int<kD + kDv>, _64>{}, Step<_2, _1>{}));
  using LayoutWeights = GMMA::Layout_K_SW128_Atom<Half>;  // (8, 64 keys)

  struct Storage {
    union {
      alignas(1024) uint16_t stage[kStages][kTile];
      System<kD> system;
      std::conditional_t<kClusters, typename ClusterShared<kD, kDv>::Exchange, char> exchange;
    };
    // Row 0 of 8; the others are zero. Row 0 is not swizzled.
    alignas(1024) Raw q[kKeyImages][8 * 64];
    alignas(1024) Half weights[2][8 * 64];  // square roots, of even and odd tiles
    uint64_t full[kStages];
    std::conditional_t<kClusters, ClusterShared<kD, kDv>, char> cluster;
    StepQuery<kD> query;
    alignas(16) float delta[kD], key_sum[kD], value_sum[kDv];
    float largest[3][kStepWarps<kD>];  // per warp: score, |k|, |v|
    float sum[4];                      // of the weights of 16 keys of every tile
    int argmax;
  };
  static_assert(kBlocks * (sizeof(Storage) + 2048) <= 228 * 1024, "what an SM has for its blocks");
};

struct StepMaps {
  CUtensorMap k, v;
};

// ---- Pieces: 8 elements of a row ----

template <class E>
__device__ __forceinline__ uint32_t largest_of(uint32_t so_far, const uint4& piece) {
  for (const uint32_t pair : {piece.x, piece.y, piece.z, piece.w})
    so_far = E::largest(so_far, pair & 0x7fff7fffu);
  return so_far;
}

template <class E, class F>
__device__ __forceinline__ uint4 map_pairs(const uint4& piece, const F& f) {
  const uint32_t pair[4] = {piece.x, piece.y, piece.z, piece.w};
  uint32_t moved[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float2 x = f(e, E::unpack(pair[e]));
    moved[e] = pack<cutlass::half_t>(x.x, x.y);
  }
  return {moved[0], moved[1], moved[2], moved[3]};
}

// ---- Kernel ----

template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(kStepThreads<kD>, (StepTraits<Tag, kD, kDv>::kBlocks))
    moments_sm90_kernel(const __grid_constant__ StepMaps maps, const __grid_constant__ StepArgs args) {
  using Traits = StepTraits<Tag, kD, kDv>;
  using E = StepElement<Tag>;
  using Half = typename Traits::Half;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kImage = Traits::kImage, kStages = Traits::kStages, kMine = Traits::kMyValueImages;
  extern __shared__ __align__(1024) unsigned char step_storage[];
  auto& s = *reinterpret_cast<typename Traits::Storage*>(step_storage);

  if (threadIdx.x == 0) cute::prefetch_tma_descriptor(&maps.k), cute::prefetch_tma_descriptor(&maps.v);
  const StepWork work(args);
  const int num_tiles = work.num_tiles;
  if (num_tiles == 0 && !args.cluster)
    return args.splits == 1 ? work.answer_without_keys<Tag>(args) : work.record_no_keys<kD, kDv>(args);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  // The thread's pieces: one of the 8 of a row, in rows first_row + 4 r of the images of its warpgroup. Their
  // scores are the warp's own.
  const int piece = lane % 8, first_row = warp % 4 * 16 + lane / 8;
  const auto place = [&](uint16_t* image, int r) {
    const int row = first_row + 4 * r;
    return reinterpret_cast<uint4*>(image + row * 64 + (piece ^ row % 8) * 8);
  };
  const auto keys_of = [&](int tile) { return s.stage[tile % kStages] + group * kImage; };
  const auto values_of = [&](int tile, int i) {
    return s.stage[tile % kStages] + (Traits::kKeyImages + group * kMine + i) * kImage;
  };

  // ---- One thread brings the tiles ----
  const auto load = [&](int tile) {
    if (tile >= num_tiles) return;
    uint64_t* full = &s.full[tile % kStages];
    uint16_t* to = s.stage[tile % kStages];
    const int key = work.begin + tile * kStepTile, head = work.kv_head;
    Barrier::arrive_and_expect_tx(full, Traits::kTileBytes);
    const auto bring = [&](const CUtensorMap& map, uint16_t* image, int feature) {
      SM90_TMA_LOAD_5D::copy(&map, full, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL), image,
                             feature, key, head, work.b, 0);
    };
#pragma unroll
    for (int i = 0; i < Traits::kKeyImages; ++i) bring(maps.k, to + i * kImage, 64 * i);
#pragma unroll
    for (int i = 0; i < Traits::kValueImages; ++i)
      bring(maps.v, to + (Traits::kKeyImages + i) * kImage, 64 * i);
  };
  const QueryFeature<Tag> query(args, work.b, work.i, work.h);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) Barrier::init(&s.full[stage], 1);
    cutlass::arch::fence_barrier_init();
    for (int tile = 0; tile < kStages; ++tile) load(tile);
    s.argmax = kStepTile;
    if constexpr (Traits::kClusters)
      if (args.cluster) s.cluster.expect(work.split, args.splits);
  }
  query.put(s.query);
  auto* sQ = reinterpret_cast<uint16_t*>(s.q);
  if (threadIdx.x < kD)
    sQ[threadIdx.x / 64 * 512 + threadIdx.x % 64] = reinterpret_cast<const uint16_t&>(query.q);
  for (int at = threadIdx.x; at < Traits::kKeyImages * 64; at += kStepThreads<kD>)
    if (at % 64 >= 8) reinterpret_cast<uint4*>(sQ)[at] = {0, 0, 0, 0};
  auto* sWeights = reinterpret_cast<uint32_t*>(s.weights);
  for (int at = threadIdx.x; at < 512; at += kStepThreads<kD>) sWeights[at] = 0;
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (args.cluster) cute::cluster_arrive_relaxed();

  // ---- Products ----
  typename Traits::MmaScores mma_scores;
  typename Traits::MmaSums mma_sums;
  typename Traits::MmaWeights mma_weights;
  Tensor scores = partition_fragment_C(mma_scores, cute::Shape<_64, _8>{});
  Sums<kD, kDv> sums;  // as this product leaves them
  Tensor acc = make_tensor(make_rmem_ptr(&sums.x[0][0]),
                           partition_fragment_C(mma_sums, cute::Shape<_64, Int<kD + kDv>>{}).layout());
  Tensor key_sum = partition_fragment_C(mma_weights, cute::Shape<_64, _8>{});  // row r in column 0
  Tensor value_sum = make_tensor<float>(append(key_sum.layout(), Layout<Int<kMine>, _4>{}));
  clear(key_sum), clear(value_sum);
  const auto half_pointer = [](uint16_t* p) { return make_smem_ptr(reinterpret_cast<Half*>(p)); };
  const auto multiply_scores = [&](int tile) {
    using Raw = typename Traits::Raw;
    Tensor sK = make_tensor(make_smem_ptr(reinterpret_cast<Raw*>(s.stage[tile % kStages])),
                            typename Traits::LayoutKeys{});
    Tensor sq = make_tensor(make_smem_ptr(&s.q[0][0]), typename Traits::LayoutQ{});
    auto thread = mma_scores.get_slice(0);
    Tensor tA = thread.partition_fragment_A(sK);
    Tensor tB = thread.partition_fragment_B(sq);
    if (tile < num_tiles) Barrier::wait(&s.full[tile % kStages], tile / kStages % 2);
    issue_gemm<true>(mma_scores, tA, tB, scores);
  };
  const auto multiply_sums = [&](int tile) {
    Tensor sKt = make_tensor(half_pointer(keys_of(tile)), typename Traits::LayoutImage{});
    Tensor sTile = make_tensor(half_pointer(s.stage[tile % kStages]), typename Traits::LayoutTile{});
    Tensor sW = make_tensor(make_smem_ptr(s.weights[tile % 2]), typename Traits::LayoutWeights{});
    auto sums_thread = mma_sums.get_slice(0);
    auto weights_thread = mma_weights.get_slice(0);
    Tensor tK = sums_thread.partition_fragment_A(sKt);
    Tensor tTile = sums_thread.partition_fragment_B(sTile);
    Tensor tKw = weights_thread.partition_fragment_A(sKt);
    Tensor tW = weights_thread.partition_fragment_B(sW);
    issue_gemm<false>(mma_sums, tK, tTile, acc);
    issue_gemm<false>(mma_weights, tKw, tW, key_sum);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      Tensor sVt = make_tensor(half_pointer(values_of(tile, i)), typename Traits::LayoutImage{});
      Tensor tV = weights_thread.partition_fragment_A(sVt);
      Tensor sum = value_sum(_, _, _, i);
      issue_gemm<false>(mma_weights, tV, tW, sum);
    }
  };
  mma_sums.accumulate_ = GMMA::ScaleOut::One, mma_weights.accumulate_ = GMMA::ScaleOut::One;

  // ---- Units of the sums, and their moves to other units ----
  Units units;
  float c0[8], weight_sum = 0.f;  // of the piece; of the thread's rows
#pragma unroll
  for (float& c : c0) c = 0.f;
  const auto publish_sums = [&] {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int row = warp % 4 * 16 + lane / 4 + 8 * x;
      s.key_sum[64 * group + row] = key_sum(2 * x);
#pragma unroll
      for (int i = 0; i < kMine; ++i) s.value_sum[64 * (group * kMine + i) + row] = value_sum(4 * i + 2 * x);
    }
  };
  // Of the whole block, before the next barrier but one.
  const auto publish_weight_sum = [&] {
    float sum = weight_sum;
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (lane == 0 && group == 0) s.sum[warp] = sum;
  };
  const auto total_weight = [&] { return s.sum[0] + s.sum[1] + s.sum[2] + s.sum[3]; };

  // ---- Tiles ----
  uint4 raw_k[4], raw_v[kMine][4];
  uint32_t packed_k, packed_v;  // the largest
  const auto fetch_pieces = [&](int tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      raw_k[r] = *place(keys_of(tile), r);
#pragma unroll
      for (int i = 0; i < kMine; ++i) raw_v[i][r] = *place(values_of(tile, i), r);
    }
    if (tile >= num_tiles - 1) {  // what lies beyond the visible keys may be anything
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (work.begin + tile * kStepTile + first_row + 4 * r < work.end) continue;
        raw_k[r] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kMine; ++i) raw_v[i][r] = {0, 0, 0, 0};
      }
    }
    packed_k = packed_v = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      packed_k = largest_of<E>(packed_k, raw_k[r]);
#pragma unroll
      for (int i = 0; i < kMine; ++i) packed_v = largest_of<E>(packed_v, raw_v[i][r]);
    }
  };
  const float score_scale = args.scale * 1.44269504088896341f;

  multiply_scores(0);
  fetch_pieces(0);
  warpgroup_wait<0>();
  for (int tile = 0; tile < num_tiles; ++tile) {
    // Scores in units of log2(e), row first_row + 4 r; column 0 of the product is in every fourth lane.
    float score[4], largest = -INFINITY;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float of = __shfl_sync(0xffffffffu, scores(r / 2 * 2), (lane / 8 + 4 * (r % 2)) * 4);
      const bool inside = work.begin + tile * kStepTile + first_row + 4 * r < work.end;
      score[r] = inside ? of * score_scale : -INFINITY;
      largest = fmaxf(largest, score[r]);
    }
    const float2 pair_k = E::unpack(packed_k), pair_v = E::unpack(packed_v);
    float largest_k = fmaxf(pair_k.x, pair_k.y), largest_v = fmaxf(pair_v.x, pair_v.y);
    const bool vote = largest > units.top + kSlack || largest_k * units.key > kKeyLimit ||
                      largest_v * units.value > kValueLimit;
    // Also: all warps are done with the products of the tile before, whose stage is free.
    const bool change = __syncthreads_or(vote) || tile == 0;
    if (threadIdx.x == 0 && tile > 0) load(tile - 1 + kStages);
    if (change) {
      publish_sums();
      publish_weight_sum();
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        largest_k = fmaxf(largest_k, __shfl_xor_sync(0xffffffffu, largest_k, step));
        largest_v = fmaxf(largest_v, __shfl_xor_sync(0xffffffffu, largest_v, step));
      }
      if (lane == 0)
        s.largest[0][warp] = largest, s.largest[1][warp] = largest_k, s.largest[2][warp] = largest_v;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kStepWarps<kD>; ++w) {
        largest = fmaxf(largest, s.largest[0][w]);
        largest_k = fmaxf(largest_k, s.largest[1][w]);
        largest_v = fmaxf(largest_v, s.largest[2][w]);
      }
      const bool first = tile == 0, higher = largest > units.top + kSlack;
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (higher && piece == 0 && score[r] == largest) atomicMin(&s.argmax, first_row + 4 * r);
      __syncthreads();
      // The new reference, by the threads whose piece it is in, to everybody. raw_k is still in shared
      // memory.
      float c_new[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) c_new[e] = c0[e];
      if (higher) {
        const int row = s.argmax;
        const uint4 raw = *reinterpret_cast<const uint4*>(keys_of(tile) + row * 64 + (piece ^ row % 8) * 8);
        const uint32_t pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 k = E::unpack(pair[e]);
          c_new[2 * e] = k.x, c_new[2 * e + 1] = k.y;
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (first_row == 0) s.delta[64 * group + 8 * piece + e] = (c0[e] - c_new[e]) * units.key;
        c0[e] = c_new[e];
      }
      const Units next = units.next(first, higher, largest, largest_k, largest_v);
      const UnitChange by(units, next, first);
      const float l = total_weight();
      __syncthreads();
      if (threadIdx.x == 0) s.argmax = kStepTile;
      if (!first) move_sums(sums, by, s.delta, s.key_sum, s.value_sum, l);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int row = 64 * group + warp % 4 * 16 + lane / 4 + 8 * x;
        if (lane % 4 == 0) key_sum(2 * x) = by.key * (key_sum(2 * x) + l * s.delta[row]);
#pragma unroll
        for (int i = 0; i < kMine; ++i) value_sum(4 * i + 2 * x) *= by.value;
      }
      weight_sum *= by.weight;
      units = next;
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float w = exp2_approx(0.5f * (score[r] - units.top));
      const __half rounded = __float2half_rn(w);
      weight_sum += __half2float(rounded) * __half2float(rounded);
      if (piece == 0 && group == 0)
        s.weights[tile % 2][first_row + 4 * r] = reinterpret_cast<const Half&>(rounded);
      const float key = w * units.key, value = w * units.value;
      *place(keys_of(tile), r) = map_pairs<E>(raw_k[r], [&](int e, float2 k) {
        return float2{(k.x - c0[2 * e]) * key, (k.y - c0[2 * e + 1]) * key};
      });
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        *place(values_of(tile, i), r) =
            map_pairs<E>(raw_v[i][r], [&](int, float2 v) { return float2{v.x * value, v.y * value}; });
    }
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    multiply_sums(tile);
    // After the last tile the same with what happens to be in its stage: a branch around products in flight
    // would make the compiler wait for each of them.
    multiply_scores(tile + 1);
    fetch_pieces(tile + 1);
    warpgroup_wait<0>();
  }

  // In units of the inputs.
  const float key_unit = 1.f / units.key, value_unit = 1.f / units.value;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    key_sum(x) *= key_unit;
#pragma unroll
    for (int i = 0; i < kMine; ++i) value_sum(4 * i + x) *= value_unit;
  }
  publish_sums();
  publish_weight_sum();
  if (first_row == 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) s.delta[64 * group + 8 * piece + e] = c0[e];
  }
  __syncthreads();
  float top = units.top, l = total_weight();
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) sums.key_key(n)[e] *= key_unit * key_unit;
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) sums.key_value(n)[e] *= key_unit * value_unit;
  }
  if constexpr (Traits::kClusters) {
    if (args.cluster) {
      const bool first = add_up_cluster(static_cast<int>(cute::block_rank_in_cluster()), args.splits,
                                        s.cluster, s.exchange, top, l, s.delta, s.key_sum, s.value_sum, sums);
      if (!first) return;
      if (!(top > -INFINITY)) return work.answer_without_keys<Tag>(args);
    }
  }
  if (args.splits > 1 && !args.cluster)
    return record_split(args, top, l, s.delta, s.key_sum, s.value_sum, sums);
  answer<Tag>(args, work.row, s.query, top, l, s.delta, s.key_sum, s.value_sum, sums, step_storage);
}

// ---- Launch ----

inline cudaError_t encode_cache(CUtensorMap* map, const View<const void>& t, bool is_bf16, int64_t features,
                                const StepArgs& args) {
  TmaTensor d{};
  d.data = t.data;
  d.type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  d.element_bytes = 2;
  d.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  d.lay_out({features, args.n, args.kv_heads, args.batch, 1},
            {1, t.row_stride, t.head_stride, t.batch_stride, 0}, {64, kStepTile, 1, 1, 1});
  return encode_tma(map, d);
}

template <class Tag, int kD, int kDv>
int step_sm90<Tag, kD, kDv>::run(const StepArgs& args, void* stream) {
  using Traits = StepTraits<Tag, kD, kDv>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  StepMaps maps;
  cudaError_t error = encode_cache(&maps.k, args.k, kBf16, args.d, args);
  if (error == cudaSuccess) error = encode_cache(&maps.v, args.v, kBf16, args.dv, args);
  if (error != cudaSuccess) return error;
  return launch_step<Tag, kD, kDv>(moments_sm90_kernel<Tag, kD, kDv>, sizeof(typename Traits::Storage), args,
                                   static_cast<cudaStream_t>(stream), maps);
}

}  // namespace nearfield::lla
