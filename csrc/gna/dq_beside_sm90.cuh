// The ends of dQ beside the products that sum it: zeros for heads to come, rounding of heads that are done.
// Work goes head by head. Both are handed out in parts, by counters per head, and the planning warp of a CTA
// takes parts while it has nothing to plan.
//
// Zeros. Heads of the tiles that CTAs begin with have them from a kernel before. A tile is announced when its
// head has all of them: the planning warp writes what nobody has taken, and waits for nothing but parts that
// others are writing at that moment.
//
// Rounding. CTAs count the tiles whose additions have arrived; a head that has all is rounded by whoever
// asks. Nobody waits: what is not taken when the kernel ends is left to the kernel after (bwd_ends_sm80.cuh).
#pragma once

#include "gna/traits_sm90.cuh"
#include "nearfield/pairs.cuh"

namespace nearfield::gna {

// Tokens of a head are evenly spaced both in the float32 buffer, whose rows have the compiled head dim, and
// in dQ. A unit is a key/value head of a batch entry with its query heads.
struct DqBesideParams {
  DqCounters counters;          // without units: kernels of their own clear and round
  int cleared;                  // units that a kernel before has cleared
  int stats_units, stats_ctas;  // see BwdSm90Args
  int at_once;                  // CTAs that begin together: others may have to wait for their multiprocessors
  int tiles;                    // of keys in a unit
  int heads, heads_kv, heads_per_kv;
  int tokens;
  float scale;
  float* buffer;
  Tokens<void> dq;
};

constexpr int kZeroBytes = 4096, kCopiesOfZeros = 16;  // a part

// A part on its way. Kernels with a bias have no room for it.
template <int kHeadDim, bool kBeside>
struct DqBesideStorage {
  alignas(128) float rows[kBeside ? rounded_rows(kHeadDim) * kHeadDim : 1];
  uint64_t full;
};

// An acquiring load would empty the L1 cache, where spilled registers are, each time somebody asks.
__device__ __forceinline__ int load_relaxed(const int* from) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
// What others did before they counted comes before the copies that follow.
__device__ __forceinline__ void acquire_for_copies() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  fence_proxy_async();
}

// One more in a counter, when all that this thread has had copied or added to global memory is there.
__device__ __forceinline__ void count_arrived(int* counter) {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  fence_proxy_async();
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Of a warp, whose lanes agree on everything.
template <class Traits>
struct DqBeside {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kHeadDim, kRows = rounded_rows(kD);
  DqBesideStorage<kD, true>& s;
  const DqBesideParams& p;
  int planned = 0;       // unit of the last planned tile
  int zeros_from = 0;    // the first unit of which there may be zeros to write
  int known_done = -1;   // this head and those before it
  int rounded_from = 0;  // the first query head of which there may be rows to round
  uint32_t phase = 0;

  __device__ __forceinline__ DqBeside(DqBesideStorage<kD, true>& storage, const DqBesideParams& params)
      : s(storage), p(params), zeros_from(params.cleared) {}

  __device__ __forceinline__ int at_once() const { return p.at_once; }
  // A CTA that begins late draws like one that has finished a tile.
  __device__ __forceinline__ int first(int* next_work) const {
    int work = blockIdx.x;
    if (work < p.at_once) return work;
    if (threadIdx.x % 32 == 0) work = p.at_once + atomicAdd(next_work, 1);
    return __shfl_sync(0xffffffffu, work, 0);
  }

  // Before a tile is announced.
  __device__ __forceinline__ void prepare(const StayingTile& tile) {
    if (p.counters.units == 0) return;
    planned = tile.batch * p.heads_kv + tile.head;
    if (p.stats_ctas > 0 && planned >= p.stats_units) {
      if (threadIdx.x % 32 == 0) {
        while (load_relaxed(p.counters.stats(planned)) < p.stats_ctas) __nanosleep(500);
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
      }
      __syncwarp();
    }
    if (planned < p.cleared) return;
    while (true) {
      int there = 0;
      if (threadIdx.x % 32 == 0) there = load_relaxed(p.counters.zeroed(planned));
      if (__shfl_sync(0xffffffffu, there, 0) >= parts_of_zeros()) break;
      write_zeros(planned);
    }
    if (threadIdx.x % 32 == 0) acquire_for_copies();
  }

  // Until due() says so.
  template <class Due>
  __device__ __forceinline__ void work(const Due& due) {
    if (p.counters.units == 0) return;
    while (!__any_sync(0xffffffffu, due())) {
      if (!write_zeros(planned + p.cleared) && !round_rows()) __nanosleep(1000);
    }
  }

  __device__ __forceinline__ void finish() {
    while (round_rows()) {
    }
  }

 private:
  __device__ __forceinline__ int64_t unit_bytes() const {
    return int64_t{p.heads_per_kv} * p.tokens * (kD * static_cast<int>(sizeof(float)));
  }
  __device__ __forceinline__ int parts_of_zeros() const {
    return static_cast<int>((unit_bytes() + kZeroBytes * kCopiesOfZeros - 1) / (kZeroBytes * kCopiesOfZeros));
  }

  // A part of the units up to `last`; false: all are taken.
  __device__ __forceinline__ bool write_zeros(int last) {
    const int lane = threadIdx.x % 32;
    int part = -1;
    if (lane == 0) {
      for (; zeros_from <= min(last, p.counters.units - 1); ++zeros_from) {
        part = atomicAdd(p.counters.zeroing(zeros_from), 1);
        if (part < parts_of_zeros()) break;
        part = -1;
      }
    }
    part = __shfl_sync(0xffffffffu, part, 0);
    if (part < 0) return false;
#pragma unroll 1
    for (int i = lane; i < kZeroBytes / 16; i += 32)
      reinterpret_cast<float4*>(s.rows)[i] = float4{0, 0, 0, 0};
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      const int64_t bytes = unit_bytes();
      int64_t at = int64_t{part} * (kZeroBytes * kCopiesOfZeros);
      char* const to = reinterpret_cast<char*>(p.buffer) + zeros_from * bytes;
#pragma unroll 1
      for (int i = 0; i < kCopiesOfZeros && at < bytes; ++i, at += kZeroBytes) {
        const int rest = static_cast<int>(bytes - at < kZeroBytes ? bytes - at : kZeroBytes);
        cute::SM90_BULK_COPY_S2G::copy(s.rows, to + at, rest);
      }
      cute::tma_store_arrive();
      count_arrived(p.counters.zeroed(zeros_from));
    }
    __syncwarp();
    return true;
  }

  // A part of the heads that are done; false: there is none now.
  __device__ __forceinline__ bool round_rows() {
    const int lane = threadIdx.x % 32, parts = (p.tokens + kRows - 1) / kRows;
    int part = -1;
    if (lane == 0) {
      for (; rounded_from < p.counters.heads; ++rounded_from) {
        if (rounded_from > known_done) {
          if (load_relaxed(p.counters.done(rounded_from / p.heads_per_kv)) < p.tiles) break;
          acquire_for_copies();
          known_done = rounded_from;
        }
        part = atomicAdd(p.counters.rounding(rounded_from), 1);
        if (part < parts) break;
        part = -1;
      }
    }
    part = __shfl_sync(0xffffffffu, part, 0);
    if (part < 0) return false;
    const int head = rounded_from = __shfl_sync(0xffffffffu, rounded_from, 0);
    const int first = part * kRows, rows = min(kRows, p.tokens - first);
    if (lane == 0) {
      const int bytes = rows * kD * static_cast<int>(sizeof(float));
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.full, bytes);
      cute::SM90_BULK_COPY_G2S::copy(p.buffer + (int64_t{head} * p.tokens + first) * kD, &s.full, s.rows,
                                     bytes);
    }
    constexpr int kPieces = kD / 8, kRowsAtOnce = 32 / kPieces;
    const int batch = head / p.heads;
    int row = lane / kPieces;
    auto* to = reinterpret_cast<uint4*>(static_cast<Element*>(p.dq.data) + batch * p.dq.batch +
                                        (head - batch * p.heads) * p.dq.head + (first + row) * p.dq.x[2] +
                                        lane % kPieces * 8);
    const auto* from = reinterpret_cast<const float4*>(s.rows) + lane * 2;
    cutlass::arch::ClusterTransactionBarrier::wait(&s.full, phase);
    phase ^= 1;
#pragma unroll 1
    for (; row < rows; row += kRowsAtOnce) {
      const float4 even = from[0], odd = from[1];
      const uint4 rounded = {
          pack<Element>(even.x * p.scale, odd.x * p.scale), pack<Element>(even.y * p.scale, odd.y * p.scale),
          pack<Element>(even.z * p.scale, odd.z * p.scale), pack<Element>(even.w * p.scale, odd.w * p.scale)};
      __stcg(to, rounded);  // the L1 cache is small, and spilled registers are in it
      from += 64;
      to += kRowsAtOnce * p.dq.x[2] / 8;
    }
    __syncwarp();
    return true;
  }
};

}  // namespace nearfield::gna
