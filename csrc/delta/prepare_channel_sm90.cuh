// Preparing chunks with a gate per channel: a chunk's way through the steps of its warps, and the kernels,
// which prepare all chunks before the state pass or, a few at a time, beside it.
#pragma once

#include "delta/prepare_channel_steps_sm90.cuh"

namespace nearfield::delta {

// ---- A chunk ----

// K, Q and gates of a chunk lie where nothing is needed once A and P are there, or, the second half of the
// gates, nothing else is. So beside the state pass all of the next chunk is on its way while A is inverted.
struct ChannelMaps : TokenMaps {
  CUtensorMap g;
};

// Gates [B, T, HV, K]: one copy brings 32 channels of 64 tokens, rows of 128 bytes whose pieces are swizzled.
inline cudaError_t encode_gates(CUtensorMap* map, const ForwardInputsSm90& in) {
  TmaTensor d{};
  d.data = in.g;
  d.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  d.element_bytes = 4;
  d.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  const int64_t token = in.token_heads * in.key_dim;
  d.lay_out({in.key_dim, in.tokens, in.token_heads, in.batch, 1},
            {1, token, in.key_dim, in.tokens * token, 0}, {32, kImageRows, 1, 1, 1});
  return encode_tma(map, d);
}

// The same for all lanes, so that the compiler knows it.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// One thread: K, Q and gates of a chunk.
template <class Traits>
__device__ __forceinline__ void fetch_chunk(typename Traits::Storage& s, const ChannelMaps& maps,
                                            const ChunkPlace& place) {
  constexpr int kGateBytes = Traits::kKeyDim * kRows * 4;
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.arrived,
                                                                 2 * Traits::kTile * 2 + kGateBytes);
  CUTE_UNROLL
  for (int c = 0; c < Traits::kKeyDim; c += 32) {
    float* to = (c < kImageColumns ? s.first_gates : s.more_gates) + c % kImageColumns * kRows;
    SM90_TMA_LOAD_5D::copy(&maps.g, &s.arrived, static_cast<uint64_t>(kStays), to, c,
                           static_cast<int>(place.token), static_cast<int>(place.head),
                           static_cast<int>(place.batch), 0);
  }
  load_tokens<Traits::kKeyDim>(maps.k, &s.arrived, s.k, 0, place.token, place.head_k, place.batch);
  load_tokens<Traits::kKeyDim>(maps.q, &s.arrived, s.q, 0, place.token, place.head_k, place.batch);
}

// A warp: write strengths of a chunk to shared memory, as they came. Those of rows past the end are not used.
template <class Storage>
__device__ __forceinline__ void fetch_betas(Storage& s, const ForwardInputsSm90& in,
                                            const ChunkPlace& place) {
  const float* from = in.beta + place.token_head(in, 0);
  CUTE_NO_UNROLL
  for (int row = thread_now() % 32; row < place.valid; row += 32) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(cast_smem_ptr_to_uint(&s.raw_beta[row])),
                 "l"(from + row * in.token_heads)
                 : "memory");
  }
}

// One thread, beside the state pass: the place of a turn.
template <class Storage>
__device__ __forceinline__ void find_place(Storage& s, const PrepareArgs& args, uint32_t turn) {
  ChunkPlace place{};
  if (!place.find_for_walks(args.in, s.next)) place.valid = 0;
  s.next += 2 * gridDim.x;
  s.places[turn % 4] = place;
}

// By eight warps, which `barrier` and the next are for; `turn` counts their chunks. One thread asks for the
// next tiles, sends the results away and, beside the state pass, announces those of the chunk before while
// others invert.
template <class Traits, bool kBeside>
__device__ __forceinline__ void prepare_channel_chunk(const ChannelMaps& maps, const PrepareArgs& args,
                                                      uint32_t turn) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  const ForwardInputsSm90& in = args.in;
  const uint32_t at = thread_now();
  const int half = kBeside ? uniform<int>(at / Traits::kChunkThreads) : 0,
            thread = at % Traits::kChunkThreads, warp = uniform(thread / 32);
  auto& s = shared_storage<typename Traits::Pair>().half[half];
  const uint32_t barrier = 1 + 2 * half;
  const bool with_low = args.scratch.hard != nullptr;
  // Nothing may seem to stay in registers from a chunk to the next, as what is set and used under conditions
  // does: so all warps own rows where that is known, and both sides of the inverse have barriers of their
  // own.
  const bool owns = Traits::kOwners == Traits::kChunkThreads / 32 || warp < Traits::kOwners;
  const bool sends = thread == Traits::kSender;
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(Traits::kChunkThreads, barrier); };
  const ChunkPlace& place = s.places[turn % 4];
  const auto index = uniform(static_cast<uint32_t>(place.index));
  const int valid = uniform(place.valid);

  Barrier::wait(&s.arrived, turn % 2);
  asm volatile("" ::: "memory");
  OwnRows<Traits> own;
  own.block = warp / Traits::kHalves, own.half = warp % Traits::kHalves;
  if (in.gate != Gate::kLog) {
    if (owns) own.activate_gates(s, in, place);
    sync();
  }
  if (owns) own.load_gates(s, in, valid);
  __syncwarp();
  if (thread % 32 == 0) {
    if (kBeside && !sends) wait_for_stores();  // before they are announced
    if (sends) tma_store_wait<0>();
    Barrier::arrive(&s.free);
  }
  if (args.scratch.G != nullptr) {
    sync();
    if (owns) own.put_G(s, args, index);
  }
  if (owns) {
    if (valid < kRows) own.clear_rows(s, valid);
    KeysAndQueries kq;
    load_keys_and_queries<Traits>(s, own, kq);
    row_products<Traits>(s, own, kq);
    Barrier::wait(&s.free, turn % 2);
    diagonal_levels<Traits>(s, own, kq);
  }
  if (warp == Traits::kFinder / 32) asm volatile("cp.async.wait_all;" ::: "memory");
  sync();  // gates, products and write strengths are there
  if (owns) {
    put_factors<Traits>(s, in, own.block, valid);
    scale_rows<Traits>(s, args, index, own);
  }
  cutlass::arch::fence_view_async_shared();
  sync();  // L, R and the sums of levels are there

  // A_ij = beta_i k_i . k_j e^{G_i - G_j}, P_ij = scale q_i . k_j e^{G_i - G_j}.
  const auto to = [&](void* scratch) {
    return static_cast<Element*>(scratch) + static_cast<int64_t>(index) * kImage;
  };
  if (warp < 4) {
    for_block<false, Traits>(s, warp, [&](int i, int j, float2 a) {
      const float2 k_norm = *reinterpret_cast<const float2*>(&s.k_norm[j]);
      s.triangular.diagonal[warp][j % 16][i % 16] = s.a_row[i] * k_norm.x * a.x;
      s.triangular.diagonal[warp][j % 16 + 1][i % 16] = s.a_row[i] * k_norm.y * a.y;  // or not read
    });
    __syncwarp();
    float column[16];  // of a diagonal block of N
    invert_diagonal_block(s.triangular, warp, column);
    if (kBeside && thread % 32 == 0) tma_store_wait<0>();  // Kt has been read
    sync();                                                // A and P are there; K, Q and R have been read
    const float squares = put_column<true>(s.np, warp, column);
    put_squares(s.squares, put_other_blocks<Second::kNothing, /*kLeave=*/true, /*kZeros=*/false>(
                               s.a, s.triangular, s.np, s.np, squares));
    cutlass::arch::fence_view_async_shared();
  } else {
    const auto put_product = [&](int I, int J) { BlockProduct<Traits>(s, I, J).put(s, I, J); };
    const int x = warp - 4;
    put_product(x == 0 ? 1 : x == 1 ? 2 : 3, x == 1 || x == 2 ? x == 2 : 0);
    if (x < 2) {
      put_product(2 + x, 1 + x);
    } else {
      put_diagonal_of_P<Traits>(s, 2 * x - 4);
      put_diagonal_of_P<Traits>(s, 2 * x - 3);
    }
    cutlass::arch::fence_view_async_shared();
    if (kBeside && thread % 32 == 0) tma_store_wait<0>();
    sync();
    if (sends) {
      if constexpr (kBeside) {
        const ChunkPlace& next = s.places[(turn + 1) % 4];
        if (next.valid > 0) fetch_chunk<Traits>(s, maps, next);
        if (turn > 0) announce(args, s.sent.index, s.sent.hard);
      }
      auto& rows = args.scratch.rows[index];
      copy_out(rows.beta, s.beta, kRows * 4);
      if (args.scratch.G != nullptr) {
        copy_out(rows.k_norm, s.k_norm, kRows * 4);
        copy_out(rows.q_norm, s.q_norm, kRows * 4);
      }
      tma_store_arrive();
    } else if (kBeside && warp == Traits::kFinder / 32) {
      fetch_betas(s, in, s.places[(turn + 1) % 4]);
      if (thread == Traits::kFinder) find_place(s, args, turn + 2);
    }
  }
  sync();
  const bool hard = with_low && uniform(is_hard(s.squares, valid) ? 1 : 0) != 0;
  if (sends) {
    copy_out(to(args.scratch.NP), s.np, kImageBytes);
    if (with_low) args.scratch.hard[index] = hard ? 1.f : 0.f;
    tma_store_arrive();
    if (kBeside) s.sent.index = index, s.sent.hard = hard;
  }
  if (!hard) return;
  if (sends) tma_store_wait<0>();
  sync();  // the results have been read
  if (warp < 4) {
    invert<Second::kLost, /*kLeave=*/true>(s.a, s.triangular, s.n, s.np, barrier + 1);
  } else if constexpr (Traits::kLow) {
    for (int x = thread % 128; x < 6 * 32; x += 128) {  // blocks of P above the diagonal
      const int block = x / 32,
                row = block < 3   ? 0
                      : block < 5 ? 1
                                  : 2,
                column = block - (row == 0 ? -1 : row);
      *reinterpret_cast<uint4*>(image_piece(s.p_low, 16 * row + x % 16, 2 * column + x / 16 % 2)) =
          uint4{0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  if (owns) put_Kt_low<Traits>(s, args, place, own);
  sync();
  if (sends) {
    copy_out(to(args.scratch.N_low), s.np, kImageBytes);
    copy_out(to(args.scratch.P_low), s.p_low, kImageBytes);
    tma_store_arrive();
  }
}

// ---- Kernels ----

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::Storage& s) {
  cutlass::arch::ClusterTransactionBarrier::init(&s.arrived, 1);
  cutlass::arch::ClusterTransactionBarrier::init(&s.free, Traits::kChunkThreads / 32);
  cutlass::arch::fence_barrier_init();
}

// A chunk and no more. The grid is all chunks in a line, or, so that nothing is divided, value heads,
// sequences and chunks of a sequence.
template <class Traits>
__global__ void __launch_bounds__(Traits::kChunkThreads, 2)
    prepare_channel_kernel(const __grid_constant__ ChannelMaps maps,
                           const __grid_constant__ PrepareArgs args) {
  auto& s = shared_storage<typename Traits::Storage>();
  const uint32_t warp = threadIdx.x / 32;
  if (warp == Traits::kSender / 32 || warp == Traits::kFinder / 32) {
    // The walk begins with what was prepared last and is still in the L2 cache.
    const uint32_t at = gridDim.x - 1 - blockIdx.x, heads = static_cast<uint32_t>(args.in.value_heads);
    ChunkPlace place{};
    if (gridDim.z > 1) {
      place.set(args.in, gridDim.z - 1 - blockIdx.z, blockIdx.y, blockIdx.x);
    } else if (args.in.cu_seqlens == nullptr) {
      place.find_for_walks(args.in, at);
    } else if (!place.find(args.in, at / heads, at % heads)) {
      place.valid = 0;
    }
    if (threadIdx.x == Traits::kSender) {
      init_barriers<Traits>(s);
      if (place.valid > 0) fetch_chunk<Traits>(s, maps, place);
      s.places[0] = place;
    }
    if (warp == Traits::kFinder / 32) fetch_betas(s, args.in, place);
  }
  if (warp == 0) put_betweens(s, OwnRows<Traits>::kOnes);
  __syncthreads();
  if (args.in.cu_seqlens != nullptr && s.places[0].valid <= 0) return;
  prepare_channel_chunk<Traits, false>(maps, args, 0);
  if (threadIdx.x % 32 == 0) tma_store_wait<0>();
}

// Beside the state pass: a CTA has an SM, which leaves the others to the walks, and each half of it prepares
// chunk after chunk, in the order in which the walks need them.
template <class Traits>
__global__ void __launch_bounds__(2 * Traits::kChunkThreads, 1)
    prepare_channel_beside_kernel(const __grid_constant__ ChannelMaps maps,
                                  const __grid_constant__ PrepareArgs args) {
  // The state pass takes the other SMs once all of these CTAs have theirs.
  let_kernel_after_begin();
  const uint32_t half = threadIdx.x / Traits::kChunkThreads, thread = threadIdx.x % Traits::kChunkThreads;
  auto& s = shared_storage<typename Traits::Pair>().half[half];
  if (thread == Traits::kFinder) {
    init_barriers<Traits>(s);
    s.next = 2 * blockIdx.x + half;
    find_place(s, args, 0);
    find_place(s, args, 1);
  }
  if (thread < 32) put_betweens(s, OwnRows<Traits>::kOnes);
  __syncthreads();
  if (s.places[0].valid > 0) {
    if (thread == Traits::kSender) fetch_chunk<Traits>(s, maps, s.places[0]);
    if (thread / 32 == Traits::kFinder / 32) fetch_betas(s, args.in, s.places[0]);
  }
  uint32_t turn = 0;
  for (; uniform(s.places[turn % 4].valid) > 0; ++turn) prepare_channel_chunk<Traits, true>(maps, args, turn);
  if (turn == 0) return;
  if (thread % 32 == 0) wait_for_stores();
  cutlass::arch::NamedBarrier::sync(Traits::kChunkThreads, 1 + 2 * half);
  if (thread == Traits::kSender) announce(args, s.sent.index, s.sent.hard);
}

}  // namespace nearfield::delta
