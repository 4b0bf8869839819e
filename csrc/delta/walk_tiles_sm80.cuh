// What a walk reads, tile by tile in the order of use, brought by a warp of its own through a ring in shared
// memory. q and k are read as they came where that is possible (ScratchSm80::raw), else from scratch.
#pragma once

#include "delta/tile_sm80.cuh"
#include "nearfield/copy_ring.cuh"

namespace nearfield::delta {

template <class Element>
constexpr int kWalkStages = kIsWide<Element> ? 5 : 10;  // with 99 KB
constexpr int kMostWalkStages = 16;
// Raw keys serve the first and the last product of a chunk, so they have stages of their own.
template <int kKeyDim>
constexpr int kKeyStages = kKeyDim == 64 ? 3 : 4;
constexpr int kWalkRows = 4;  // chunks whose factors are in shared memory: more than the keys are ahead

// Followed by the tiles of the ring.
template <class Element, int kKeyDim>
struct WalkShared {
  alignas(16) WalkFactors factors[kWalkRows];
  alignas(16) float decay[kWalkRows][kKeyDim];
  StageBarriers barriers[kMostWalkStages];

  __device__ void init(uint32_t reading_warps) {
    for (StageBarriers& b : barriers) b.init(reading_warps);
  }
  __device__ __forceinline__ Element* tile(int stage) {
    return reinterpret_cast<Element*>(this + 1) + stage * kTileShared<Element>;
  }
  static constexpr int bytes(int stages) {
    return static_cast<int>(sizeof(WalkShared)) +
           stages * kTileShared<Element> * static_cast<int>(sizeof(Element));
  }
};

template <class Element>
__device__ __forceinline__ ChunkTiles tiles_of_walk(const WalkSm80Args& args) {
  return {args.in.key_dim, args.in.value_dim, kIsWide<Element>, kHasLow<Element>, args.scratch.raw};
}

// The sequence that a CTA walks.
struct WalkPlace {
  int64_t hv, n, value_heads;
  int64_t b, begin, slot;  // of the first chunk
  int chunks, length;

  __device__ explicit WalkPlace(const InputsSm80& in)
      : hv(blockIdx.y), n(blockIdx.z), value_heads(in.value_heads) {
    if (in.cu_seqlens != nullptr) {
      begin = in.cu_seqlens[n], slot = begin / kChunk + n, b = 0;
      length = static_cast<int>(max(static_cast<int64_t>(0), min(in.cu_seqlens[n + 1], in.tokens) - begin));
    } else {
      begin = 0, b = n, length = static_cast<int>(in.tokens);
      slot = n * ((in.tokens + kChunk - 1) / kChunk);
    }
    chunks = (length + kTile - 1) / kTile;
  }
  __device__ int64_t index(int chunk) const { return (slot + chunk) * value_heads + hv; }  // in scratch
  __device__ int rows_from(int chunk) const { return length - chunk * kTile; }
  __device__ int rows_of(int chunk) const { return min(kTile, rows_from(chunk)); }
  __device__ int64_t token_of(int chunk) const { return begin + static_cast<int64_t>(chunk) * kTile; }
};

enum class Brings { kKeys, kQueries, kRest };  // what a warp that fills the ring brings of a chunk

// A warp that fills the ring.
template <class Element, int kKeyDim>
class TileFiller {
 public:
  using Shared = WalkShared<Element, kKeyDim>;
  static constexpr int kKeys = kKeyDim / kTile;

  __device__ TileFiller(Shared& shared, const WalkSm80Args& args, const WalkPlace& place, int stages)
      : shared_(shared),
        args_(args),
        place_(place),
        keys_(0, kKeyStages<kKeyDim>),
        others_(args.scratch.raw ? kKeyStages<kKeyDim> : 0,
                stages - (args.scratch.raw ? kKeyStages<kKeyDim> : 0)),
        tiles_(tiles_of_walk<Element>(args)) {}

  // Keys; queries if there is an output, Z, its rest in hard chunks and for the gradient, P; keys again
  // unless raw.
  template <bool kOutput, bool kLow>
  __device__ __forceinline__ void forward() {
    for (int chunk = 0; chunk < place_.chunks; ++chunk) {
      const bool hard = kLow && rows(chunk).factors.hard != 0.f;
      const bool low = hard && !args_.scratch.raw;
      first_ = chunk;
      if (args_.scratch.raw) {
        for (int block = 0; block < kKeys; ++block) raw(keys_, args_.in.k, chunk, block);
      } else {
        for (int block = 0; block < kKeys; ++block) {
          scratch(chunk, tiles_.Kh() + block);
          if (low) scratch(chunk, tiles_.Kh_low() + block);
        }
      }
      if constexpr (kOutput) {
        for (int block = 0; block < kKeys; ++block) {
          if (args_.scratch.raw) {
            raw(others_, args_.in.q, chunk, block);
          } else {
            scratch(chunk, tiles_.Qh() + block);
          }
        }
      }
      scratch(chunk, tiles_.Z());
      if (!kIsWide<Element> && (hard || !kOutput)) scratch(chunk, tiles_.Z() + 1);
      if constexpr (kOutput) {
        scratch(chunk, tiles_.P());
        if (hard) scratch(chunk, tiles_.P_low());
      }
      if (args_.scratch.raw) continue;
      for (int block = 0; block < kKeys; ++block) {
        scratch(chunk, tiles_.Kt() + block);
        if (low) scratch(chunk, tiles_.Kt_low() + block);
      }
    }
  }

  // One of the three that share the work where all is read in place and no chunk is hard.
  template <Brings kWhat>
  __device__ __forceinline__ void forward_in_place() {
#pragma unroll 1
    for (int chunk = 0; chunk < place_.chunks; ++chunk) {
      if constexpr (kWhat == Brings::kKeys) {
        first_ = chunk;
        for (int block = 0; block < kKeys; ++block) raw(keys_, args_.in.k, chunk, block);
      } else if constexpr (kWhat == Brings::kQueries) {
        for (int block = 0; block < kKeys; ++block) raw(others_, args_.in.q, chunk, block);
        others_.advance(), others_.advance();
      } else {
        for (int block = 0; block < kKeys; ++block) others_.advance();
        scratch(chunk, tiles_.Z());
        scratch(chunk, tiles_.P());
      }
    }
  }

  __device__ __forceinline__ void backward() {
    for (int chunk = place_.chunks - 1; chunk >= 0; --chunk) {
      first_ = chunk;
      scratch(chunk, tiles_.P());
      for (int block = 0; block < kKeys; ++block) scratch(chunk, tiles_.Kt() + block);
      for (int part = 0; part < tiles_.parts; ++part) scratch(chunk, tiles_.Z() + part);
      for (int block = 0; block < kKeys; ++block) scratch(chunk, tiles_.Qh() + block);
      for (int block = 0; block < kKeys; ++block) scratch(chunk, tiles_.Kh() + block);
    }
  }

 private:
  static constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece, kRowStep = 32 / kPieces;
  Shared& shared_;
  const WalkSm80Args& args_;
  const WalkPlace& place_;
  RingCursor keys_, others_;
  const ChunkTiles tiles_;
  int first_ = -1;  // the chunk whose factors come with the next tile
  int rows_ = 0;

  __device__ const ChunkRowsSm80& rows(int chunk) const { return args_.scratch.rows[place_.index(chunk)]; }

  __device__ __forceinline__ void raw(RingCursor& ring, const Rows<void>& from, int chunk, int block) {
    const InputsSm80& in = args_.in;
    const Element* first =
        row_at<Element>(from, place_.b, place_.token_of(chunk), place_.hv / (in.value_heads / in.heads));
    fill(ring, first + block * kTile, from.token, place_.rows_of(chunk),
         static_cast<int>(in.key_dim) - block * kTile);
  }
  __device__ __forceinline__ void scratch(int chunk, int tile) {
    const Element* tiles = static_cast<const Element*>(args_.scratch.tiles);
    fill(others_, tiles + (place_.index(chunk) * tiles_.total(args_.scratch.backward) + tile) * kTileElements,
         kTile, kTile, kTile);
  }

  // The next stage: rows of `features` elements, `stride` apart; zeros past the rows and the features.
  __device__ __forceinline__ void fill(RingCursor& ring, const Element* first, int64_t stride, int rows,
                                       int features) {
    StageBarriers& barriers = shared_.barriers[ring.stage()];
    barriers.empty.wait(ring.parity() ^ 1);
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / kPieces,
              column = lane % kPieces * kPiece;
    const Element* from = first + row * stride + column;
    Element* to = shared_.tile(ring.stage()) + row * kTileRow<Element> + column;
    const int64_t step = kRowStep * stride;
    const int last = column < features ? rows : 0;
#pragma unroll 16
    for (int i = 0; i < kTile; i += kRowStep, from += step, to += kRowStep * kTileRow<Element>)
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<const cute::uint128_t*>(from), *reinterpret_cast<cute::uint128_t*>(to),
          row + i < last);
    if (first_ >= 0) copy_factors(first_);
    first_ = -1;
    barriers.full.arrive_when_copied();
    ring.advance();
  }
  __device__ __forceinline__ void copy_factors(int chunk) {
    copy_floats(&shared_.factors[rows_], &rows(chunk).factors, sizeof(WalkFactors) / 4);
    copy_floats(shared_.decay[rows_], args_.scratch.decay + place_.index(chunk) * kKeyDim, kKeyDim);
    rows_ = (rows_ + 1) % kWalkRows;
  }
  __device__ __forceinline__ static void copy_floats(void* to, const void* from, int count) {
    for (int i = 4 * (static_cast<int>(threadIdx.x) % 32); i < count; i += 128)
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
          *reinterpret_cast<const cute::uint128_t*>(static_cast<const float*>(from) + i),
          *reinterpret_cast<cute::uint128_t*>(static_cast<float*>(to) + i));
  }
};

// A warp that reads. Tiles are acquired in groups and released in the same order.
template <class Element, int kKeyDim>
class TileReader {
 public:
  using Shared = WalkShared<Element, kKeyDim>;
  __device__ TileReader(Shared& shared, int first, int count)
      : shared_(shared), acquired_(first, count), released_(first, count) {}

  // The next tiles; the last to arrive is the last of them.
  template <int kMost>
  __device__ __forceinline__ void acquire(const Element* (&tiles)[kMost], int count) {
    RingCursor last = acquired_;
    CUTE_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= count) continue;
      tiles[i] = shared_.tile(acquired_.stage());
      last = acquired_;
      acquired_.advance();
    }
    shared_.barriers[last.stage()].full.wait(last.parity());
  }
  // Tiles that other warps read.
  __device__ __forceinline__ void skip(int count) {
    for (int i = 0; i < count; ++i) acquired_.advance(), released_.advance();
  }
  __device__ __forceinline__ void release(int count) {
    __syncwarp();
    for (int i = 0; i < count; ++i) {
      if (threadIdx.x % 32 == 0) shared_.barriers[released_.stage()].empty.arrive();
      released_.advance();
    }
  }

 private:
  Shared& shared_;
  RingCursor acquired_, released_;
};

}  // namespace nearfield::delta
