// dQ rounded beside the products that sum it. Work goes head by head, so heads are finished one after the
// other: CTAs count the tiles of keys whose additions have arrived, and when a head has all of them its rows
// are handed out in parts to whoever asks. The planning warp asks while it has nothing to plan. Nobody waits:
// what is not taken when the kernel ends is rounded by the kernel after it (bwd_ends_sm80.cuh).
#pragma once

#include "gna/traits_sm90.cuh"
#include "nearfield/pairs.cuh"

namespace nearfield::gna {

// Tokens of a head are evenly spaced both in the float32 buffer, whose rows have the compiled head dim, and
// in dQ.
struct RoundParams {
  int *done, *taken;  // DqCounters; null: a kernel of its own rounds everything
  int tiles;          // of keys in a key/value head
  int heads, heads_per_kv;
  int all_heads;      // of all batch entries
  int tokens, parts;  // of a head
  float scale;
  const float* buffer;
  Tokens<void> dq;
};

// A part on its way. Kernels with a bias have no room for it.
template <int kHeadDim, bool kRounds>
struct RoundStorage {
  alignas(128) float rows[kRounds ? rounded_rows(kHeadDim) * kHeadDim : 1];
  uint64_t full;
};

// Called by the thread that added a tile to dQ, when it has added all of it.
__device__ __forceinline__ void count_tile(const RoundParams& p, const StayingTile& tile) {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
  int* const done = p.done + tile.batch * (p.heads / p.heads_per_kv) + tile.head;
  __threadfence();
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(done) : "memory");
}

// A warp that rounds parts; its lanes agree on everything.
template <class Traits>
struct Rounder {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kHeadDim, kRows = rounded_rows(kD);
  RoundStorage<kD, true>& s;
  const RoundParams& p;
  int head = 0;  // the first of which there may be parts
  uint32_t phase = 0;

  // One part; false: there is none now.
  __device__ __forceinline__ bool round_part() {
    const int lane = threadIdx.x % 32;
    int part = -1;
    if (lane == 0) {
      for (; head < p.all_heads; ++head) {
        int done;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                     : "=r"(done)
                     : "l"(p.done + head / p.heads_per_kv)
                     : "memory");
        if (done < p.tiles) break;
        part = atomicAdd(p.taken + head, 1);
        if (part < p.parts) break;
        part = -1;
      }
    }
    part = __shfl_sync(0xffffffffu, part, 0);
    if (part < 0) return false;
    head = __shfl_sync(0xffffffffu, head, 0);
    const int first = part * kRows, rows = min(kRows, p.tokens - first);
    if (lane == 0) {
      asm volatile("fence.proxy.async;" ::: "memory");
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
      *to = {
          pack<Element>(even.x * p.scale, odd.x * p.scale), pack<Element>(even.y * p.scale, odd.y * p.scale),
          pack<Element>(even.z * p.scale, odd.z * p.scale), pack<Element>(even.w * p.scale, odd.w * p.scale)};
      from += 64;
      to += kRowsAtOnce * p.dq.x[2] / 8;
    }
    __syncwarp();
    return true;
  }
};

}  // namespace nearfield::gna
