// What every walk of a sequence does with the 16 values of a warp: their states, their rows of v and o, the
// factors of tokens. Symbols: walk_sm80.cuh.
#pragma once

#include "delta/walk_tiles_sm80.cuh"

namespace nearfield::delta {

// Values and tokens change places between memory, where a lane reads four values of a token, and
// accumulators, where it has two tokens of a value: 8 x 8 elements at a time, so that row r of an accumulator
// is not value r.
template <class Element>
__device__ __forceinline__ int value_of_row(int row) {
  return kIsWide<Element> ? row : row % 8 / 2 * 4 + row / 8 * 2 + row % 2;
}

// 16 values of the tokens of a chunk in memory, `stride` elements apart.
template <class Element>
struct ValueRows {
  Element* first;
  int64_t stride;
  int rows, values;  // that exist, from here on

  // What a lane holds of them on their way.
  struct Held {
    uint2 token[kIsWide<Element> ? 1 : 8];
  };
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ void next_chunk() { first += kTile * stride, rows -= kTile; }
  __device__ __forceinline__ Element* at_lane() const { return first + lane() / 4 * stride + lane() % 4 * 4; }

  // Begins reading; rows must be aligned to four elements.
  __device__ __forceinline__ void fetch(Held& held) const {
    if constexpr (!kIsWide<Element>) {
      const Element* from = at_lane();
      const int last = lane() % 4 * 4 < values ? rows : 0;
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m)
        held.token[m] =
            8 * m + lane() / 4 < last ? *reinterpret_cast<const uint2*>(from + 8 * m * stride) : uint2{0, 0};
    }
  }
  __device__ __forceinline__ void read(Rows64& x, const Held& held) const {
    CUTE_UNROLL
    for (int m = 0; m < 8; ++m) {
      if constexpr (kIsWide<Element>) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = 8 * m + lane() % 4 * 2 + i % 2, v = lane() / 4 + i / 2 * 8;
          x.tile[0][m][i] = t < rows && v < values ? static_cast<float>(first[t * stride + v]) : 0.f;
        }
      } else {
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = transposed(half ? held.token[m].y : held.token[m].x);
          const auto pair = reinterpret_cast<const cutlass::Array<Element, 2>&>(word);
          x.tile[0][m][2 * half] = static_cast<float>(pair[0]);
          x.tile[0][m][2 * half + 1] = static_cast<float>(pair[1]);
        }
      }
    }
  }
  __device__ __forceinline__ void write(const Rows64& x) const {
    if constexpr (kIsWide<Element>) {
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = 8 * m + lane() % 4 * 2 + i % 2, v = lane() / 4 + i / 2 * 8;
          if (t < rows && v < values) first[t * stride + v] = Element(x.tile[0][m][i]);
        }
      }
    } else {
      Element* to = at_lane();
      const bool whole =
          lane() % 4 * 4 + 4 <= values && reinterpret_cast<uintptr_t>(first) % 8 == 0 && stride % 4 == 0;
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m) {
        uint32_t word[2];
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half)
          word[half] = transposed(pack<Element>(x.tile[0][m][2 * half], x.tile[0][m][2 * half + 1]));
        if (8 * m + lane() / 4 >= rows) continue;
        if (whole) {
          *reinterpret_cast<uint2*>(to + 8 * m * stride) = {word[0], word[1]};
        } else {
          const auto& four = reinterpret_cast<const cutlass::Array<Element, 4>&>(word);
          for (int c = 0; c < 4; ++c)
            if (lane() % 4 * 4 + c < values) to[8 * m * stride + c] = four[c];
        }
      }
    }
  }
};

template <class Element, int kKeyDim>
struct WalkWarp {
  static constexpr int kKeys = kKeyDim / kTile;
  using Shared = WalkShared<Element, kKeyDim>;
  using Reader = TileReader<Element, kKeyDim>;
  using Values = ValueRows<Element>;
  const WalkSm80Args& args;
  const InputsSm80& in;
  Shared& shared;
  const WalkPlace place;
  const ChunkTiles tiles;
  int lane, value;  // value: the first of this warp's 16

  __device__ WalkWarp(const WalkSm80Args& a, Shared& s)
      : args(a), in(a.in), shared(s), place(a.in), tiles(tiles_of_walk<Element>(a)) {
    lane = static_cast<int>(threadIdx.x) % 32;
    value = (static_cast<int>(blockIdx.x % value_tiles()) * args.value_warps +
             static_cast<int>(threadIdx.x) / 32 % args.value_warps) *
            16;
  }

  __device__ unsigned value_tiles() const { return gridDim.x / (args.backward ? 2 : 1); }

  // ---- States ----

  __device__ int64_t chain_index() const { return place.n * in.value_heads + place.hv; }
  // f(place in a state, element) over the elements that exist.
  template <class F>
  __device__ __forceinline__ void for_state(Rows64 (&S)[kKeys], const F& f) const {
    const int K = static_cast<int>(in.key_dim), V = static_cast<int>(in.value_dim);
    const int along_v = in.state_v_first ? K : 1, along_c = in.state_v_first ? 1 : V;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int v = value + value_of_row<Element>(lane / 4 + 8 * half);
      int at = v * along_v + lane % 4 * 2 * along_c;
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) {
        CUTE_UNROLL
        for (int n = 0; n < 8; ++n, at += 8 * along_c) {
          const int c = block * kTile + 8 * n + lane % 4 * 2;
          if (v < V && c < K) f(at, S[block].tile[0][n][2 * half]);
          if (v < V && c + 1 < K) f(at + along_c, S[block].tile[0][n][2 * half + 1]);
        }
      }
    }
  }
  __device__ void load_state(Rows64 (&S)[kKeys], const float* from) const {
    CUTE_UNROLL
    for (int block = 0; block < kKeys; ++block) S[block].clear();
    if (from == nullptr) return;
    from += chain_index() * in.state_size();
    for_state(S, [&](int at, float& x) { x = from[at]; });
  }
  __device__ __forceinline__ void store_state(Rows64 (&S)[kKeys], float* to, int64_t state) const {
    if (to == nullptr) return;
    to += state * in.state_size();
    for_state(S, [&](int at, float& x) { to[at] = x; });
  }
  // The state after a chunk that ends a span.
  __device__ __forceinline__ void keep_state(Rows64 (&S)[kKeys], int chunk) const {
    if (args.states == nullptr || (chunk + 1) % args.states_every != 0 || place.rows_of(chunk) < kTile)
      return;
    const int64_t span = kChunk * args.states_every;
    const int64_t entry =
        place.b * (in.tokens / span) + place.begin / span + (chunk + 1) / args.states_every - 1;
    store_state(S, args.states, entry * in.value_heads + place.hv);
  }
  // `turn`: how many chunks came before.
  __device__ __forceinline__ void decay_state(Rows64 (&S)[kKeys], int turn) const {
    const float* decay = shared.decay[turn % kWalkRows] + lane % 4 * 2;
    CUTE_UNROLL
    for (int block = 0; block < kKeys; ++block) {
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m) {
        const float2 e = *reinterpret_cast<const float2*>(decay + block * kTile + 8 * m);
        auto& x = S[block].tile[0][m];
        x[0] *= e.x, x[1] *= e.y, x[2] *= e.x, x[3] *= e.y;
      }
    }
  }

  // ---- Values of tokens ----

  // A tensor [B, T, HV, V] of the caller's, or its tile in scratch.
  __device__ __forceinline__ Values values_of(const Rows<void>& from, int tile, int chunk) const {
    if (args.scratch.raw) {
      const Element* first = row_at<Element>(from, place.b, place.token_of(chunk), place.hv);
      return {const_cast<Element*>(first) + value, from.token, place.rows_from(chunk),
              static_cast<int>(in.value_dim) - value};
    }
    Element* first =
        static_cast<Element*>(args.scratch.tiles) +
        (place.index(chunk) * tiles.total(args.scratch.backward) + tile + value / kTile) * kTileElements;
    return {first + value % kTile, kTile, kTile, 16};
  }
  // Of a contiguous tensor [B, T, HV, V].
  __device__ __forceinline__ Values tokens_of(void* to, int chunk) const {
    const int64_t stride = in.value_heads * in.value_dim;
    Element* first = static_cast<Element*>(to) + (place.b * in.tokens + place.token_of(chunk)) * stride +
                     place.hv * in.value_dim + value;
    return {first, stride, place.rows_from(chunk), static_cast<int>(in.value_dim) - value};
  }
  // Into [token][value] tiles of scratch.
  __device__ __forceinline__ void store_token_tile(const Rows64& x, void* to, int chunk) const {
    const int64_t tile = place.index(chunk) * tiles.values + value / kTile;
    Values{static_cast<Element*>(to) + tile * kTileElements + value % kTile, kTile, kTile, 16}.write(x);
  }
  // Into [value][channel] tiles of scratch.
  __device__ __forceinline__ void store_state_tiles(const Rows64 (&S)[kKeys], void* to, int chunk) const {
    struct alignas(2 * sizeof(Element)) Pair {
      Element at[2];
    };
    const int64_t tile = (place.index(chunk) * tiles.values + value / kTile) * kKeys;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      Element* first = static_cast<Element*>(to) + tile * kTileElements +
                       (value % kTile + value_of_row<Element>(lane / 4 + half * 8)) * kTile + lane % 4 * 2;
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) {
        CUTE_UNROLL
        for (int m = 0; m < 8; ++m) {
          const float* x = &S[block].tile[0][m][2 * half];
          *reinterpret_cast<Pair*>(first + block * kTileElements + 8 * m) =
              Pair{{Element(x[0]), Element(x[1])}};
        }
      }
    }
  }

  // ---- Factors of tokens ----

  enum class Factor { kRead, kBeta, kAsk, kWrite };
  // f(element, factor of its token)
  template <Factor kFactor, class F>
  __device__ __forceinline__ void for_tokens(int turn, Rows64& x, const F& f) const {
    const WalkFactors& all = shared.factors[turn % kWalkRows];
    const float* from =
        kFactor == Factor::kRead || kFactor == Factor::kBeta ? &all.first[0].read : &all.second[0].ask;
    CUTE_UNROLL
    for (int m = 0; m < 8; ++m) {
      const float4 two = *reinterpret_cast<const float4*>(from + 2 * (8 * m + lane % 4 * 2));
      const bool second = kFactor == Factor::kBeta || kFactor == Factor::kWrite;
      const float e[2] = {second ? two.y : two.x, second ? two.w : two.z};
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) f(m, i, e[i % 2]);
    }
  }
  template <Factor kFactor>
  __device__ __forceinline__ void scale_tokens(Rows64& to, const Rows64& from, int turn,
                                               float sign = 1.f) const {
    for_tokens<kFactor>(turn, to,
                        [&](int m, int i, float e) { to.tile[0][m][i] = sign * e * from.tile[0][m][i]; });
  }

  __device__ bool has_hard_chunk() const {
    bool found = false;
    for (int chunk = static_cast<int>(threadIdx.x); chunk < place.chunks;
         chunk += static_cast<int>(blockDim.x))
      found |= args.scratch.rows[place.index(chunk)].factors.hard != 0.f;
    return __syncthreads_or(found) != 0;
  }
};

}  // namespace nearfield::delta
