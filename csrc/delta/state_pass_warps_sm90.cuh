// What lies around the chain of the state pass: its storage, the warp that loads tiles, those that store O,
// V' and states, and the warpgroup that computes P.
#pragma once

#include "delta/packed_image_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

// kOutput: O is wanted. kKeep: beside O, what the backward would otherwise compute again; a walk without
// output is for its sake only. kInCluster: what `prepare` finds out comes from other CTAs of the cluster
// (head_cluster_sm90.cuh). kFull: a walk for sequences with hard chunks and for states on the way. Others
// take a walk without these branches, whose mere presence costs the chain a third of its speed.
template <class Tag, int kKeyDim_, bool kChannelGate_, bool kOutput_, bool kComputeP_ = false,
          bool kKeep_ = false, bool kInCluster_ = false, bool kFull_ = false>
struct StatePassTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kChannelGate = kChannelGate_, kOutput = kOutput_, kComputeP = kComputeP_;
  static constexpr bool kReadP = kOutput && !kComputeP;
  static constexpr bool kInCluster = kInCluster_;
  static constexpr bool kPacked = kChannelGate;      // N and P come as one image
  static constexpr bool kKeep = kKeep_ || !kOutput;  // S and V' of every chunk, if asked for
  // Keys and queries of a cluster come from memory when a chunk is prepared and from the L2 cache when it is
  // walked over, 6 to 12 chunks later. What is kept meanwhile would drive them out.
  static constexpr CacheHint kLastUse = kInCluster && kKeep ? kLeavesFirst : kStays;
  static constexpr int kKeyImages = kKeyDim / kImageColumns;
  static constexpr int kKeyTile = kKeyDim * kRows;  // elements
  static constexpr int kStages = kKeep_ && kChannelGate ? 2 : 3;
  static constexpr bool kFull = kFull_, kMayBeHard = std::is_same_v<Tag, bf16>;
  static constexpr bool kMayStop =  // and hand over to the full walk
      !kFull && kMayBeHard && kOutput && !(kChannelGate && kKeep_);
  // Looks at the next chunk before it is done with this one. A full walk shows the state in between.
  static constexpr bool kAhead = !kFull && kStages > 2;
  // Low halves of a hard chunk take a second stage; in a cluster, which has the room, a place of their own.
  static constexpr bool kLow = kFull && kMayBeHard, kLowApart = kInCluster && kMayBeHard;
  // A cluster that goes on with another part (head_cluster_sm90.h) has registers for a full walk only if that
  // reads factors where it needs them and O leaves at once.
  static constexpr bool kGoOn = kInCluster && kKeep_, kFewRegisters = kFull && kGoOn;
  using Full = StatePassTraits<Tag, kKeyDim_, kChannelGate_, kOutput_, kComputeP_, kKeep_, kInCluster_, true>;

  // Warpgroups: the chain, the one that computes P, if any, and one whose first warps load, store O and store
  // V'.
  static constexpr int kHelpers = kComputeP ? 256 : 128;  // first thread of the last warpgroup
  static constexpr int kStoringO = kHelpers / 32 + 1, kStoringV = kHelpers / 32 + 1 + kOutput;  // warps
  static constexpr int kUnpacking = kStoringV + kKeep;  // takes N and P apart
  static constexpr int kThreads = kComputeP || kInCluster ? 384
                                  : kPacked               ? 32 * (kUnpacking + 1)
                                  : kOutput && kKeep      ? 224
                                                          : 192;
  // Hand-over of registers among three warpgroups, which start with 168 each.
  static constexpr int kChainRegisters = 248, kMixRegisters = 152, kHelperRegisters = 104;
  static_assert(kChainRegisters + kMixRegisters + kHelperRegisters <= 3 * 168);

  template <int kN, GMMA::Major kMajor>
  using Mma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<64>, Int<kN>, Int<64>>, GMMA::Major::K,
                           kMajor>()));
  using MmaToToken = Mma<kRows, GMMA::Major::K>;     // (64 values, 64 tokens)
  using MmaToState = Mma<kKeyDim, GMMA::Major::MN>;  // (64 values, K)
  using MmaP = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kRows>, Int<kRows>, Int<kKeyDim>>>()));

  struct alignas(1024) Stage {
    Element k[kKeyTile];                           // with a gate per channel Kh
    Element k_write[kChannelGate ? kKeyTile : 0];  // Kt
    Element q[kOutput ? kKeyTile : 0];
    Element v[kImage];
    Element n[kImage];  // with a gate per channel first NP
    Element p[kOutput ? kImage : 0];
  };
  static constexpr int kHeadRows = kChannelGate ? 0 : kRows;
  struct alignas(128) StageRows {  // with a gate per head the beginning of ChunkRows
    float G[kHeadRows], beta[kRows], k_read[kHeadRows], k_write[kHeadRows], k_norm[kHeadRows];
    float q_read[kOutput ? kHeadRows : 0];
    float decay[kChannelGate ? kKeyDim : 0];
  };
  struct alignas(16) ChunkFlag {
    int hard;  // the low halves are in the next stage, or ready to be read
  };
  struct Low {
    Element n[kImage], p[kImage];
    Element v_new[kKeep_ ? 0 : kKeyTile];  // V' in the meantime; else the place of the entering states serves
  };
  static constexpr int kRowsBytes = kChannelGate ? kRows * 4 : (kReadP ? 6 : 5) * kRows * 4;
  static constexpr int kBytes = kKeyTile * 2 * (1 + kChannelGate + kOutput) +
                                kImageBytes * (kPacked  ? 1
                                               : kReadP ? 3
                                                        : 2) +
                                kRowsBytes + (kChannelGate ? kKeyDim * 4 : 0) +
                                (kInCluster ? static_cast<int>(sizeof(ChunkFlag)) : 0);
  static constexpr int kLowBytes = kImageBytes * (kReadP ? 2 : 1) + (kChannelGate ? kKeyTile * 2 : 0);

  struct Storage {
    static constexpr int kFillers = kPacked ? 2 : 1;  // of a stage: the thread that loads; who takes NP apart
    Stage stage[kStages];
    alignas(1024) Element out[kOutput ? kImage : 0];    // O on the way out
    alignas(1024) Element v_new[kKeep ? kImage : 0];    // V' on the way out
    alignas(1024) Element state[kKeep ? kKeyTile : 0];  // entering states on the way out
    alignas(1024) Low low[kLowApart];
    StageRows rows[kStages];
    ChunkFlag flag[kStages];
    Ring<kStages> ring;                      // tiles: loading warp -> chain
    uint64_t packed[kPacked ? kStages : 0];  // NP has come
    Ring<1> ring_low;                        // low halves that are apart: asked for by the chain itself
    Ring<kStages> ring_p;                    // P, if computed: `full` only, `empty` is that of `ring`
    Ring<1> ring_out;                        // O: chain -> storing warp
    Ring<1> ring_v_new;                      // V': chain -> the thread that stores it
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

__device__ __forceinline__ int valid_rows(const Sequence& sequence, int chunk) {
  return static_cast<int>(
      min(static_cast<int64_t>(kRows), sequence.length - static_cast<int64_t>(chunk) * kRows));
}

// Waits through barriers say nothing to the compiler about memory.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

// ---- Loading warp ----

// What a warp knows of the chunks ahead of it: whether they are prepared, and which are hard. Lane l knows of
// chunk first + l.
struct ChunkNews {
  const int* ready;   // of this head and sequence, one per chunk; null: all are prepared
  const float* hard;  // of this head and sequence; null: none
  int64_t stride;     // of hard
  int chunks, first = 0, known = 0, mine = 0;

  __device__ __forceinline__ ChunkNews(const StatePassArgs& a, const Sequence& sequence, int64_t head)
      : ready(a.ready), hard(a.scratch.hard), stride(a.in.slot_heads), chunks(sequence.chunks()) {
    if (ready != nullptr) ready += head * a.slots + sequence.first_slot;
    if (hard != nullptr) hard += sequence.first_slot * stride + head;
  }
  // Waits until chunk c is prepared; chunks are asked for in order. True if it is hard.
  __device__ __forceinline__ bool wait(int c) {
    while (c >= known) {
      const int at = c + static_cast<int>(threadIdx.x) % 32;
      first = c, mine = 0;
      if (at < chunks) {
        if (ready != nullptr) {
          asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(mine) : "l"(ready + at) : "memory");
        } else {
          mine = hard != nullptr && hard[at * stride] != 0.f ? kReadyHard : kReady;
        }
      }
      const uint32_t missing = ~__ballot_sync(0xffffffffu, mine != 0);
      known = c + (missing == 0 ? 32 : __ffs(missing) - 1);
      asm volatile("fence.proxy.async.global;" ::: "memory");  // the copy engine reads what was announced
    }
    return __shfl_sync(0xffffffffu, mine, c - first) == kReadyHard;
  }
};

// Calls asked(chunk) when a stage waits for what it brings, and what in a cluster others send there. Returns
// the place of the next chunk, if there were one.
template <class Traits, class Asked>
__device__ RingIndex<Traits::kStages> load(typename Traits::Storage& s, const TokenMaps& maps,
                                           const StatePassArgs& a, const Sequence& sequence, int64_t head,
                                           int first_value, const Asked& asked) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const int head_k = static_cast<int>(head / (a.in.value_heads / a.in.heads));
  const int chunks = sequence.chunks();
  ChunkNews news(a, sequence, head);
  RingIndex<Traits::kStages> at;
  for (int c = 0; c < chunks; ++c) {
    const bool hard = !Traits::kInCluster && news.wait(c) && Traits::kMayBeHard && a.scratch.hard != nullptr;
    s.ring.wait_empty(at);
    if (threadIdx.x % 32 != 0) {
      at.advance();
      if (!hard) continue;
      s.ring.wait_empty(at);
      at.advance();
      continue;
    }
    if constexpr (!Traits::kInCluster) s.flag[at.stage].hard = hard;
    s.ring.expect_bytes(at, Traits::kBytes);
    asked(c);
    auto& stage = s.stage[at.stage];
    uint64_t* full = &s.ring.full[at.stage];
    const int64_t token = sequence.begin + static_cast<int64_t>(c) * kRows;
    const int64_t chunk = chunk_index(a.in, sequence.first_slot + c, head);
    const auto image = [&](void* scratch, int images) {
      return static_cast<Element*>(scratch) + chunk * images * kImage;
    };
    if constexpr (Traits::kChannelGate) {
      copy_in(stage.k, image(a.scratch.Kh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
    } else {
      load_tokens<kKeyDim>(maps.k, full, stage.k, 0, token, head_k, sequence.batch, Traits::kLastUse);
    }
    if constexpr (!Traits::kInCluster) {
      const ChunkRows* rows = a.scratch.rows + chunk;
      copy_in(&s.rows[at.stage], Traits::kChannelGate ? rows->beta : rows->G, Traits::kRowsBytes, full);
      if constexpr (Traits::kPacked) {
        Ring<1>::Barrier::arrive_and_expect_tx(&s.packed[at.stage], kImageBytes);
        copy_in(stage.n, image(a.scratch.NP, 1), kImageBytes, &s.packed[at.stage]);
      } else {
        copy_in(stage.n, image(a.scratch.N, 1), kImageBytes, full);
        if constexpr (Traits::kReadP) copy_in(stage.p, image(a.scratch.P, 1), kImageBytes, full);
      }
    }
    if constexpr (Traits::kOutput) {
      if constexpr (Traits::kChannelGate) {
        copy_in(stage.q, image(a.scratch.Qh, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      } else {
        load_tokens<kKeyDim>(maps.q, full, stage.q, 0, token, head_k, sequence.batch, Traits::kLastUse);
      }
    }
    load_tokens<kImageColumns>(maps.v, full, stage.v, first_value, token, static_cast<int>(head),
                               sequence.batch, Traits::kLastUse);
    if constexpr (Traits::kChannelGate) {
      copy_in(stage.k_write, image(a.scratch.Kt, Traits::kKeyImages), Traits::kKeyTile * 2, full);
      copy_in(s.rows[at.stage].decay, a.scratch.decay + chunk * kKeyDim, kKeyDim * 4, full);
    }
    at.advance();
    if (!hard) continue;
    s.ring.wait_empty(at);
    s.ring.expect_bytes(at, Traits::kLowBytes);
    if constexpr (Traits::kPacked) s.ring.arrive_full(at);  // nothing to take apart
    auto& low = s.stage[at.stage];
    full = &s.ring.full[at.stage];
    copy_in(low.n, image(a.scratch.N_low, 1), kImageBytes, full);
    if constexpr (Traits::kReadP) copy_in(low.p, image(a.scratch.P_low, 1), kImageBytes, full);
    if constexpr (Traits::kChannelGate)
      copy_in(low.k_write, image(a.scratch.Kt_low, Traits::kKeyImages), Traits::kKeyTile * 2, full);
    at.advance();
  }
  return at;
}

// ---- N and P ----

// One warp: takes apart what has come. Low halves, which are in the next stage, are apart.
template <class Traits>
__device__ void take_apart(typename Traits::Storage& s, const Sequence& sequence) {
  if constexpr (Traits::kOutput) {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kStages; ++i) clear_upper_blocks(s.stage[i].p);
  }
  const int chunks = sequence.chunks();
  RingIndex<Traits::kStages> at;
  uint32_t phases = 0;  // of `packed`, which low halves pass by
  for (int c = 0; c < chunks; ++c) {
    Ring<1>::Barrier::wait(&s.packed[at.stage], phases >> at.stage & 1);
    phases ^= 1u << at.stage;
    compiler_fence();
    const bool hard = s.flag[at.stage].hard != 0;
    unpack_image<Traits::kOutput>(s.stage[at.stage].n, s.stage[at.stage].p);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) s.ring.arrive_full(at);
    at.advance();
    if (hard) at.advance();
  }
}

// ---- Storing warps ----

// Images [slot][value head][V / 64] of 64 values, or [..][K / 64] of them: the first of this CTA in chunk c.
template <class Inputs>
__device__ __forceinline__ int64_t first_image(const Inputs& in, const Sequence& sequence, int c,
                                               int64_t head, int first_value, int key_images = 1) {
  const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
  const int64_t chunk = chunk_index(in, sequence.first_slot + c, head);
  return (chunk * tiles + first_value / kImageColumns) * key_images;
}

// One thread: V', whole images. The chain has made it visible to the copy engine.
template <class Traits>
__device__ void store_v_new(typename Traits::Storage& s, const StatePassArgs& a, const Sequence& sequence,
                            int64_t head, int first_value) {
  if (a.v_new == nullptr) return;
  const int chunks = sequence.chunks();
  RingIndex<1> at;
  for (int c = 0; c < chunks; ++c) {
    s.ring_v_new.wait_full(at);
    compiler_fence();
    copy_out(static_cast<typename Traits::Element*>(a.v_new) +
                 first_image(a.in, sequence, c, head, first_value) * kImage,
             s.v_new, kImageBytes, Traits::kLastUse);
    tma_store_arrive();
    tma_store_wait<0>();
    s.ring_v_new.release(at);
    at.advance();
  }
}

// O: rows past the end belong to the next sequence.
template <class Traits>
__device__ void store(typename Traits::Storage& s, const StatePassArgs& a, const Sequence& sequence,
                      int64_t head, int first_value) {
  using Element = typename Traits::Element;
  auto* out = static_cast<Element*>(a.o);
  const int lane = threadIdx.x % 32, piece = lane % 8, chunks = sequence.chunks();
  const int64_t stride = a.in.token_heads * a.in.value_dim;
  out += (sequence.batch * a.in.tokens + sequence.begin) * stride + head * a.in.value_dim + first_value +
         piece * 8;
  const bool inside = piece * 8 < a.in.value_dim - first_value;
  RingIndex<1> at;
  s.ring_out.wait_full(at);  // before the first chunk, nothing
  s.ring_out.release(at);
  at.advance();
  for (int c = 0; c < chunks; ++c) {
    const int valid = valid_rows(sequence, c);
    s.ring_out.wait_full(at);
    compiler_fence();
    CUTE_UNROLL
    for (int i = 0; i < kRows / 4; i += 4) {
      uint4 words[4];
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x)
        words[x] = *reinterpret_cast<const uint4*>(image_piece(s.out, 4 * (i + x) + lane / 8, piece));
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int token = 4 * (i + x) + lane / 8;
        if (token >= valid || !inside) continue;
        auto* to = reinterpret_cast<uint4*>(out + token * stride);
        if constexpr (Traits::kLastUse == kLeavesFirst) {
          __stcs(to, words[x]);
        } else {
          *to = words[x];
        }
      }
    }
    __syncwarp();
    s.ring_out.release(at);
    at.advance();
    out += kRows * stride;
  }
}

// ---- Warpgroup that computes P ----

//   P_ij = scale q_i . k_j e^{G_i - G_j}, lower with diagonal; and the factors of Q. Rows past the end become
//   0.
template <class Traits>
__device__ void mix(typename Traits::Storage& s, const StatePassArgs& a, const Sequence& sequence) {
  using Element = typename Traits::Element;
  constexpr int kKeyDim = Traits::kKeyDim;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const int chunks = sequence.chunks();
  const float scale = static_cast<float>(a.in.scale);
  typename Traits::MmaP mma;
  const auto thread_mma = mma.get_slice(thread);
  Tensor qk = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<kRows>>{});
  RingIndex<Traits::kStages> at;
  for (int c = 0; c < chunks; ++c) {
    auto& stage = s.stage[at.stage];
    auto& rows = s.rows[at.stage];
    const int valid = valid_rows(sequence, c);
    s.ring.wait_full(at);
    compiler_fence();
    Tensor sK = make_tensor(make_smem_ptr(stage.k), LayoutByRow<Element, kKeyDim>{});
    Tensor sQ = make_tensor(make_smem_ptr(stage.q), LayoutByRow<Element, kKeyDim>{});
    Tensor tQ = thread_mma.partition_fragment_A(sQ), tK = thread_mma.partition_fragment_B(sK);
    issue_gemm<true>(mma, tQ, tK, qk);
    const float q_norm = a.in.qk_l2norm ? inverse_norm<kKeyDim>(stage.q) : 1.f;
    if (thread % 2 == 0) {
      const int row = thread / 2;
      rows.q_read[row] = row < valid ? scale * q_norm : 0.f;
    }
    cutlass::arch::NamedBarrier::sync(128, 1);
    float factor[2], G[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * warp + 8 * h + lane / 4;
      factor[h] = rows.q_read[i];
      G[h] = rows.G[i];
    }
    cutlass::arch::NamedBarrier::sync(128, 1);
    if (thread < kRows) rows.q_read[thread] *= exp2_fast(rows.G[thread]);
    warpgroup_wait<0>();
    uint32_t words[16];
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int j = 8 * n + 2 * quad;
      const float2 G_j = *reinterpret_cast<const float2*>(&rows.G[j]);
      const float2 k_j = *reinterpret_cast<const float2*>(&rows.k_norm[j]);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int i = 16 * warp + 8 * h + lane / 4;
        float p[2];
        CUTE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const bool below = i >= j + e && i < valid;
          const float decay = exp2_fast(below ? G[h] - (e ? G_j.y : G_j.x) : 0.f) * (e ? k_j.y : k_j.x);
          p[e] = below ? factor[h] * decay * qk(4 * n + 2 * h + e) : 0.f;
        }
        words[2 * n + h] = pack<Element>(p[0], p[1]);
      }
    }
    store_rows(stage.p, warp, words);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    const bool two_stages =
        Traits::kMayBeHard && s.flag[at.stage].hard != 0;  // always false where the chain is lean
    if (lane == 0) s.ring_p.arrive_full(at);
    at.advance();
    if (two_stages) {  // the next stage has the low halves
      if (lane == 0) s.ring_p.arrive_full(at);
      at.advance();
    }
  }
}

}  // namespace nearfield::delta
