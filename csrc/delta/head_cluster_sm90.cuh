// The forward of a head by a cluster of four CTAs: two prepare its chunks (prepare_sm90.cuh), two walk over
// them, 64 value columns each (state_pass_sm90.cuh). N, P and the rows of factors of a chunk go from shared
// memory to shared memory, straight into the stages of the walks, so memory sees q, k, v and o only, and as
// nobody is far ahead of anybody, keys and queries that the walks read again are still in the L2 cache.
// Heads rarely come in the number of clusters that a GPU runs side by side: then some are cut in two parts,
// and the state goes from one to the other through memory. A cluster has its parts from the host's plan; what
// prepares goes on to the next one without a pause. It waits only for the first part of the cluster before,
// so that clusters may run in any number at once.
#pragma once

#include <array>
#include <cute/arch/cluster_sm90.hpp>
#include <mutex>

#include "delta/head_cluster_sm90.h"
#include "delta/prepare_sm90.cuh"
#include "delta/state_pass_sm90.cuh"

namespace nearfield::delta {

constexpr int kHeadCluster = HeadClusterArgs::kCluster;

template <class Tag, int kKeyDim, bool kKeep_>
struct HeadClusterTraits {
  static constexpr bool kKeep = kKeep_;
  using Walk =
      StatePassTraits<Tag, kKeyDim, /*kChannelGate=*/false, /*kOutput=*/true, /*kComputeP=*/false, kKeep,
                      /*kInCluster=*/true>;
  using Prepare = PrepareTraits<Tag, kKeyDim, /*kWithP=*/true, kKeep>;
  // Clusters take several parts, one after the other. Else each has one, and others begin where it ends:
  // where nothing is kept the chain has no registers left for a loop around it (README.md).
  static constexpr bool kGoOn = Walk::kGoOn;
  static constexpr int kWalks = 2, kPreparing = kHeadCluster - kWalks;  // CTAs; walks come first
  static constexpr int kGroups = Prepare::kGroups, kPreparers = kPreparing * kGroups;  // warpgroups
  static constexpr int kStages = Walk::kStages;
  static_assert(kPreparers % kStages == 0, "a warpgroup sends to one stage");
  static constexpr int kThreads = Walk::kThreads;
  static_assert(kThreads == Prepare::kThreads);
  static constexpr int kChainRegisters = 256, kHelperRegisters = 96, kIdleRegisters = 24;
  static_assert(kChainRegisters + kHelperRegisters + kIdleRegisters <= 3 * 168);

  struct Storage {
    union {
      typename Walk::Storage walk;
      typename Prepare::Storage prepare;
    };
    // Of a warpgroup that prepares: both walks have a free stage for its next chunk; both have taken the one
    // before.
    uint64_t room[kGroups], taken[kGroups];
    typename Walk::ChunkFlag flag[kGroups];
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// From this CTA's shared memory to the same place, or another, of a CTA of the cluster, whose barrier counts
// the bytes.
__device__ __forceinline__ void copy_to_cta(uint32_t rank, void* there, const void* here, int bytes,
                                            uint64_t* barrier_there) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          cute::set_block_rank(cute::cast_smem_ptr_to_uint(there), rank)),
      "r"(cute::cast_smem_ptr_to_uint(here)), "r"(bytes),
      "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(barrier_there), rank))
      : "memory");
}

// Where prepare_chunk sends its results: to a stage of both walks, and to memory if they are kept.
template <class Traits>
struct ToWalks {
  static constexpr bool kFetchLate = Traits::kKeep;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  const HeadClusterArgs& args;
  int group, stage;

  __device__ __forceinline__ auto& shared() const { return shared_storage<typename Traits::Storage>(); }
  __device__ __forceinline__ void wait_read() const {
    if constexpr (Traits::kKeep) tma_store_wait<0>();
  }
  __device__ __forceinline__ void wait_taken(uint32_t turn) const {
    Barrier::wait(&shared().taken[group], turn % 2 ^ 1);
  }
  __device__ __forceinline__ void tell() const {}
  template <class Group>
  __device__ __forceinline__ void send(Group& s, uint32_t turn, const ChunkPlace& place, bool hard) const {
    using Walk = typename Traits::Walk;
    auto& flag = shared().flag[group];
    flag.hard = hard;
    cutlass::arch::fence_view_async_shared();
    if (hard) {  // the low halves are in memory, not only read from shared memory
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      __threadfence();
    }
    if constexpr (Traits::kKeep) {
      constexpr CacheHint kHint = Traits::Walk::kLastUse;
      const ChunkScratch& kept = args.scratch;
      const int64_t index = place.index;
      copy_out(kept.rows + index, &s.rows[turn % 2], sizeof(ChunkRows), kHint);
      copy_out(static_cast<char*>(kept.NP) + index * kImageBytes, s.np, kImageBytes, kHint);
      tma_store_arrive();
    }
    Barrier::wait(&shared().room[group], turn % 2);
    auto& walk = shared().walk;
    CUTE_UNROLL
    for (uint32_t rank = 0; rank < Traits::kWalks; ++rank) {
      uint64_t* full = &walk.ring.full[stage];
      copy_to_cta(rank, walk.stage[stage].n, s.n, kImageBytes, full);
      copy_to_cta(rank, &walk.rows[stage], &s.rows[turn % 2], Walk::kRowsBytes, full);
      copy_to_cta(rank, walk.stage[stage].p, s.p, kImageBytes, full);
      copy_to_cta(rank, &walk.flag[stage], &flag, sizeof(flag), full);
    }
  }
};

struct PartOfHead {
  Part part;
  int64_t head;
  int from, to;

  __device__ __forceinline__ PartOfHead(const HeadClusterArgs& a, const HeadClusterArgs::Part& p) {
    const InputsSm90& in = a.in;
    const auto heads = static_cast<int>(in.value_heads);
    head = p.row % heads, from = p.from, to = p.to;
    part.n = p.row / heads, part.first = from < 0, part.last = to < 0;
    part.sequence = sequence_of(in, part.n);
    part.sequence.first_slot += p.begin, part.sequence.first_chunk = p.begin;
    part.sequence.begin += static_cast<int64_t>(p.begin) * kRows;
    part.sequence.length = min(static_cast<int64_t>(p.end) * kRows, in.tokens) - part.sequence.begin;
  }
};

// f(number of a part) for the parts of this cluster.
template <bool kGoOn, class F>
__device__ __forceinline__ void for_parts(const HeadClusterArgs& a, const F& f) {
  const int cluster = static_cast<int>(blockIdx.x) / kHeadCluster;
  if constexpr (kGoOn) {
    CUTE_NO_UNROLL
    for (int i = a.first_part[cluster]; i < a.first_part[cluster + 1]; ++i) f(i);
  } else {
    f(cluster);
  }
}

// Chunk c of a part is for warpgroup c % kPreparers, and neighbors among these are on different SMs.
template <class Traits>
__device__ __forceinline__ void prepare_for_walks(const TokenMaps& maps, const HeadClusterArgs& a, int rank) {
  using Prepare = typename Traits::Prepare;
  const int group = threadIdx.x / 128, cluster = blockIdx.x / kHeadCluster;
  auto& s = shared_storage<typename Traits::Storage>().prepare.group[group];
  const int first_chunk = group * Traits::kPreparing + rank - Traits::kWalks;
  int chunk = first_chunk;  // of a part
  ToWalks<Traits> to{a, group, chunk % Traits::kStages};
  int part = Traits::kGoOn ? a.first_part[cluster] : cluster;
  const int parts_end = Traits::kGoOn ? a.first_part[cluster + 1] : cluster + 1;
  uint32_t slot = 0, head = 0;  // of the next chunk: found early, while registers are free
  const auto find = [&] {
    for (; part < parts_end; ++part) {
      const HeadClusterArgs::Part& p = a.parts[part];
      if (chunk < p.end - p.begin) {
        const auto heads = static_cast<uint32_t>(a.in.value_heads), row = static_cast<uint32_t>(p.row);
        const auto slots = static_cast<uint32_t>((a.in.tokens + kRows - 1) / kRows);  // of a sequence
        slot = row / heads * slots + p.begin + chunk, head = row % heads;
        chunk += Traits::kPreparers;
        return true;
      }
      chunk = first_chunk;
    }
    return false;
  };
  Fetched here, next;
  bool more = find();
  if (more) {
    here.place.find(a.in, slot, head);
    here.template fetch<Prepare>(s, maps, a.in);
  }
  for (uint32_t turn = 0; more; ++turn) {
    more = find();
    prepare_chunk<Prepare>(s, a.in, a.scratch, here, turn, 1 + group, to, [&] {
      if (!more) return;
      next.place.find(a.in, slot, head);
      next.template fetch<Prepare>(s, maps, a.in);
    });
    here = next;
  }
  if (threadIdx.x % 128 == 96) to.wait_read();
}

// The loading warp of a walk over a part. Each chunk's warpgroup hears when there is a stage for what it
// sends, and when that has been taken.
template <class Traits>
__device__ __forceinline__ void load_for_walk(typename Traits::Storage& s, const TokenMaps& maps,
                                              const HeadClusterArgs& a, const PartOfHead& z,
                                              int first_value) {
  const auto tell = [&](uint64_t (&barriers)[Traits::kGroups], int chunk) {
    const int preparer = chunk % Traits::kPreparers;
    cutlass::arch::ClusterTransactionBarrier::arrive(&barriers[preparer / Traits::kPreparing],
                                                     Traits::kWalks + preparer % Traits::kPreparing, 1);
  };
  const auto at_next = [&](int chunk) {
    if (chunk >= Traits::kStages) tell(s.taken, chunk - Traits::kStages);
  };
  auto at =
      load<typename Traits::Walk>(s.walk, maps, a, z.part.sequence, z.head, first_value, [&](int chunk) {
        tell(s.room, chunk);
        at_next(chunk);
      });
  const int chunks = z.part.sequence.chunks();
  for (int chunk = chunks; chunk < chunks + Traits::kStages; ++chunk, at.advance()) {
    s.walk.ring.wait_empty(at);
    if (threadIdx.x % 32 == 0) at_next(chunk);
  }
}

// ---- States at the ends of a part ----

// They pass through the first stage, between chain and helpers of a walk (256 threads, a barrier): addresses
// in global memory would take registers of the chain, which has none left.
constexpr uint32_t kStateHere = 3, kHelpersHere = 4;

template <class Traits>
__device__ __forceinline__ float4* state_in_stage(typename Traits::Storage& s, int piece) {
  auto& stage = s.walk.stage[0];
  using Stage = std::remove_reference_t<decltype(stage)>;
  static_assert(offsetof(Stage, q) == sizeof(stage.k) &&
                sizeof(stage.k) + sizeof(stage.q) >= 64 * Traits::Walk::kKeyDim * 4);
  return reinterpret_cast<float4*>(stage.k) + piece * 128 + threadIdx.x % 128;
}

// Of the states and flags that go from part to part.
template <class Traits>
__device__ __forceinline__ int64_t handed_at(int place, int tile) {
  return static_cast<int64_t>(place) * Traits::kWalks + tile;
}

// Where the state before a part is, or the one after it.
template <class Traits>
__device__ __forceinline__ StateRows state_at_end(const HeadClusterArgs& a, const PartOfHead& z, int tile,
                                                  bool after) {
  constexpr int kKeyDim = Traits::Walk::kKeyDim;
  const int place = after ? z.to : z.from;
  if (place < 0)
    return rows_of_state(a.in, after ? a.final_state : a.in.initial_state, z.part.n, z.head,
                         tile * kImageColumns);
  return {a.handed_states + handed_at<Traits>(place, tile) * kImageColumns * kKeyDim, kKeyDim, 1,
          kImageColumns, kKeyDim};
}

// Helper and chain thread of the same number have the same values and keys.
template <class Traits>
__device__ __forceinline__ void bring_state(typename Traits::Storage& s, const HeadClusterArgs& a,
                                            const PartOfHead& z, int tile) {
  if (z.from >= 0) {
    const int* flag = a.handed + handed_at<Traits>(z.from, tile);
    int there = 0;
    while (there == 0)
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
  }
  const StateRows from = state_at_end<Traits>(a, z, tile, false);
  const int lane = threadIdx.x % 32, value = threadIdx.x % 128 / 32 * 16 + lane / 4;
  CUTE_NO_UNROLL
  for (int piece = 0; piece < Traits::Walk::kKeyDim / 8; ++piece) {
    float x[4];
    CUTE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int v = value + 8 * (e / 2), key = 8 * piece + 2 * (lane % 4) + e % 2;
      x[e] = from.data != nullptr && v < from.values && key < from.keys
                 ? from.data[v * from.value + key * from.key]
                 : 0.f;
    }
    *state_in_stage<Traits>(s, piece) = {x[0], x[1], x[2], x[3]};
  }
}

template <class Traits>
__device__ __forceinline__ void take_state(typename Traits::Storage& s, const HeadClusterArgs& a,
                                           const PartOfHead& z, int tile) {
  const StateRows to = state_at_end<Traits>(a, z, tile, true);
  const int lane = threadIdx.x % 32, value = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (to.data != nullptr) {
    CUTE_NO_UNROLL
    for (int piece = 0; piece < Traits::Walk::kKeyDim / 8; ++piece) {
      const float4 four = *state_in_stage<Traits>(s, piece);
      const float x[4] = {four.x, four.y, four.z, four.w};
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int v = value + 8 * (e / 2), key = 8 * piece + 2 * (lane % 4) + e % 2;
        if (v < to.values && key < to.keys) to.data[v * to.value + key * to.key] = x[e];
      }
    }
  }
  if (z.to >= 0) __threadfence();
  cutlass::arch::NamedBarrier::sync(128, kHelpersHere);
  if (z.to >= 0 && threadIdx.x % 128 == 0) {
    int* flag = a.handed + handed_at<Traits>(z.to, tile);
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
  }
}

// The chain of a walk over a part.
template <class Traits>
__device__ __forceinline__ void walk_chain(typename Traits::Storage& s, const HeadClusterArgs& a, int part,
                                           int tile) {
  using Walk = typename Traits::Walk;
  using cutlass::arch::NamedBarrier;
  auto S = make_state<Walk>();
  NamedBarrier::sync(256, kStateHere);
  CUTE_UNROLL
  for (int piece = 0; piece < Walk::kKeyDim / 8; ++piece) {
    const float4 x = *state_in_stage<Traits>(s, piece);
    S(4 * piece) = x.x, S(4 * piece + 1) = x.y, S(4 * piece + 2) = x.z, S(4 * piece + 3) = x.w;
  }
  cutlass::arch::fence_view_async_shared();  // the copy engine writes there next
  NamedBarrier::sync(256, kStateHere);
  {
    const PartOfHead z(a, a.parts[part]);
    walk_through<Walk>(s.walk, a, z.part, z.head, tile * kImageColumns, S, false);
  }
  NamedBarrier::sync(128, 2);  // all warps are done with the stages
  CUTE_UNROLL
  for (int piece = 0; piece < Walk::kKeyDim / 8; ++piece)
    *state_in_stage<Traits>(s, piece) = {S(4 * piece), S(4 * piece + 1), S(4 * piece + 2), S(4 * piece + 3)};
  NamedBarrier::sync(256, kStateHere);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    head_cluster_kernel(const __grid_constant__ TokenMaps maps, const __grid_constant__ HeadClusterArgs a) {
  using Walk = typename Traits::Walk;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  auto& s = shared_storage<typename Traits::Storage>();
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, first_value = rank * kImageColumns;
  const bool walks = rank < Traits::kWalks;
  if (threadIdx.x == 0) {
    if (walks) init_rings(s.walk);
    for (int g = 0; g < Traits::kGroups; ++g) {
      if (!walks) Barrier::init(&s.prepare.group[g].arrived, 1);
      Barrier::init(&s.room[g], Traits::kWalks);
      Barrier::init(&s.taken[g], Traits::kWalks);
    }
    cutlass::arch::fence_barrier_init();
    prefetch_map(maps.q);
    prefetch_map(maps.k);
    prefetch_map(maps.v);
  }
  const auto meet = [] {
    __syncwarp();
    cute::cluster_arrive();
    cute::cluster_wait();
  };
  meet();
  // Each role ends with meet(): nobody leaves while another may still reach into its shared memory.
  if (walks && warpgroup == 0) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kChainRegisters>();
    for_parts<Traits::kGoOn>(a, [&](int part) { walk_chain<Traits>(s, a, part, rank); });
    meet();
  } else if (walks && warpgroup == 1) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kHelperRegisters>();
    using cutlass::arch::NamedBarrier;
    for_parts<Traits::kGoOn>(a, [&](int part) {
      const PartOfHead z(a, a.parts[part]);
      bring_state<Traits>(s, a, z, rank);
      NamedBarrier::sync(256, kStateHere);
      NamedBarrier::sync(256, kStateHere);  // the chain has it
      if (warp == Walk::kHelpers / 32) load_for_walk<Traits>(s, maps, a, z, first_value);
      if (warp == Walk::kStoringO) store<Walk>(s.walk, a, z.part.sequence, z.head, first_value);
      if constexpr (Traits::kKeep) {
        if (threadIdx.x == Walk::kStoringV * 32)
          store_v_new<Walk>(s.walk, a, z.part.sequence, z.head, first_value);
      }
      __syncwarp();
      NamedBarrier::sync(256, kStateHere);
      if (Traits::kGoOn && threadIdx.x % 128 == 0) {
        // Rings begin anew: places in them that went on would take registers, too.
        s.walk.ring.invalidate(), s.walk.ring_p.invalidate(), s.walk.ring_low.invalidate();
        s.walk.ring_out.invalidate(), s.walk.ring_v_new.invalidate();
        init_rings(s.walk);
      }
      take_state<Traits>(s, a, z, rank);
    });
    meet();
  } else if (walks) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kIdleRegisters>();
    meet();
  } else {
    prepare_for_walks<Traits>(maps, a, rank);
    meet();
  }
}

template <class Traits, class Use>
cudaError_t with_head_cluster_config(int clusters, cudaStream_t stream, cudaEvent_t begun, const Use& use) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  const auto kernel = head_cluster_kernel<Traits>;
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kHeadCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeLaunchCompletionEvent;
  attributes[1].val.launchCompletionEvent.event = begun;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(clusters * kHeadCluster), config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kShared, config.stream = stream;
  config.attrs = attributes, config.numAttrs = begun != nullptr ? 2 : 1;
  return use(config, kernel);
}

template <class Tag, int kKeyDim>
int head_cluster_sm90<Tag, kKeyDim>::run(const HeadClusterArgs& args, void* stream, void* begun) {
  TokenMaps maps{};
  if (const cudaError_t e = encode_inputs(&maps, args.in, std::is_same_v<Tag, bf16>)) return e;
  const auto launch = [&](auto keep) {
    using Traits = HeadClusterTraits<Tag, kKeyDim, decltype(keep)::value>;
    return with_head_cluster_config<Traits>(args.clusters, static_cast<cudaStream_t>(stream),
                                            static_cast<cudaEvent_t>(begun),
                                            [&](const cudaLaunchConfig_t& config, auto kernel) {
                                              return cudaLaunchKernelEx(&config, kernel, maps, args);
                                            });
  };
  if constexpr (kKeyDim == 128) {
    if (args.states != nullptr) return launch(std::true_type{});
  }
  return launch(std::false_type{});
}

template <class Tag, int kKeyDim>
int head_cluster_sm90<Tag, kKeyDim>::at_once() {
  constexpr int kMaxDevices = 64;
  static std::array<int, kMaxDevices> known{};
  static std::array<std::once_flag, kMaxDevices> once;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  std::call_once(once[device], [&] {
    const cudaError_t e = with_head_cluster_config<HeadClusterTraits<Tag, kKeyDim, false>>(
        1, nullptr, nullptr, [&](const cudaLaunchConfig_t& config, auto kernel) {
          return cudaOccupancyMaxActiveClusters(&known[device], kernel, &config);
        });
    if (e != cudaSuccess) known[device] = 0;
  });
  return known[device];
}

}  // namespace nearfield::delta
