// The rows of a consumer thread between registers, shared memory and the tensors of the caller.
#pragma once

#include <cuda_bf16.h>

#include "lla/sweep_sm90.cuh"

namespace nearfield::lla {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Two neighboring elements of an output row.
__device__ __forceinline__ void store_pair(float* at, float a, float b) {
  *reinterpret_cast<float2*>(at) = float2{a, b};
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* at, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(at) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void store_pair(__half* at, float a, float b) {
  *reinterpret_cast<__half2*>(at) = __floats2half2_rn(a, b);
}

// What is subtracted from the logits of a row in the backward, up to another integer: its lse to the nearest
// integer, so that it is the same number in all passes whatever integer they add. The rest is a factor of the
// weights, 1 over their sum: exp2(s - lse) alone would carry the rounding of lse, 1e-4 at logits of 1000.
__device__ __forceinline__ float whole_shift(float lse, bool lone) {
  return lone || lse == -INFINITY ? 0.f : rintf(lse * kLog2e);
}

// Rows of a (64, D) accumulator times a factor to [B, m, Hq, features]; features are a multiple of 8.
template <class T, class Tile, class Sum>
__device__ __forceinline__ void store_rows(const Tile& tile, T* out, int features, const Sum& v,
                                           const float (&factor)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (!tile.inside[i]) continue;
    T* row = out + tile.output_row(i) * features;
    CUTE_UNROLL
    for (int j = 0; j < Tile::kQuads; ++j) {
      if (8 * j < features)
        store_pair(row + 8 * j + 2 * tile.quad, v(4 * j + 2 * i) * factor[i],
                   v(4 * j + 2 * i + 1) * factor[i]);
    }
  }
}

template <class Tile, class Sum>
__device__ __forceinline__ void store_rows_16bit(const Tile& tile, bool is_bf16, void* out, int features,
                                                 const Sum& v, const float (&factor)[2]) {
  if (is_bf16) {
    store_rows(tile, static_cast<__nv_bfloat16*>(out), features, v, factor);
  } else {
    store_rows(tile, static_cast<__half*>(out), features, v, factor);
  }
}

// Two neighboring elements of row i of an operand tile in shared memory, element e of an accumulator.
template <class Tile>
__device__ __forceinline__ float2 operand_pair(const Tile& tile, const half* operand, int e) {
  const int where = tile_offset<Tile::kD>(tile.tile_row() + 8 * Tile::row_of(e), e / 4 * 8) + 2 * tile.quad;
  return __half22float2(*reinterpret_cast<const __half2*>(operand + where));
}

// A view of 16-bit words as what they are.
template <class T>
__device__ __forceinline__ View<const T> view_as(const View<const uint16_t>& words) {
  return {reinterpret_cast<const T*>(words.data), words.batch_stride, words.row_stride, words.head_stride};
}

// Rows of a [B, m, Hq, d] tensor times a factor, in the order of an accumulator; 0 beyond it, and where
// nothing is seen.
template <class T, class Tile, class Sum>
__device__ __forceinline__ void load_rows(const Tile& tile, const View<const T>& from, float factor, Sum& v) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool sees = tile.keys[i].begin < tile.keys[i].end;
    const T* row = sees ? from.row(tile.block.batch, tile.row[i], tile.block.head) : nullptr;
    CUTE_UNROLL
    for (int j = 0; j < Tile::kQuads; ++j) {
      const T* at = row + 8 * j + 2 * tile.quad;
      const bool there = row != nullptr && 8 * j < tile.p.d;
      v(4 * j + 2 * i) = there ? static_cast<float>(at[0]) * factor : 0.f;
      v(4 * j + 2 * i + 1) = there ? static_cast<float>(at[1]) * factor : 0.f;
    }
  }
}

// The mean keys of a thread's rows in operand units: kept, or read back from the output.
template <class Traits, bool kKeep_ = Traits::kSizes.kKeepKbar>
struct MeanKeys {
  static constexpr int kQuads = Traits::kQuads;
  static constexpr bool kKeep = kKeep_;
  const QueryTile<Traits>& tile;
  const float* saved;  // [B, m, Hq, d]
  float inverse_unit;

  __device__ __forceinline__ float4* kept(int j) const {
    const int at = j * 128 + tile.thread % 128;
    if constexpr (Traits::kResident) {
      return &tile.s.x[tile.warpgroup][at];
    } else {
      return &tile.s.kbar[tile.warpgroup][at];
    }
  }
  // From the tensor, all reads in flight together.
  __device__ __forceinline__ void read(float4 (&out)[kQuads]) const {
    const float* row[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i)
      row[i] = saved + (tile.inside[i] ? tile.output_row(i) * tile.p.d : 0) + 2 * tile.quad;
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      float2 v[2] = {};
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool there = tile.inside[i] & (8 * j < tile.p.d);
        if (there) v[i] = *reinterpret_cast<const float2*>(row[i] + 8 * j);
      }
      out[j] = {v[0].x, v[0].y, v[1].x, v[1].y};
    }
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j)
      out[j] = {out[j].x * inverse_unit, out[j].y * inverse_unit, out[j].z * inverse_unit,
                out[j].w * inverse_unit};
  }

  // For use between two sweeps, when there are registers for them: quad j of them.
  struct Gathered {
    const MeanKeys& of;
    float4 v[kKeep ? 1 : kQuads];
    __device__ __forceinline__ float4 operator()(int j) const {
      if constexpr (kKeep) {
        return *of.kept(j);
      } else {
        return v[j];
      }
    }
  };
  __device__ __forceinline__ Gathered gather() const {
    Gathered out{*this};
    if constexpr (!kKeep) read(out.v);
    return out;
  }
};

// The largest absolute value of a head, of which each thread brings some; all threads of the warp.
__device__ __forceinline__ void note_largest(float* of_head, float largest) {
  CUTE_UNROLL
  for (int o = 16; o > 0; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
  // Non-negative floats are ordered as integers.
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(of_head), __float_as_int(largest));
}

// A (64, D) vector as a left operand in two fp16 terms over a power of two per row, and its product with
// kbar, taken from what was rounded; the second term is left out where the first holds all bits that matter.
struct SplitRows {
  float largest[2], unit[2], inverse[2], mean[2];

  template <class Tile, class Sum, class Means>
  __device__ __forceinline__ SplitRows(const Tile& tile, const Sum& v, const Means& means,
                                       bool two_terms = true) {
    const float second = two_terms ? 1.f : 0.f;
    largest_of_rows(tile, v, largest);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      unit[i] = operand_unit(largest[i]);
      inverse[i] = 1.f / unit[i];
      mean[i] = 0.f;
    }
    CUTE_UNROLL
    for (int j = 0; j < Tile::kQuads; ++j) {
      const float4 m = means(j);
      CUTE_UNROLL
      for (int e = 4 * j; e < 4 * j + 4; e += 2) {
        const int i = Tile::row_of(e);
        const float a = v(e) * inverse[i], b = v(e + 1) * inverse[i];
        const float2 high = __half22float2(__floats2half2_rn(a, b)),
                     low = __half22float2(__floats2half2_rn(a - high.x, b - high.y));
        mean[i] += fmaf(second, low.x, high.x) * (i == 0 ? m.x : m.z) +
                   fmaf(second, low.y, high.y) * (i == 0 ? m.y : m.w);
      }
    }
    Tile::add_over_row(mean);
  }

  template <class Tile, class Sum>
  static __device__ __forceinline__ void largest_of_rows(const Tile&, const Sum& v, float (&out)[2]) {
    out[0] = out[1] = 0.f;
    CUTE_UNROLL
    for (int e = 0; e < 4 * Tile::kQuads; ++e)
      out[Tile::row_of(e)] = fmaxf(out[Tile::row_of(e)], fabsf(v(e)));
    Tile::max_over_row(out);
  }

  // The two terms in registers.
  template <class Sum, class Operand>
  __device__ __forceinline__ void split(const Sum& v, Operand& high, Operand& low) const {
    CUTE_UNROLL
    for (int e = 0; e < size(v); e += 2) {
      const int i = e / 2 % 2;
      const float a = v(e) * inverse[i], b = v(e + 1) * inverse[i];
      const uint32_t rounded = pack<half>(a, b);
      recast<uint32_t>(high)(e / 2) = rounded;
      recast<uint32_t>(low)(e / 2) = pack_low<half>(a, b, rounded);
    }
  }

  template <class Tile, class Sum>
  __device__ __forceinline__ void store(const Tile& tile, half* high, half* low, const Sum& v) const {
    CUTE_UNROLL
    for (int e = 0; e < 4 * Tile::kQuads; e += 2) {
      const int i = Tile::row_of(e);
      const int where = tile_offset<Tile::kD>(tile.tile_row() + 8 * i, e / 4 * 8) + 2 * tile.quad;
      const float a = v(e) * inverse[i], b = v(e + 1) * inverse[i];
      const uint32_t rounded = pack<half>(a, b);
      *reinterpret_cast<uint32_t*>(high + where) = rounded;
      *reinterpret_cast<uint32_t*>(low + where) = pack_low<half>(a, b, rounded);
    }
  }
};

}  // namespace nearfield::lla
