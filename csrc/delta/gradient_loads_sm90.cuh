// What a CTA of the chunk gradients asks for, and when it may: tiles and rows that the forward has left, and
// what the walk announces.
#pragma once

#include "delta/gradient_place_sm90.cuh"

namespace nearfield::delta {

struct ChunkGradientMaps {
  CUtensorMap q, k, dout, dv;
};

template <class Element>
__device__ __forceinline__ void load_states(Element* to, const void* states, uint64_t* barrier,
                                            const GradientPlace& z) {
  const int bytes = 2 * z.value_images * kImageBytes;
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
  copy_in(to, static_cast<const char*>(states) + 2 * z.first_image * kImageBytes, bytes, barrier);
}

// One warp: what the walk leaves of a chunk is in memory, for loads of the copy engine. The flags are asked
// for side by side: each takes as long as a read of memory.
__device__ __forceinline__ void wait_for_walk(const ChunkGradientArgs& args, const GradientPlace& z) {
  const int v = threadIdx.x % 32;
  for (int there = v >= z.value_images; there == 0;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(there)
                 : "l"(args.announced + z.first_image + v)
                 : "memory");
    if (there == 0) __nanosleep(100);
  }
  __syncwarp();
  asm volatile("fence.proxy.async;" ::: "memory");
}

// What follows in the stream needs the walk to be over, too. All threads of the launch's last CTA.
__device__ __forceinline__ void wait_for_end_of_walk() {
  if (blockIdx.x == gridDim.x - 1) wait_for_kernel_before();
}

// One thread each: K, cumulative gates and the factors of K's norms; Q.
template <class Storage>
__device__ __forceinline__ void load_keys(Storage& s, const ChunkGradientMaps& maps,
                                          const ChunkGradientArgs& args, const GradientPlace& z) {
  const ChunkRows& rows = args.rows[z.chunk];
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
      &s.qk_here, static_cast<int>(sizeof(s.k) + sizeof(s.G) + sizeof(s.k_norm)));
  load_tokens<128>(maps.k, &s.qk_here, s.k, 0, z.token, static_cast<int>(z.head_k), z.sequence.batch);
  copy_in(s.G, rows.G, sizeof(s.G), &s.qk_here);
  copy_in(s.k_norm, rows.k_norm, sizeof(s.k_norm), &s.qk_here);
}
template <class Storage>
__device__ __forceinline__ void load_queries(Storage& s, const ChunkGradientMaps& maps,
                                             const GradientPlace& z) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.qk_here, static_cast<int>(sizeof(s.q)));
  load_tokens<128>(maps.q, &s.qk_here, s.q, 0, z.token, static_cast<int>(z.head_k), z.sequence.batch);
}
// One thread: the values of dO, or of dV.
template <class Element>
__device__ __forceinline__ void load_value_rows(const CUtensorMap& map, uint64_t* barrier, Element* to,
                                                const GradientPlace& z) {
  const int head = static_cast<int>(z.head), first = static_cast<int>(z.block * kValueBlock);
  for (int v = 0; v < z.value_images; ++v)
    load_tokens<64>(map, barrier, to + v * kImage, first + 64 * v, z.token, head, z.sequence.batch);
}
template <class Storage>
__device__ __forceinline__ void load_dout(Storage& s, const ChunkGradientMaps& maps, const GradientPlace& z) {
  load_value_rows(maps.dout, &s.values_here, s.dout, z);
}
// One thread: V'. dO and Y arrive at its barrier, too.
template <class Storage>
__device__ __forceinline__ void load_values(Storage& s, const ChunkGradientArgs& args,
                                            const GradientPlace& z) {
  const int bytes = z.value_images * kImageBytes;
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.values_here, 3 * bytes);
  copy_in(s.v_new, static_cast<const char*>(args.v_new) + z.first_image * kImageBytes, bytes, &s.values_here);
}
// One thread: S, K and V' of the chunk before, the latter two to the places of dO and Y.
template <class Storage>
__device__ __forceinline__ void load_before(Storage& s, const ChunkGradientMaps& maps,
                                            const ChunkGradientArgs& args, const GradientPlace& z) {
  const int bytes = z.value_images * kImageBytes;
  const int64_t image = z.image_before(args.in);
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
      &s.state_here, 3 * bytes + static_cast<int>(sizeof(s.dout)));
  copy_in(s.y, static_cast<const char*>(args.v_new) + image * kImageBytes, bytes, &s.state_here);
  copy_in(s.state, static_cast<const char*>(args.states) + 2 * image * kImageBytes, 2 * bytes, &s.state_here);
  load_tokens<128>(maps.k, &s.state_here, s.dout, 0, z.token - kRows, static_cast<int>(z.head_k),
                   z.sequence.batch);
}
// One thread, behind wait_for_walk: Y, or dV in its place.
template <class Storage>
__device__ __forceinline__ void load_dv(Storage& s, const ChunkGradientMaps& maps, const GradientPlace& z) {
  load_value_rows(maps.dv, &s.values_here, s.y, z);
}
template <class Storage>
__device__ __forceinline__ void load_y(Storage& s, const ChunkGradientArgs& args, const GradientPlace& z) {
  copy_in(s.y, static_cast<const char*>(args.y) + z.first_image * kImageBytes, z.value_images * kImageBytes,
          &s.values_here);
}
// Rows past the end are the next sequence, or padding that may hold NaN: of so many images. All threads.
template <class Element>
__device__ __forceinline__ void clear_tail(Element* images, int count, int valid) {
  if (valid == kRows) return;
  const int pieces = (kRows - valid) * (kImageColumns / 8);
  CUTE_NO_UNROLL
  for (int i = threadIdx.x; i < count * pieces; i += static_cast<int>(blockDim.x)) {
    auto* first = reinterpret_cast<uint4*>(images + i / pieces * kImage + valid * kImageColumns);
    first[i % pieces] = uint4{0, 0, 0, 0};
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
}

}  // namespace nearfield::delta
