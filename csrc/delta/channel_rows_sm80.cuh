// What a warp of the portable `prepare` does with 16 rows of 64 channels where there is a gate per channel,
// in 16-bit types. A lane owns two channels of these rows, so that every decay to one of them is a running
// product.
#pragma once

#include "delta/channel_levels.cuh"
#include "delta/tile_sm80.cuh"

namespace nearfield::delta {

template <class Element>
struct ChannelRows {
  static constexpr int kGateRow = 66;  // floats in a row of sums of gates
  float2 decay[kLevelBlock];           // e^g of the row after
  uint32_t k[kLevelBlock];
  const Element* q_rows;  // q is read from the tile each time: registers
  int first;              // row

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static uint32_t pair_at(const Element* tile, int row) {
    return *reinterpret_cast<const uint32_t*>(tile + row * kTileRow<Element> + 2 * lane());
  }
  __device__ __forceinline__ static float2 sum_at(const float* G, int row) {
    return *reinterpret_cast<const float2*>(G + row * kGateRow + 2 * lane());
  }
  __device__ __forceinline__ static float2 exp2_of_gap(float2 to, float2 from) {
    return {exp2f(to.x - from.x), exp2f(to.y - from.y)};
  }
  __device__ __forceinline__ static uint32_t packed(float2 x) { return pack<Element>(x.x, x.y); }
  __device__ __forceinline__ float2 k_of(int i) const { return unpack<Element>(k[i]); }
  __device__ __forceinline__ float2 q_of(int i) const { return unpack<Element>(pair_at(q_rows, i)); }

  __device__ __forceinline__ void load(const Element* keys, const Element* queries, const float* G,
                                       int first_row) {
    first = first_row;
    q_rows = queries + first * kTileRow<Element>;
    CUTE_UNROLL
    for (int i = 0; i < kLevelBlock; ++i) {
      k[i] = pair_at(keys, first + i);
      decay[i] = i + 1 < kLevelBlock ? exp2_of_gap(sum_at(G, first + i + 1), sum_at(G, first + i))
                                     : float2{1.f, 1.f};
    }
  }

  // Decayed from the first of these rows; rows of kTileRow.
  __device__ __forceinline__ void put_from_first(Element* to_k, Element* to_q) const {
    float2 e{1.f, 1.f};
    CUTE_UNROLL
    for (int i = 0; i < kLevelBlock; ++i) {
      const int at = i * kTileRow<Element> + 2 * lane();
      *reinterpret_cast<uint32_t*>(to_k + at) = packed(k_of(i) * e);
      *reinterpret_cast<uint32_t*>(to_q + at) = packed(q_of(i) * e);
      e = e * decay[i];
    }
  }
  // Rows of an earlier block of 16 decayed to the first of these.
  __device__ __forceinline__ void put_earlier(Element* rows, const Element* keys, const float* G,
                                              int block) const {
    const float2 to = sum_at(G, first);
    CUTE_UNROLL
    for (int i = 0; i < kLevelBlock; ++i) {
      const int row = kLevelBlock * block + i;
      const float2 x = unpack<Element>(pair_at(keys, row)) * exp2_of_gap(to, sum_at(G, row));
      *reinterpret_cast<uint32_t*>(rows + i * kTileRow<Element> + 2 * lane()) = packed(x);
    }
  }

  // Kh, Qh and Kt into tiles of scratch, or the low halves of Kh and Kt. Norms by row of the chunk.
  template <bool kLow>
  __device__ __forceinline__ void emit(Element* Kh, Element* Qh, Element* Kt, const float* G,
                                       const float* k_norm, const float* q_norm, float scale) const {
    const auto store = [&](Element* tile, int i, float2 x, auto low) {
      *reinterpret_cast<uint32_t*>(tile + (first + i) * kTile + 2 * lane()) =
          low ? pack_low<Element>(x.x, x.y, packed(x)) : packed(x);
    };
    using Low = std::integral_constant<bool, kLow>;
    float2 e = exp2_of_gap(sum_at(G, first), {0.f, 0.f});
    CUTE_UNROLL
    for (int i = 0; i < kLevelBlock; ++i) {
      const float of_k = k_norm[first + i], of_q = q_norm[first + i] * scale;
      store(Kh, i, k_of(i) * e * float2{of_k, of_k}, Low{});
      if (!kLow) store(Qh, i, q_of(i) * e * float2{of_q, of_q}, std::false_type{});
      e = e * decay[i];
    }
    e = exp2_of_gap(sum_at(G, kTile - 1), sum_at(G, first + kLevelBlock - 1));
    CUTE_UNROLL
    for (int i = kLevelBlock - 1; i >= 0; --i) {
      const float of_k = k_norm[first + i];
      store(Kt, i, k_of(i) * e * float2{of_k, of_k}, Low{});
      if (i > 0) e = e * decay[i - 1];
    }
  }
};

}  // namespace nearfield::delta
