// The forward of a head by a cluster of four CTAs: two prepare its chunks (prepare_sm90.cuh), two walk over
// them, 64 value columns each (state_pass_sm90.cuh). N, P and the rows of factors of a chunk go from shared
// memory to shared memory, straight into the stages of the walks, so memory sees q, k, v and o only, and as
// nobody is far ahead of anybody, keys and queries that the walks read again are still in the L2 cache.
// Heads rarely come in the number of clusters that a GPU runs side by side: then some are cut in two parts,
// and the state goes from one to the other through memory. Which part begins when is the host's plan; a part
// waits only for one that stands before it, so that they may run in any number at once.
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
  static constexpr int kWalks = 2, kPreparing = kHeadCluster - kWalks;  // CTAs; walks come first
  static constexpr int kGroups = Prepare::kGroups, kPreparers = kPreparing * kGroups;  // warpgroups
  static constexpr int kStages = Walk::kStages;
  static_assert(kPreparers % kStages == 0, "a warpgroup sends to one stage");
  static constexpr int kThreads = Walk::kThreads;
  static_assert(kThreads == Prepare::kThreads);
  static constexpr int kChainRegisters = 248, kHelperRegisters = 104, kIdleRegisters = 24;
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

  __device__ __forceinline__ explicit PartOfHead(const HeadClusterArgs& a) {
    const InputsSm90& in = a.in;
    const HeadClusterArgs::Part& p = a.parts[blockIdx.x / kHeadCluster];
    const auto heads = static_cast<int>(in.value_heads);
    head = p.row % heads, from = p.from, to = p.to;
    part.n = p.row / heads, part.first = from < 0, part.last = to < 0;
    part.sequence = sequence_of(in, part.n);
    part.sequence.first_slot += p.begin, part.sequence.first_chunk = p.begin;
    part.sequence.begin += static_cast<int64_t>(p.begin) * kRows;
    part.sequence.length = min(static_cast<int64_t>(p.end) * kRows, in.tokens) - part.sequence.begin;
  }
};

// Chunk c is for warpgroup c % kPreparers, and neighbors among these are on different SMs.
template <class Traits>
__device__ __forceinline__ void prepare_for_walks(const TokenMaps& maps, const HeadClusterArgs& a,
                                                  const Sequence& sequence, int64_t head, int rank) {
  using Prepare = typename Traits::Prepare;
  const int group = threadIdx.x / 128;
  auto& s = shared_storage<typename Traits::Storage>().prepare.group[group];
  const int chunks = sequence.chunks();
  int chunk = group * Traits::kPreparing + rank - Traits::kWalks;
  ToWalks<Traits> to{a, group, chunk % Traits::kStages};
  const auto find = [&](ChunkPlace& place) {
    return chunk < chunks && place.find(a.in, sequence.first_slot + chunk, head);
  };
  Fetched here, next;
  bool more = find(here.place);
  if (more) here.template fetch<Prepare>(s, maps, a.in);
  for (uint32_t turn = 0; more; ++turn) {
    prepare_chunk<Prepare>(s, a.in, a.scratch, here, turn, 1 + group, to, [&] {
      chunk += Traits::kPreparers;
      more = find(next.place);
      if (more) next.template fetch<Prepare>(s, maps, a.in);
    });
    here = next;
  }
  if (threadIdx.x % 128 == 96) to.wait_read();
}

// The chain of a walk, with the states at its ends.
template <class Traits>
__device__ __forceinline__ void walk_chain(typename Traits::Storage& s, const HeadClusterArgs& a,
                                           const PartOfHead& z, int tile) {
  using Walk = typename Traits::Walk;
  constexpr int kKeyDim = Walk::kKeyDim;
  const int first_value = tile * kImageColumns;
  const auto handed = [&](int place) { return static_cast<int64_t>(place) * Traits::kWalks + tile; };
  const auto handed_state = [&](int place) -> StateRows {
    return {a.handed_states + handed(place) * kImageColumns * kKeyDim, kKeyDim, 1, kImageColumns, kKeyDim};
  };
  auto S = make_state<Walk>();
  if (z.part.first) {
    load_state<kKeyDim>(S, rows_of_state(a.in, a.in.initial_state, z.part.n, z.head, first_value));
  } else {
    const int* flag = a.handed + handed(z.from);
    int there = 0;
    while (there == 0)
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    load_state<kKeyDim>(S, handed_state(z.from));
  }
  walk_through<Walk>(s.walk, a, z.part, z.head, first_value, S, false);
  if (z.part.last) {
    store_state<kKeyDim>(S, rows_of_state(a.in, a.final_state, z.part.n, z.head, first_value));
  } else {
    store_state<kKeyDim>(S, handed_state(z.to));
    __threadfence();
    cutlass::arch::NamedBarrier::sync(128, 2);
    if (threadIdx.x == 0) {
      int* flag = a.handed + handed(z.to);
      asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
    }
  }
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
  const PartOfHead z(a);
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
    walk_chain<Traits>(s, a, z, rank);
    meet();
  } else if (walks && warpgroup == 1) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kHelperRegisters>();
    if (warp == Walk::kHelpers / 32) {
      const auto tell = [&](uint64_t (&barriers)[Traits::kGroups], int chunk) {
        const int preparer = chunk % Traits::kPreparers;
        Barrier::arrive(&barriers[preparer / Traits::kPreparing],
                        Traits::kWalks + preparer % Traits::kPreparing, 1);
      };
      load<Walk>(s.walk, maps, a, z.part.sequence, z.head, first_value, [&](int chunk) {
        tell(s.room, chunk);
        if (chunk >= Traits::kStages) tell(s.taken, chunk - Traits::kStages);
      });
    }
    if (warp == Walk::kStoringO) store<Walk>(s.walk, a, z.part.sequence, z.head, first_value);
    if constexpr (Traits::kKeep) {
      if (threadIdx.x == Walk::kStoringV * 32)
        store_v_new<Walk>(s.walk, a, z.part.sequence, z.head, first_value);
    }
    meet();
  } else if (walks) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kIdleRegisters>();
    meet();
  } else {
    prepare_for_walks<Traits>(maps, a, z.part.sequence, z.head, rank);
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
    return with_head_cluster_config<Traits>(args.num_parts, static_cast<cudaStream_t>(stream),
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
