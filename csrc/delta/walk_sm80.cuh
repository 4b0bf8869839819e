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

#include "delta/walk_in_place_sm80.cuh"

namespace nearfield::delta {

// kLow: the forward walk of a sequence with hard chunks. Others have a walk without the choice at every
// product, which would keep the compiler from overlapping products.
template <class Element, int kKeyDim, bool kLow>
struct WalkCta : WalkWarp<Element, kKeyDim> {
  using Base = WalkWarp<Element, kKeyDim>;
  using Base::args, Base::in, Base::kKeys, Base::place, Base::shared, Base::tiles;
  using Base::chain_index, Base::decay_state, Base::has_hard_chunk, Base::keep_state, Base::load_state,
      Base::store_state, Base::store_state_tiles, Base::store_token_tile, Base::tokens_of, Base::value_tiles,
      Base::values_of;
  using typename Base::Factor;
  using typename Base::Reader;
  using typename Base::Values;
  static constexpr int kParts = kIsWide<Element> ? 1 : 2;  // of Z

  using Base::Base;

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
    Reader keys(shared, 0, kKeyStages<kKeyDim>);
    Reader others(shared, raw ? kKeyStages<kKeyDim> : 0,
                  kWalkStages<Element> - (raw ? kKeyStages<kKeyDim> : 0));
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
      Base::template for_tokens<Factor::kRead>(
          chunk, R, [&](int m, int i, float e) { R.tile[0][m][i] = X.tile[0][m][i] - e * R.tile[0][m][i]; });
      Base::template scale_tokens<Factor::kBeta>(X, R, chunk);
      const bool both = kBoth && (hard || !kOutput);
      const int z_tiles = both ? 2 : 1, others_count = z_tiles + (kOutput ? (hard ? 2 : 1) : 0);
      if constexpr (kOutput && !kAskEarly) ask();
      others.acquire(z, others_count);
      multiply_tile<true, kBoth && !kOutput ? Part::kBoth : Part::kHigh>(R, X, z[0]);
      if (kLow && kOutput && both) multiply_tile<true, Part::kLow>(R, X, z[0]);
      if (both) multiply_tile<true>(R, X, z[1]);
      if (args.backward) store_token_tile(R, args.left.r, chunk);
      Base::template scale_tokens<Factor::kBeta>(X, R, chunk);  // V'
      decay_state(S, chunk);
      if constexpr (kOutput) {
        Base::template scale_tokens<Factor::kAsk>(O, O, chunk);
        multiply_hard<true>(O, X, z + z_tiles, hard, hard);
        tokens_of(args.o, chunk).write(O);
      }
      others.release(others_count);
      Base::template scale_tokens<Factor::kWrite>(X, X, chunk);
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
    store_state(S, args.final_state, chain_index());
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
      Base::template scale_tokens<Factor::kBeta>(dR, Y, turn);
      others.acquire(z, kParts);
      multiply_tile<false, Part::kBoth>(Y, dR, z[0]);
      if constexpr (kParts == 2) multiply_tile<false>(Y, dR, z[1]);
      others.release(kParts);
      store_token_tile(Y, args.left.Y, chunk);
      Base::template scale_tokens<Factor::kBeta>(dR, Y, turn);
      tokens_of(args.dv, chunk).write(dR);
      Base::template scale_tokens<Factor::kBeta>(dR, Y, turn, -1.f);
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
    store_state(dS, args.d_initial, chain_index());
  }

  __device__ __forceinline__ void run() const {
    const bool back = args.backward && blockIdx.x >= value_tiles();
    if (back ? kLow : kHasLow<Element> && has_hard_chunk() != kLow) return;
    if (threadIdx.x == 0) shared.init(static_cast<uint32_t>(args.value_warps));
    __syncthreads();
    const bool fills = static_cast<int>(threadIdx.x) >= 32 * args.value_warps;
    TileFiller<Element, kKeyDim> filler(shared, args, place, kWalkStages<Element>);
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
  using Shared = WalkShared<Element, kKeyDim>;
  // The gradient reads whole tiles of values, so the backward writes them.
  const int64_t values = args.backward ? tiles_of(args.in.value_dim) * kTile : args.in.value_dim;
  const int64_t width = 16 * args.value_warps, value_tiles = (values + width - 1) / width;
  const dim3 grid(static_cast<unsigned>(value_tiles * (args.backward ? 2 : 1)),
                  static_cast<unsigned>(args.in.value_heads), static_cast<unsigned>(args.in.sequences));
  const auto launch = [&](auto* kernel, const WalkSm80Args& a, int warps, int bytes) {
    if (const int error = allow_shared_memory(kernel, bytes)) return error;
    kernel<<<grid, 32 * warps, bytes, static_cast<cudaStream_t>(stream)>>>(a);
    return static_cast<int>(cudaGetLastError());
  };
  const int warps = args.value_warps + 1;
  constexpr int kBytes = Shared::bytes(kWalkStages<Element>);
  static_assert(kBytes <= kPortableShared);
  if constexpr (kHasLow<Element>) {  // each sequence is walked by one of two kernels
    if (const int error = launch(&walk_sm80_kernel<Element, kKeyDim, true>, args, warps, kBytes))
      return error;
  }
  if constexpr (kHasInPlaceWalk<Element, kKeyDim>) {
    if (args.in_place()) {
      const auto launch_in_place = [&](auto warps_of_values) {
        constexpr int kValueWarps = decltype(warps_of_values)::value;
        using Walk = WalkInPlace<Element, kKeyDim, kValueWarps>;
        WalkSm80Args a = args;
        a.stages = Walk::plan_stages(largest_shared());
        return launch(&walk_in_place_kernel<Element, kKeyDim, kValueWarps>, a, Walk::kWarps,
                      Walk::bytes(a.stages));
      };
      switch (args.value_warps) {
        case 1:
          return launch_in_place(std::integral_constant<int, 1>{});
        case 2:
          return launch_in_place(std::integral_constant<int, 2>{});
        default:
          return launch_in_place(std::integral_constant<int, 4>{});
      }
    }
  }
  return launch(&walk_sm80_kernel<Element, kKeyDim, false>, args, warps, kBytes);
}

}  // namespace nearfield::delta
