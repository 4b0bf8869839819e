// The forward walk of sequences read in place, none of whose chunks is hard. What follows from chunk to chunk
// is S^T -> V' -> S^T; the output hangs on both but nothing hangs on it. So a warp of 16 values has a second
// one beside it that makes their output and gets S^T and V'^T through shared memory, as the operands that
// they are. Symbols: walk_sm80.cuh.
#pragma once

#include "delta/walk_warp_sm80.cuh"

namespace nearfield::delta {

// From the warp that has the state of 16 values to the warp that makes their output.
template <class Element, int kKeyDim>
struct HandedOver {
  static constexpr int kDepth = TileFragments<Element>::kDepth;
  uint4 S[kKeyDim / kDepth][32], V[kTile / kDepth][32];  // left operands, a lane's words together
  StageBarriers S_barriers, V_barriers;

  __device__ void init() {
    for (StageBarriers* b : {&S_barriers, &V_barriers}) b->full.init(1), b->empty.init(1);
  }
};

template <class Element, int kKeyDim, int kValueWarps>
struct WalkInPlace : WalkWarp<Element, kKeyDim> {
  using Base = WalkWarp<Element, kKeyDim>;
  using Base::args, Base::in, Base::kKeys, Base::lane, Base::place, Base::shared, Base::tiles;
  using Base::chain_index, Base::has_hard_chunk, Base::load_state, Base::store_state, Base::tokens_of,
      Base::values_of;
  using typename Base::Factor;
  using typename Base::Reader;
  using typename Base::Values;
  using F = TileFragments<Element>;
  using Left = typename F::A;
  using Handed = HandedOver<Element, kKeyDim>;
  static constexpr int kSteps = kTile / F::kDepth;  // of a product's sum over a tile
  static constexpr int kWarps = 2 * kValueWarps + 3;
  Handed& handed;

  __device__ WalkInPlace(const WalkSm80Args& a, typename Base::Shared& s)
      : Base(a, s), handed(reinterpret_cast<Handed*>(s.tile(a.stages))[threadIdx.x / 32 % kValueWarps]) {}

  static constexpr int bytes(int stages) {
    return Base::Shared::bytes(stages) + kValueWarps * static_cast<int>(sizeof(Handed));
  }
  // As many stages as a CTA's shared memory holds.
  static int plan_stages(int limit) {
    static_assert(bytes(kKeyStages<kKeyDim> + kKeys + 1) <= kPortableShared);
    int stages = kMostWalkStages;
    while (bytes(stages) > limit) --stages;
    return stages;
  }

  // What is handed over is written between these two.
  __device__ __forceinline__ static void begin_handing(StageBarriers& barriers, int turn) {
    barriers.empty.wait((turn & 1) ^ 1);
  }
  __device__ __forceinline__ void end_handing(StageBarriers& barriers) const {
    __syncwarp();
    if (lane == 0) barriers.full.arrive();
  }
  __device__ __forceinline__ void put(uint4 (&to)[32], const Left& left) const {
    to[lane] = {left.word[0], left.word[1], left.word[2], left.word[3]};
  }
  template <int kCount>
  __device__ __forceinline__ void take(Left (&left)[kCount], const uint4 (*from)[32], StageBarriers& barriers,
                                       int turn) const {
    barriers.full.wait(turn & 1);
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const uint4 words = from[i][lane];
      left[i] = {{words.x, words.y, words.z, words.w}};
    }
    __syncwarp();
    if (lane == 0) barriers.empty.arrive();
  }

  __device__ __forceinline__ static void left_of(Left (&left)[kSteps], const Rows64& c) {
    CUTE_UNROLL
    for (int k = 0; k < kSteps; ++k) left[k] = F::left(c, 0, k * F::kDepth);
  }
  // c += left tile, or left tile^T, or that of a tile that is zero above its diagonal.
  template <bool kTransposed, bool kLower = false>
  __device__ __forceinline__ static void multiply(Rows64& c, const Left* left, const Element* tile) {
    CUTE_UNROLL
    for (int k = 0; k < kSteps; ++k)
      multiply_step<kTransposed>(c, left[k], tile, k * F::kDepth, kTile, kLower ? k * F::kDepth : 0);
  }

  __device__ __forceinline__ void chain() const {
    Reader keys(shared, 0, kKeyStages<kKeyDim>);
    Reader others(shared, kKeyStages<kKeyDim>, args.stages - kKeyStages<kKeyDim>);
    Rows64 S[kKeys];
    load_state(S, in.initial_state);
    Values values = values_of(in.v, 0, 0);
    typename Values::Held held;
    values.fetch(held);
#pragma unroll 1
    for (int chunk = 0; chunk < place.chunks; ++chunk) {
      const Element *k[kKeys], *z[1];
      Left left[kKeys][kSteps];
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) left_of(left[block], S[block]);
      Rows64 R, X;
      R.clear();
      keys.acquire(k, kKeys);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply<true>(R, left[block], k[block]);
      begin_handing(handed.S_barriers, chunk);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) {
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step) put(handed.S[block * kSteps + step], left[block][step]);
      }
      end_handing(handed.S_barriers);
      values.read(X, held);
      values.next_chunk();
      values.fetch(held);
      Base::template for_tokens<Factor::kRead>(
          chunk, R, [&](int m, int i, float e) { R.tile[0][m][i] = X.tile[0][m][i] - e * R.tile[0][m][i]; });
      Base::template scale_tokens<Factor::kBeta>(X, R, chunk);
      Left operand[kSteps];
      left_of(operand, X);
      others.skip(kKeys);
      others.acquire(z, 1);
      multiply<true, true>(R, operand, z[0]);
      others.release(1);
      others.skip(1);
      const float decay = shared.decay[chunk % kWalkRows][0];
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) {
        CUTE_UNROLL
        for (int m = 0; m < 8; ++m) {
          CUTE_UNROLL
          for (float& x : S[block].tile[0][m]) x *= decay;
        }
      }
      Base::template scale_tokens<Factor::kBeta>(R, R, chunk);  // V'
      begin_handing(handed.V_barriers, chunk);
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step) put(handed.V[step], F::left(R, 0, step * F::kDepth));
      end_handing(handed.V_barriers);
      Base::template scale_tokens<Factor::kWrite>(R, R, chunk);
      left_of(operand, R);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply<false>(S[block], operand, k[block]);
      keys.release(kKeys);
    }
    store_state(S, args.final_state, chain_index());
  }

  // The factors of a chunk are in shared memory as long as its V' is not taken.
  __device__ __forceinline__ void ask() const {
    Reader others(shared, kKeyStages<kKeyDim>, args.stages - kKeyStages<kKeyDim>);
    Values out = tokens_of(args.o, 0);
#pragma unroll 1
    for (int chunk = 0; chunk < place.chunks; ++chunk, out.next_chunk()) {
      const Element *q[kKeys], *p[1];
      Rows64 O;
      O.clear();
      Left left[kKeys * kSteps], operand[kSteps];
      take(left, handed.S, handed.S_barriers, chunk);
      others.acquire(q, kKeys);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply<true>(O, left + block * kSteps, q[block]);
      others.release(kKeys);
      others.skip(1);
      Base::template scale_tokens<Factor::kAsk>(O, O, chunk);
      take(operand, handed.V, handed.V_barriers, chunk);
      others.acquire(p, 1);
      multiply<true, true>(O, operand, p[0]);
      others.release(1);
      out.write(O);
    }
  }

  __device__ __forceinline__ void run() const {
    if (kHasLow<Element> && has_hard_chunk()) return;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x == 0) shared.init(kValueWarps);
    if (warp < kValueWarps && lane == 0) handed.init();
    __syncthreads();
    if (warp < kValueWarps) return chain();
    if (warp < 2 * kValueWarps) return ask();
    TileFiller<Element, kKeyDim> filler(shared, args, place, args.stages);
    if (warp == 2 * kValueWarps) return filler.template forward_in_place<Brings::kKeys>();
    if (warp == 2 * kValueWarps + 1) return filler.template forward_in_place<Brings::kQueries>();
    filler.template forward_in_place<Brings::kRest>();
  }
};

template <class Element, int kKeyDim>
constexpr bool kHasInPlaceWalk = !kIsWide<Element> && kKeyDim <= 128;

template <class Element, int kKeyDim, int kValueWarps>
__global__ void __launch_bounds__(32 * WalkInPlace<Element, kKeyDim, kValueWarps>::kWarps, 1)
    walk_in_place_kernel(const __grid_constant__ WalkSm80Args args) {
  WalkInPlace<Element, kKeyDim, kValueWarps>(
      args, *reinterpret_cast<WalkShared<Element, kKeyDim>*>(portable_shared))
      .run();
}

}  // namespace nearfield::delta
