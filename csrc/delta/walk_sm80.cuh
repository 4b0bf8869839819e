// The serial walk over the chunks of a sequence. A warp keeps S^T of 16 values in float32 registers, and
// every product leaves the tensor cores in the layout in which it is the next one's left operand:
//   R^T = V^T - S^T Kh^T     r^T = R^T + (beta R)^T Z^T     V' = beta r
//   O^T = S^T Qh^T + V'^T P^T     S^T <- e^{G_C} S^T + V'^T Kt
// and back, with dS^T in the place of S^T:
//   Y^T = dO^T P + dS^T Kt^T, then += (beta Y)^T Z     dR = beta Y
//   dS^T <- e^{G_C} dS^T + dO^T Qh - dR^T Kh
// The right operands are 64 x 64 tiles that a further warp brings through a ring (walk_tiles_sm80.cuh). Kh,
// Qh and Kt are tiles of scratch, or raw rows whose factors go to the accumulators' columns. In a hard chunk,
// products with Kh, P and Kt take both halves of both operands.
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
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// 16 values of the tokens of a chunk in memory, `stride` elements apart.
template <class Element>
struct ValueRows {
  Element* first;
  int64_t stride;
  int rows, values;  // that exist

  // What a lane holds of them on their way.
  struct Held {
    uint2 token[kIsWide<Element> ? 1 : 8];
  };
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
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
        for (int half = 0; half < 2; ++half) {
          cutlass::NumericArrayConverter<Element, float, 2> convert;
          const auto pair =
              convert(cutlass::Array<float, 2>{x.tile[0][m][2 * half], x.tile[0][m][2 * half + 1]});
          word[half] = transposed(reinterpret_cast<const uint32_t&>(pair));
        }
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

// kLow: the forward walk of a sequence with hard chunks. Others have a walk without the choice at every
// product, which would keep the compiler from overlapping products.
template <class Element, int kKeyDim, bool kLow>
struct WalkCta {
  static constexpr int kKeys = kKeyDim / kTile;
  static constexpr int kParts = kIsWide<Element> ? 1 : 2;  // of Z
  using Shared = WalkShared<Element, kKeyDim>;
  using Reader = TileReader<Element, kKeyDim>;
  using Values = ValueRows<Element>;
  const WalkSm80Args& args;
  const InputsSm80& in;
  Shared& shared;
  const WalkPlace place;
  const ChunkTiles tiles;
  int lane, value;  // value: the first of this warp's 16

  __device__ WalkCta(const WalkSm80Args& a, Shared& s)
      : args(a), in(a.in), shared(s), place(a.in), tiles(tiles_of_walk<Element>(a)) {
    lane = static_cast<int>(threadIdx.x) % 32;
    value = (static_cast<int>(blockIdx.x % value_tiles()) * args.value_warps +
             static_cast<int>(threadIdx.x) / 32) *
            16;
  }

  __device__ unsigned value_tiles() const { return gridDim.x / (args.backward ? 2 : 1); }

  // ---- States ----

  __device__ int64_t chain() const { return place.n * in.value_heads + place.hv; }
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
    from += chain() * in.state_size();
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
      return {const_cast<Element*>(first) + value, from.token, place.rows_of(chunk),
              static_cast<int>(in.value_dim) - value};
    }
    Element* first =
        static_cast<Element*>(args.scratch.tiles) +
        (place.index(chunk) * tiles.total(args.scratch.backward) + tile + value / kTile) * kTileElements;
    return {first + value % kTile, kTile, kTile, 16};
  }
  // Into [B, T, HV, V].
  __device__ __forceinline__ void store_tokens(const Rows64& x, void* to, int chunk) const {
    const int64_t stride = in.value_heads * in.value_dim;
    Element* first = static_cast<Element*>(to) + (place.b * in.tokens + place.token_of(chunk)) * stride +
                     place.hv * in.value_dim + value;
    Values{first, stride, place.rows_of(chunk), static_cast<int>(in.value_dim) - value}.write(x);
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

  // ---- The walks ----

  // c += left tile; in a hard chunk with both halves of the left operand, and of the tile if it has two.
  template <bool kTransposed>
  __device__ __forceinline__ void multiply_hard(Rows64& c, const Rows64& left, const Element* const* tile,
                                                bool hard, bool low) const {
    multiply_tile<kTransposed>(c, left, tile[0]);
    if (!kLow || !hard) return;
    multiply_tile<kTransposed, Part::kLow>(c, left, tile[0]);
    if (low) multiply_tile<kTransposed>(c, left, tile[1]);
  }

  template <bool kOutput>
  __device__ __forceinline__ void forward() const {
    // Both halves of Z where differences matter: in hard chunks, and for the gradient.
    constexpr bool kBoth = kParts == 2 && (kLow || !kOutput);
    constexpr int kMost = kKeys * (kLow ? 2 : 1),
                  kPairMost = (kBoth ? 2 : 1) + (kOutput ? 1 : 0) + (kLow ? 1 : 0);
    constexpr bool kAskEarly = kKeyDim <= 128 && !kIsWide<Element> && !kLow;  // registers allow it
    const bool raw = args.scratch.raw;
    Reader keys(shared, 0, kKeyStages);
    Reader others(shared, raw ? kKeyStages : 0, kWalkStages<Element> - (raw ? kKeyStages : 0));
    Rows64 S[kKeys];
    load_state(S, in.initial_state);
    typename Values::Held held;
    if (place.chunks > 0) values_of(in.v, tiles.V(), 0).fetch(held);
    for (int chunk = 0; chunk < place.chunks; ++chunk) {
      const Element *k[kMost], *q[kKeys], *z[kPairMost];
      if (args.backward) store_state_tiles(S, args.left.S, chunk);
      // How many there are of keys hangs on the factors, which come with the first of them.
      bool hard = false;
      if constexpr (kLow) {
        const Element* first[1];
        if (raw) {
          Reader(keys).acquire(first, 1);
        } else {
          Reader(others).acquire(first, 1);
        }
        hard = shared.factors[chunk % kWalkRows].hard != 0.f;
      }
      const bool low = hard && !raw;
      const int key_tiles = kKeys * (low ? 2 : 1);
      if (raw) {
        keys.acquire(k, key_tiles);
      } else {
        others.acquire(k, key_tiles);
      }
      Rows64 R, O;
      R.clear();
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block)
        multiply_hard<true>(R, S[block], k + block * (low ? 2 : 1), hard, low);
      if (!raw) others.release(key_tiles);
      const auto ask = [&] {
        others.acquire(q, kKeys);
        O.clear();
        CUTE_UNROLL
        for (int block = 0; block < kKeys; ++block) multiply_tile<true>(O, S[block], q[block]);
        others.release(kKeys);
      };
      if constexpr (kOutput && kAskEarly) ask();
      Rows64 X;
      values_of(in.v, tiles.V(), chunk).read(X, held);
      if (chunk + 1 < place.chunks) values_of(in.v, tiles.V(), chunk + 1).fetch(held);
      for_tokens<Factor::kRead>(
          chunk, R, [&](int m, int i, float e) { R.tile[0][m][i] = X.tile[0][m][i] - e * R.tile[0][m][i]; });
      scale_tokens<Factor::kBeta>(X, R, chunk);
      const bool both = kBoth && (hard || !kOutput);
      const int z_tiles = both ? 2 : 1, others_count = z_tiles + (kOutput ? (hard ? 2 : 1) : 0);
      if constexpr (kOutput && !kAskEarly) ask();
      others.acquire(z, others_count);
      multiply_tile<true, kBoth && !kOutput ? Part::kBoth : Part::kHigh>(R, X, z[0]);
      if (kLow && kOutput && both) multiply_tile<true, Part::kLow>(R, X, z[0]);
      if (both) multiply_tile<true>(R, X, z[1]);
      if (args.backward) store_token_tile(R, args.left.r, chunk);
      scale_tokens<Factor::kBeta>(X, R, chunk);  // V'
      decay_state(S, chunk);
      if constexpr (kOutput) {
        scale_tokens<Factor::kAsk>(O, O, chunk);
        multiply_hard<true>(O, X, z + z_tiles, hard, hard);
        store_tokens(O, args.o, chunk);
      }
      others.release(others_count);
      scale_tokens<Factor::kWrite>(X, X, chunk);
      if (!raw) others.acquire(k, key_tiles);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block)
        multiply_hard<false>(S[block], X, k + block * (low ? 2 : 1), hard, low);
      if (raw) {
        keys.release(key_tiles);
      } else {
        others.release(key_tiles);
      }
      keep_state(S, chunk);
    }
    store_state(S, args.final_state, chain());
  }

  __device__ __forceinline__ void backward() const {
    Reader others(shared, 0, kWalkStages<Element>);
    Rows64 dS[kKeys];
    load_state(dS, args.d_final);
    typename Values::Held held;
    const int last = place.chunks - 1;
    if (last >= 0) values_of({}, tiles.dO(), last).fetch(held);
    for (int chunk = last; chunk >= 0; --chunk) {
      const Element *p[1], *k[kKeys], *z[kParts];
      Rows64 d_o, Y, dR;
      const int turn = last - chunk;
      values_of({}, tiles.dO(), chunk).read(d_o, held);
      if (chunk > 0) values_of({}, tiles.dO(), chunk - 1).fetch(held);
      store_state_tiles(dS, args.left.dS, chunk);
      Y.clear();
      others.acquire(p, 1);
      multiply_tile<false>(Y, d_o, p[0]);
      others.release(1);
      others.acquire(k, kKeys);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_tile<true>(Y, dS[block], k[block]);
      others.release(kKeys);
      scale_tokens<Factor::kBeta>(dR, Y, turn);
      others.acquire(z, kParts);
      multiply_tile<false, Part::kBoth>(Y, dR, z[0]);
      if constexpr (kParts == 2) multiply_tile<false>(Y, dR, z[1]);
      others.release(kParts);
      store_token_tile(Y, args.left.Y, chunk);
      scale_tokens<Factor::kBeta>(dR, Y, turn);
      store_tokens(dR, args.dv, chunk);
      scale_tokens<Factor::kBeta>(dR, Y, turn, -1.f);
      decay_state(dS, turn);
      const auto add = [&](const Rows64& left) {
        others.acquire(k, kKeys);
        CUTE_UNROLL
        for (int block = 0; block < kKeys; ++block) multiply_tile<false>(dS[block], left, k[block]);
        others.release(kKeys);
      };
      add(d_o);
      add(dR);
    }
    store_state(dS, args.d_initial, chain());
  }

  __device__ bool has_hard_chunk() const {
    bool found = false;
    for (int chunk = static_cast<int>(threadIdx.x); chunk < place.chunks;
         chunk += static_cast<int>(blockDim.x))
      found |= args.scratch.rows[place.index(chunk)].factors.hard != 0.f;
    return __syncthreads_or(found) != 0;
  }

  __device__ __forceinline__ void run() const {
    const bool back = args.backward && blockIdx.x >= value_tiles();
    if (back ? kLow : kHasLow<Element> && has_hard_chunk() != kLow) return;
    if (threadIdx.x == 0) shared.init(static_cast<uint32_t>(args.value_warps));
    __syncthreads();
    const bool fills = static_cast<int>(threadIdx.x) >= 32 * args.value_warps;
    TileFiller<Element, kKeyDim> filler(shared, args, place);
    if (back) {
      if (fills) return filler.backward();
      return backward();
    }
    if (args.backward) {
      if (fills) return filler.template forward<false, kLow>();
      return forward<false>();
    }
    if (fills) return filler.template forward<true, kLow>();
    forward<true>();
  }
};

template <class Element, int kKeyDim, bool kLow>
__global__ void __launch_bounds__(160) walk_sm80_kernel(const __grid_constant__ WalkSm80Args args) {
  WalkCta<Element, kKeyDim, kLow>(args, *reinterpret_cast<WalkShared<Element, kKeyDim>*>(portable_shared))
      .run();
}

template <class Tag, int kKeyDim>
int walk_sm80<Tag, kKeyDim>::run(const WalkSm80Args& args, void* stream) {
  using Element = portable_t<Tag>;
  constexpr int kBytes = sizeof(WalkShared<Element, kKeyDim>);
  static_assert(kBytes <= 99 * 1024, "CTAs of 8.6, 8.9 and 12.0 have 99 KB");
  // The gradient reads whole tiles of values, so the backward writes them.
  const int64_t values = args.backward ? tiles_of(args.in.value_dim) * kTile : args.in.value_dim;
  const int64_t width = 16 * args.value_warps, value_tiles = (values + width - 1) / width;
  const dim3 grid(static_cast<unsigned>(value_tiles * (args.backward ? 2 : 1)),
                  static_cast<unsigned>(args.in.value_heads), static_cast<unsigned>(args.in.sequences));
  const auto launch = [&](auto* kernel) {
    if (const int error = allow_shared(kernel, kBytes)) return error;
    kernel<<<grid, 32 * (args.value_warps + 1), kBytes, static_cast<cudaStream_t>(stream)>>>(args);
    return static_cast<int>(cudaGetLastError());
  };
  if constexpr (kHasLow<Element>) {  // each sequence is walked by one of the two
    if (const int error = launch(&walk_sm80_kernel<Element, kKeyDim, true>)) return error;
  }
  return launch(&walk_sm80_kernel<Element, kKeyDim, false>);
}

}  // namespace nearfield::delta
