// The serial walk over the chunks of a sequence. A warp keeps S^T of 16 values in float32 registers, and
// every product leaves the tensor cores in the layout in which it is the next one's left operand:
//   R^T = V^T - S^T Kh^T     r^T = R^T + (beta R)^T Z^T     V' = beta r
//   O^T = S^T Qh^T + V'^T P^T     S^T <- e^{G_C} S^T + V'^T Kt
// and back, with dS^T in the place of S^T:
//   Y^T = dO^T P + dS^T Kt^T, then += (beta Y)^T Z     dR = beta Y
//   dS^T <- e^{G_C} dS^T + dO^T Qh - dR^T Kh
// The right operands are 64 x 64 tiles, which a ring in shared memory brings in the order of their use. In a
// hard chunk, products with Kh, P and Kt take both halves of both operands.
#pragma once

#include "delta/tile_sm80.cuh"

namespace nearfield::delta {

template <class Element>
constexpr int kWalkStages = kIsWide<Element> ? 4 : 6;
constexpr int kWalkRows = 4;  // chunks whose beta and decay are in shared memory

template <class Element, int kKeyDim>
struct WalkShared {
  static constexpr int kOutRow = 16 + Piece<Element>::kCount;
  alignas(16) Element tile[kWalkStages<Element>][kTileShared<Element>];
  alignas(16) Element out[4][kTile * kOutRow];   // [token][value] of each warp
  alignas(16) float beta[kWalkRows][kTile + 4];  // and whether the chunk is hard
  alignas(16) float decay[kWalkRows][kKeyDim];
};

// The tiles of a chunk in the order of their use: the i-th of them, and how many there are. Forward: V, then
// Kh, Z, Qh, P, Kt, which lie in this order; without output Qh and P are left out. In a hard chunk a tile's
// low half follows it.
template <class Element, int kKeyDim, bool kLow_>
struct ForwardOrder {
  static constexpr ChunkTiles tiles{kKeyDim, 0, kIsWide<Element>, kHasLow<Element>};
  int values;  // this CTA's tile of V
  bool with_output;
  static constexpr bool kLow = kLow_;
  __device__ __forceinline__ int count(bool hard) const {
    const int keys = tiles.keys * (hard ? 2 : 1), output = with_output ? tiles.keys + (hard ? 2 : 1) : 0;
    return 1 + 2 * keys + tiles.parts + output;
  }
  __device__ __forceinline__ int operator()(int i, bool hard) const {
    if (i-- == 0) return values;
    if (!hard) return with_output || i < tiles.keys + tiles.parts ? i : i + tiles.keys + 1;
    const int keys = 2 * tiles.keys;
    if (i < keys) return (i % 2 ? tiles.Kh_low() : tiles.Kh()) + i / 2;
    if ((i -= keys) < tiles.parts) return tiles.Z() + i;
    i -= tiles.parts;
    if (with_output) {
      if (i < tiles.keys) return tiles.Qh() + i;
      if ((i -= tiles.keys) < 2) return i ? tiles.P_low() : tiles.P();
      i -= 2;
    }
    return (i % 2 ? tiles.Kt_low() : tiles.Kt()) + i / 2;
  }
};

// And back: dO, P, Kt, Z, Qh, Kh.
template <class Element, int kKeyDim>
struct BackwardOrder {
  static constexpr ChunkTiles tiles{kKeyDim, 0, kIsWide<Element>, kHasLow<Element>};
  int values;  // this CTA's tile of dO
  static constexpr bool kLow = false;
  __device__ __forceinline__ int first_Z() const { return 2 + tiles.keys; }
  __device__ __forceinline__ int first_Qh() const { return first_Z() + tiles.parts; }
  __device__ __forceinline__ int first_Kh() const { return first_Qh() + tiles.keys; }
  __device__ __forceinline__ int count(bool) const { return first_Kh() + tiles.keys; }
  __device__ __forceinline__ int operator()(int i, bool) const {
    if (i == 0) return values;
    if (i < first_Z()) return tiles.P() + i - 1;
    if (i < first_Qh()) return tiles.Z() + i - first_Z();
    return i < first_Kh() ? tiles.Qh() + i - first_Qh() : i - first_Kh();
  }
};

template <class Element>
struct FirstChunk {  // where it is, and how far it is to the next
  const Element* tiles;
  const ChunkRowsSm80* rows;
  const float* decay;
  int64_t step;  // chunks in scratch
  int tiles_per_step;
};

// The tiles of all chunks of a walk, one after the other, and with the first of a chunk its beta and decay.
// Every thread copies its share.
template <class Element, int kKeyDim, class Order>
class TileStream {
 public:
  using Shared = WalkShared<Element, kKeyDim>;
  static constexpr bool kLow = Order::kLow;
  __device__ TileStream(Shared& shared, const Order& order, const FirstChunk<Element>& first, int chunks)
      : shared_(shared),
        order_(order),
        chunk_(first),
        left_(chunks),
        hard_(hardness(0)),
        next_hard_(hardness(1)) {
    for (int i = 0; i < kWalkStages<Element> - 1; ++i) load();
  }

  // The next tile. Only one at a time: the one before is overwritten.
  __device__ __forceinline__ const Element* next() {
    cute::cp_async_wait<kWalkStages<Element> - 2>();
    __syncthreads();
    const Element* tile = shared_.tile[read_];
    read_ = read_ + 1 == kWalkStages<Element> ? 0 : read_ + 1;
    load();
    return tile;
  }

 private:
  Shared& shared_;
  const Order order_;
  FirstChunk<Element> chunk_;
  int left_, in_chunk_ = 0, read_ = 0, write_ = 0, rows_ = 0;
  float hard_, next_hard_;  // looked at a chunk later: nobody waits for it

  // Of a chunk that is so many steps further.
  __device__ __forceinline__ float hardness(int steps) const {
    return kLow && steps < left_ ? chunk_.rows[steps * chunk_.step].hard : 0.f;
  }

  __device__ __forceinline__ static void copy_floats(float* to, const float* from, int count) {
    for (int i = 4 * static_cast<int>(threadIdx.x); i < count; i += 4 * static_cast<int>(blockDim.x))
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
          *reinterpret_cast<const cute::uint128_t*>(from + i), *reinterpret_cast<cute::uint128_t*>(to + i));
  }
  __device__ __forceinline__ void load() {
    if (left_ > 0) {
      const bool hard = kLow && hard_ != 0.f;
      copy_tile(shared_.tile[write_], chunk_.tiles + order_(in_chunk_, hard) * kTileElements,
                static_cast<int>(blockDim.x));
      if (in_chunk_ == 0) {
        static_assert(offsetof(ChunkRowsSm80, hard) == offsetof(ChunkRowsSm80, beta) + kTile * sizeof(float));
        copy_floats(shared_.beta[rows_ % kWalkRows], chunk_.rows->beta, kTile + 4);
        copy_floats(shared_.decay[rows_ % kWalkRows], chunk_.decay, kKeyDim);
        ++rows_;
      }
      if (++in_chunk_ == order_.count(hard)) {
        in_chunk_ = 0;
        chunk_.tiles += chunk_.step * chunk_.tiles_per_step * kTileElements;
        chunk_.rows += chunk_.step;
        chunk_.decay += chunk_.step * kKeyDim;
        --left_;
        hard_ = next_hard_;
        next_hard_ = hardness(1);
      }
    }
    cute::cp_async_fence();
    write_ = write_ + 1 == kWalkStages<Element> ? 0 : write_ + 1;
  }
};

// kLow: the forward walk of a sequence with hard chunks. Others have a walk without the choice at every
// product, which would keep the compiler from overlapping products.
template <class Element, int kKeyDim, bool kLow>
struct WalkCta {
  static constexpr int kKeys = kKeyDim / kTile;
  using Shared = WalkShared<Element, kKeyDim>;
  const WalkSm80Args& args;
  const InputsSm80& in;
  Shared& shared;
  const int64_t hv, n;
  const ChunkTiles tiles;
  int64_t b, begin, slot;  // of the first chunk
  int chunks, length;
  int warp, lane, value;  // value: the first of this warp's 16

  __device__ WalkCta(const WalkSm80Args& a, Shared& s)
      : args(a),
        in(a.in),
        shared(s),
        hv(blockIdx.y),
        n(blockIdx.z),
        tiles(a.in.key_dim, a.in.value_dim, kIsWide<Element>, kHasLow<Element>) {
    if (in.cu_seqlens != nullptr) {
      begin = in.cu_seqlens[n], slot = begin / kChunk + n, b = 0;
      length = static_cast<int>(max(static_cast<int64_t>(0), min(in.cu_seqlens[n + 1], in.tokens) - begin));
    } else {
      begin = 0, b = n, length = static_cast<int>(in.tokens);
      slot = n * ((in.tokens + kChunk - 1) / kChunk);
    }
    chunks = (length + kTile - 1) / kTile;
    lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    value = (static_cast<int>(blockIdx.x % value_tiles()) * args.value_warps + warp) * 16;
  }

  __device__ unsigned value_tiles() const { return gridDim.x / (args.backward ? 2 : 1); }
  __device__ int64_t chunk_index(int chunk) const { return (slot + chunk) * in.value_heads + hv; }
  __device__ int rows_of(int chunk) const { return min(kTile, length - chunk * kTile); }

  // ---- States ----

  __device__ int64_t chain() const { return n * in.value_heads + hv; }
  // In an array of states.
  __device__ int64_t state_at(int64_t state, int v, int c) const {
    return state * in.state_size() + (in.state_v_first ? v * in.key_dim + c : c * in.value_dim + v);
  }
  // f(value, key channel, element) over the elements that exist.
  template <class F>
  __device__ __forceinline__ void for_state(Rows64 (&S)[kKeys], const F& f) const {
    CUTE_UNROLL
    for (int block = 0; block < kKeys; ++block)
      for_each(S[block], [&](int row, int column, float& x) {
        const int v = value + row, c = block * kTile + column;
        if (v < in.value_dim && c < in.key_dim) f(v, c, x);
      });
  }
  __device__ void load_state(Rows64 (&S)[kKeys], const float* from) const {
    CUTE_UNROLL
    for (int block = 0; block < kKeys; ++block) S[block].clear();
    if (from != nullptr) for_state(S, [&](int v, int c, float& x) { x = from[state_at(chain(), v, c)]; });
  }
  __device__ void store_state(Rows64 (&S)[kKeys], float* to, int64_t state) const {
    if (to != nullptr) for_state(S, [&](int v, int c, float& x) { to[state_at(state, v, c)] = x; });
  }
  // The state after a chunk that ends a span.
  __device__ void keep_state(Rows64 (&S)[kKeys], int chunk) const {
    if (args.states == nullptr || (chunk + 1) % args.states_every != 0 || rows_of(chunk) < kTile) return;
    const int64_t span = kChunk * args.states_every;
    const int64_t entry = b * (in.tokens / span) + begin / span + (chunk + 1) / args.states_every - 1;
    store_state(S, args.states, entry * in.value_heads + hv);
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

  // ---- Rows of tokens, as columns of an accumulator ----

  // This warp's values of a tile [token][value].
  __device__ __forceinline__ void read_tokens(Rows64& x, const Element* tile) const {
    const Element* first = tile + value % kTile + lane / 4 + lane % 4 * 2 * kTileRow<Element>;
    CUTE_UNROLL
    for (int m = 0; m < 8; ++m) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i)
        x.tile[0][m][i] = static_cast<float>(first[(8 * m + i % 2) * kTileRow<Element> + i / 2 * 8]);
    }
  }
  // Token t goes to `to + t * stride`, `values` of this warp's 16 values.
  __device__ __forceinline__ void write_tokens(const Rows64& x, Element* to, int64_t stride, int rows,
                                               int values) const {
    constexpr int kRow = Shared::kOutRow, kPiece = Piece<Element>::kCount, kPieces = 16 / kPiece;
    Element* staged = shared.out[warp];
    Element* first = staged + lane / 4 + lane % 4 * 2 * kRow;
    __syncwarp();
    CUTE_UNROLL
    for (int m = 0; m < 8; ++m) {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) first[(8 * m + i % 2) * kRow + i / 2 * 8] = Element(x.tile[0][m][i]);
    }
    __syncwarp();
    const bool whole = values >= 16 && reinterpret_cast<uintptr_t>(to) % 16 == 0 && stride % kPiece == 0;
    if (whole) {
      CUTE_UNROLL
      for (int i = 0; i < kTile * kPieces / 32; ++i) {
        const int t = (lane + 32 * i) / kPieces, c = lane % kPieces * kPiece;
        if (t < rows)
          *reinterpret_cast<Piece<Element>*>(to + t * stride + c) =
              *reinterpret_cast<const Piece<Element>*>(staged + t * kRow + c);
      }
    } else {
      for (int i = lane; i < 16 * rows; i += 32)
        if (i % 16 < values) to[i / 16 * stride + i % 16] = staged[i / 16 * kRow + i % 16];
    }
  }
  // Into [B, T, HV, V].
  __device__ __forceinline__ void store_tokens(const Rows64& x, void* to, int chunk) const {
    const int64_t stride = in.value_heads * in.value_dim;
    const int64_t t = b * in.tokens + begin + chunk * kTile;
    write_tokens(x, static_cast<Element*>(to) + t * stride + hv * in.value_dim + value, stride,
                 rows_of(chunk), static_cast<int>(in.value_dim) - value);
  }
  // Into [token][value] tiles of scratch.
  __device__ __forceinline__ void store_token_tile(const Rows64& x, void* to, int chunk) const {
    const int64_t tile = chunk_index(chunk) * tiles.values + value / kTile;
    write_tokens(x, static_cast<Element*>(to) + tile * kTileElements + value % kTile, kTile, kTile, 16);
  }
  // Into [value][channel] tiles of scratch.
  __device__ __forceinline__ void store_state_tiles(const Rows64 (&S)[kKeys], void* to, int chunk) const {
    struct alignas(2 * sizeof(Element)) Pair {
      Element at[2];
    };
    const int64_t tile = (chunk_index(chunk) * tiles.values + value / kTile) * kKeys;
    Element* first =
        static_cast<Element*>(to) + tile * kTileElements + (value % kTile + lane / 4) * kTile + lane % 4 * 2;
    CUTE_UNROLL
    for (int block = 0; block < kKeys; ++block) {
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m) {
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float* x = &S[block].tile[0][m][2 * half];
          *reinterpret_cast<Pair*>(first + block * kTileElements + half * 8 * kTile + 8 * m) =
              Pair{{Element(x[0]), Element(x[1])}};
        }
      }
    }
  }
  __device__ __forceinline__ void scale_tokens(Rows64& to, const Rows64& from, int turn, float sign) const {
    const float* beta = shared.beta[turn % kWalkRows] + lane % 4 * 2;
    CUTE_UNROLL
    for (int m = 0; m < 8; ++m) {
      const float2 e = *reinterpret_cast<const float2*>(beta + 8 * m);
      const auto& x = from.tile[0][m];
      auto& y = to.tile[0][m];
      y[0] = sign * e.x * x[0], y[1] = sign * e.y * x[1], y[2] = sign * e.x * x[2], y[3] = sign * e.y * x[3];
    }
  }

  // ---- The walks ----

  __device__ FirstChunk<Element> first_chunk(int chunk, int direction) const {
    const int64_t index = chunk_index(chunk);
    const int total = tiles.total(args.scratch.backward);
    return {static_cast<const Element*>(args.scratch.tiles) + index * total * kTileElements,
            args.scratch.rows + index, args.scratch.decay + index * kKeyDim, direction * in.value_heads,
            total};
  }

  // c += left tile with the next tile; in a hard chunk with both halves of both.
  template <bool kTransposed, class Stream>
  __device__ __forceinline__ void multiply_next(Rows64& c, const Rows64& left, Stream& stream,
                                                bool hard) const {
    const Element* tile = stream.next();
    multiply_tile<kTransposed>(c, left, tile);
    if (!kLow || !hard) return;
    multiply_tile<kTransposed, Part::kLow>(c, left, tile);
    multiply_tile<kTransposed>(c, left, stream.next());
  }

  __device__ void forward(bool with_output) const {
    Rows64 S[kKeys];
    load_state(S, in.initial_state);
    using Order = ForwardOrder<Element, kKeyDim, kLow>;
    TileStream<Element, kKeyDim, Order> stream(shared, Order{tiles.V() + value / kTile, with_output},
                                               first_chunk(0, 1), chunks);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      Rows64 V, R;
      read_tokens(V, stream.next());
      const bool hard = kLow && shared.beta[chunk % kWalkRows][kTile] != 0.f;
      if (args.backward) store_state_tiles(S, args.left.S, chunk);
      R.clear();
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_next<true>(R, S[block], stream, hard);
      CUTE_UNROLL
      for (int m = 0; m < 8; ++m) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) R.tile[0][m][i] = V.tile[0][m][i] - R.tile[0][m][i];
      }
      scale_tokens(V, R, chunk, 1.f);
      multiply_tile<true, Part::kBoth>(R, V, stream.next());
      if constexpr (!kIsWide<Element>) multiply_tile<true>(R, V, stream.next());
      if (args.backward) store_token_tile(R, args.left.r, chunk);
      scale_tokens(V, R, chunk, 1.f);  // V'
      if (with_output) {
        R.clear();  // O
        CUTE_UNROLL
        for (int block = 0; block < kKeys; ++block) multiply_tile<true>(R, S[block], stream.next());
        multiply_next<true>(R, V, stream, hard);
        store_tokens(R, args.o, chunk);
      }
      decay_state(S, chunk);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_next<false>(S[block], V, stream, hard);
      keep_state(S, chunk);
    }
    store_state(S, args.final_state, chain());
  }

  __device__ void backward() const {
    Rows64 dS[kKeys];
    load_state(dS, args.d_final);
    using Order = BackwardOrder<Element, kKeyDim>;
    TileStream<Element, kKeyDim, Order> stream(shared, Order{tiles.dO() + value / kTile},
                                               first_chunk(chunks - 1, -1), chunks);
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      Rows64 d_o, Y, dR;
      const int turn = chunks - 1 - chunk;
      read_tokens(d_o, stream.next());
      store_state_tiles(dS, args.left.dS, chunk);
      Y.clear();
      multiply_tile<false>(Y, d_o, stream.next());
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_tile<true>(Y, dS[block], stream.next());
      scale_tokens(dR, Y, turn, 1.f);
      multiply_tile<false, Part::kBoth>(Y, dR, stream.next());
      if constexpr (!kIsWide<Element>) multiply_tile<false>(Y, dR, stream.next());
      store_token_tile(Y, args.left.Y, chunk);
      scale_tokens(dR, Y, turn, 1.f);
      store_tokens(dR, args.dv, chunk);
      scale_tokens(dR, Y, turn, -1.f);
      decay_state(dS, turn);
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_tile<false>(dS[block], d_o, stream.next());
      CUTE_UNROLL
      for (int block = 0; block < kKeys; ++block) multiply_tile<false>(dS[block], dR, stream.next());
    }
    store_state(dS, args.d_initial, chain());
  }

  __device__ bool has_hard_chunk() const {
    bool found = false;
    for (int chunk = static_cast<int>(threadIdx.x); chunk < chunks; chunk += static_cast<int>(blockDim.x))
      found |= args.scratch.rows[chunk_index(chunk)].hard != 0.f;
    return __syncthreads_or(found) != 0;
  }

  __device__ void run() const {
    if (args.backward && blockIdx.x >= value_tiles()) {
      if (!kLow) backward();
      return;
    }
    if (kHasLow<Element> && has_hard_chunk() != kLow) return;
    if (!args.backward) return forward(args.o != nullptr);
    forward(false);
  }
};

template <class Element, int kKeyDim, bool kLow>
__global__ void __launch_bounds__(128) walk_sm80_kernel(const __grid_constant__ WalkSm80Args args) {
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
    kernel<<<grid, 32 * args.value_warps, kBytes, static_cast<cudaStream_t>(stream)>>>(args);
    return static_cast<int>(cudaGetLastError());
  };
  if constexpr (kHasLow<Element>) {  // each sequence is walked by one of the two
    if (const int error = launch(&walk_sm80_kernel<Element, kKeyDim, true>)) return error;
  }
  return launch(&walk_sm80_kernel<Element, kKeyDim, false>);
}

}  // namespace nearfield::delta
