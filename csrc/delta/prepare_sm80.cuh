// Everything of a chunk that does not depend on the state, one CTA per slot and value head. K is walked in
// blocks of 64 features, so the kernel fits any K. Per block: rows come to shared memory as they are, give
// their share of K K^T and Q K^T, and leave as Kh, Qh and Kt unless the walk reads q and k in place. Then Z
// by substitution in float32. A chunk that turns out to be hard goes through its features once more, for the
// low halves.
#pragma once

#include "delta/tile_sm80.cuh"

namespace nearfield::delta {

constexpr int kColumnSm80 = 68;   // floats in a column of A diag(beta): a warp's stores in different banks
constexpr int kGateRowSm80 = 65;  // floats in a row of gates: rows of a column in different banks
constexpr int kPairsPerLane = 5;  // of the 136 pairs of a diagonal 16 x 16 block

template <class Element, bool kChannelGate>
struct PrepareShared {
  ChunkRowsSm80 rows;
  double gate[kChunk];
  float G_high[kChunk], G_low[kChunk];  // of rows.G: a difference of sums in float32 loses nothing
  float squares[kTileThreads / 32];
  struct Features {
    static constexpr int kBlocks = kChannelGate ? 1 : 2;  // of 64 features at a time
    alignas(16) Element k[kBlocks][kTileShared<Element>], q[kBlocks][kTileShared<Element>];
    float G[kChannelGate ? kTile * kGateRowSm80 : 1];
    // Of warps 1 to 3: their rows of k and q and 16 earlier rows of k, decayed from or to their first row.
    alignas(16) Element near[kChannelGate ? 3 * 3 * 16 * kTileRow<Element> : 8];
  };
  struct Solve {
    float A[kTile * kColumnSm80];  // [j][i]: Abar_ij beta_j
    float Z[kTile * kTile];        // [i][j]: Abar, then Z
  };
  union {
    Features features;
    Solve solve;
  };
};

// Z = -(I + Abar diag(beta))^-1 Abar, thread j its column j:
//   z_i = -Abar_ij - sum_{m < i} Abar_im beta_m z_m.
template <class Solve>
__device__ __forceinline__ void solve_column(Solve& s, int j) {
#pragma unroll 1
  for (int first = 0; first < kTile; first += 16) {
    float z[16];
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) z[i] = -s.Z[(first + i) * kTile + j];
    const auto subtract = [&](int m, float zm, int from) {
      CUTE_UNROLL
      for (int i4 = 0; i4 < 16; i4 += 4) {
        if (i4 + 3 < from) continue;
        const float4 a = *reinterpret_cast<const float4*>(&s.A[m * kColumnSm80 + first + i4]);
        const float column[4] = {a.x, a.y, a.z, a.w};
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i)
          if (i4 + i >= from) z[i4 + i] -= column[i] * zm;
      }
    };
#pragma unroll 4
    for (int m = 0; m < first; ++m) subtract(m, s.Z[m * kTile + j], 0);
    CUTE_UNROLL
    for (int m = 0; m < 16; ++m) subtract(first + m, z[m], m + 1);
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) s.Z[(first + i) * kTile + j] = z[i];
  }
}

// x rounded, or what that lost, rounded.
template <bool kLow, class Element>
__device__ __forceinline__ Element half_of(float x) {
  const Element high(x);
  return kLow ? Element(x - static_cast<float>(high)) : high;
}

template <class Element, bool kChannelGate>
struct PrepareCta {
  using Shared = PrepareShared<Element, kChannelGate>;
  const PrepareSm80Args& args;
  const InputsSm80& in;
  Shared& shared;
  const ChunkPlace place;
  const int64_t hv, chunk;  // chunk: index in the arrays of scratch
  const ChunkTiles tiles;
  const int warp, lane;

  __device__ PrepareCta(const PrepareSm80Args& a, Shared& s)
      : args(a),
        in(a.in),
        shared(s),
        place(find_chunk(a.in, blockIdx.x)),
        hv(blockIdx.y),
        chunk(static_cast<int64_t>(blockIdx.x) * a.in.value_heads + blockIdx.y),
        tiles(a.in.key_dim, a.in.value_dim, kIsWide<Element>, kHasLow<Element>, a.scratch.raw),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ Element* tile(int index) const {
    return static_cast<Element*>(args.scratch.tiles) +
           (chunk * tiles.total(args.scratch.backward) + index) * kTileElements;
  }
  __device__ int64_t head() const { return hv / (in.value_heads / in.heads); }

  // Two lanes per row.
  __device__ float norm_of(const Rows<void>& from, int row) const {
    constexpr int kPiece = Piece<Element>::kCount;
    float sum = 0.f;
    if (row < place.rows) {
      const Element* first = row_at<Element>(from, place.b, place.t + row, head());
      const auto add = [&](const Element& e) {
        const float x = static_cast<float>(e);
        sum += x * x;
      };
      const int K = static_cast<int>(in.key_dim), half = threadIdx.x % 2;
      if (reinterpret_cast<uintptr_t>(first) % 16 == 0 && K % kPiece == 0) {
#pragma unroll 4
        for (int c = half * kPiece; c < K; c += 2 * kPiece) {
          const auto piece = *reinterpret_cast<const cute::uint128_t*>(first + c);  // one load
          for (const Element& e : reinterpret_cast<const Piece<Element>&>(piece).at) add(e);
        }
      } else {
        for (int c = half; c < K; c += 2) add(first[c]);
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return 1.f / sqrtf(sum + static_cast<float>(kNormEps));
  }

  // Norms, write strengths, and the sums of a gate per head.
  __device__ void prepare_rows() {
    static_assert(kTileThreads == 2 * kChunk);
    auto& rows = shared.rows;
    const int row = static_cast<int>(threadIdx.x) / 2, i = static_cast<int>(threadIdx.x);
    if (i < kTile) {
      const int64_t at = (place.b * in.tokens + place.t + i) * in.value_heads + hv;
      const bool inside = i < place.rows;
      rows.factors.first[i].beta = inside ? beta_of(in, in.beta[at]) : 0.f;
      const bool has_gate = !kChannelGate && in.gated && inside;
      shared.gate[i] = has_gate ? static_cast<double>(gate_of(in, in.g[at], hv, 0)) : 0.0;
    }
    const float q_norm = in.qk_l2norm ? norm_of(in.q, row) : 1.f,
                k_norm = in.qk_l2norm ? norm_of(in.k, row) : 1.f;
    if (i % 2 == 0) rows.q_norm[row] = q_norm, rows.k_norm[row] = k_norm;
    __syncthreads();
    if (warp == 0) {  // a lane has two tokens
      const double first = shared.gate[2 * lane], both = first + shared.gate[2 * lane + 1];
      double sum = both;
      CUTE_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
      }
      rows.G[2 * lane] = sum - both + first, rows.G[2 * lane + 1] = sum;
    }
    __syncthreads();
    if (i < kTile) {
      shared.G_high[i] = static_cast<float>(rows.G[i]);
      shared.G_low[i] = static_cast<float>(rows.G[i] - static_cast<double>(shared.G_high[i]));
    }
    __syncthreads();
    if (i < kTile) {
      const bool raw = args.scratch.raw;
      const float read = exp2f(shared.G_high[i]), write = exp2f(gap(kTile - 1, i));
      rows.factors.first[i].read = raw ? rows.k_norm[i] * read : 1.f;
      rows.factors.second[i].ask = raw ? rows.q_norm[i] * static_cast<float>(in.scale) * read : 1.f;
      rows.factors.second[i].write = raw ? rows.k_norm[i] * write : 1.f;
      const int64_t padded = static_cast<int64_t>(tiles.keys) * kTile;
      if (raw)
        for (int c = i; c < padded; c += kTile)
          args.scratch.decay[chunk * padded + c] = exp2f(shared.G_high[kTile - 1]);
    }
  }
  // G_i - G_j
  __device__ __forceinline__ float gap(int i, int j) const {
    return shared.G_high[i] - shared.G_high[j] + (shared.G_low[i] - shared.G_low[j]);
  }

  // The sums of a gate per channel for features [first, first + 64).
  __device__ void sum_channel_gates(int first) {
    float* G = shared.features.G;
    const int c = static_cast<int>(threadIdx.x);
    if (c >= kTile) return;
    const bool inside = first + c < in.key_dim;
    const float* g = in.g + ((place.b * in.tokens + place.t) * in.value_heads + hv) * in.key_dim + first + c;
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < kTile; ++i) {
      if (inside && i < place.rows) sum += gate_of(in, g[i * in.value_heads * in.key_dim], hv, first + c);
      G[i * kGateRowSm80 + c] = sum;
    }
  }

  // e^{G_i}, or e^{G_C - G_i}
  __device__ float decay_of(int i, int c, bool to_end) const {
    if constexpr (kChannelGate) {
      const float* G = shared.features.G;
      const float here = G[i * kGateRowSm80 + c];
      return exp2f(to_end ? G[(kTile - 1) * kGateRowSm80 + c] - here : here);
    } else {
      return exp2f(to_end ? gap(kTile - 1, i) : shared.G_high[i]);
    }
  }

  // Kh, Qh, Kt of 64 features, and the decay across the chunk; or the low halves of Kh and Kt.
  template <bool kLow>
  __device__ __forceinline__ void emit_features(int block, int held) {
    constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece;
    const auto& f = shared.features;
    for (int at = threadIdx.x; at < kTile * kPieces; at += kTileThreads) {
      const int i = at / kPieces, first = at % kPieces * kPiece;
      const float k_norm = shared.rows.k_norm[i];
      const float q_norm = shared.rows.q_norm[i] * static_cast<float>(in.scale);
      const auto k = *reinterpret_cast<const Piece<Element>*>(&f.k[held][i * kTileRow<Element> + first]);
      const auto q = *reinterpret_cast<const Piece<Element>*>(&f.q[held][i * kTileRow<Element> + first]);
      Piece<Element> Kh, Qh, Kt;
      float read = 0.f, write = 0.f;
      CUTE_UNROLL
      for (int c = 0; c < kPiece; ++c) {
        if (kChannelGate || c == 0)
          read = decay_of(i, first + c, false), write = decay_of(i, first + c, true);
        const float x = static_cast<float>(k.at[c]) * k_norm;
        Kh.at[c] = half_of<kLow, Element>(x * read);
        Kt.at[c] = half_of<kLow, Element>(x * write);
        Qh.at[c] = Element(static_cast<float>(q.at[c]) * q_norm * read);
      }
      const auto store = [&](int index, const Piece<Element>& piece) {
        *reinterpret_cast<Piece<Element>*>(tile(index + block) + at * kPiece) = piece;
      };
      store(kLow ? tiles.Kh_low() : tiles.Kh(), Kh);
      store(kLow ? tiles.Kt_low() : tiles.Kt(), Kt);
      if (!kLow) store(tiles.Qh(), Qh);
    }
    if constexpr (kLow) return;
    const int64_t padded = static_cast<int64_t>(tiles.keys) * kTile;
    if (threadIdx.x < kTile)
      args.scratch.decay[chunk * padded + block * kTile + threadIdx.x] =
          decay_of(kTile - 1, threadIdx.x, false);
    if constexpr (kChannelGate) {
      for (int x = threadIdx.x; x < kTile * kTile; x += kTileThreads)
        args.scratch.G[(chunk * kTile + x / kTile) * padded + block * kTile + x % kTile] =
            f.G[x / kTile * kGateRowSm80 + x % kTile];
    }
  }

  // With a gate per channel, rows of the warp's block of 16 against earlier blocks: both are decayed to the
  // block's first row, so that no exponent is positive.
  __device__ void multiply_earlier(Rows64& A, Rows64& P) {
    using F = TileFragments<Element>;
    if (warp == 0) return;
    auto& f = shared.features;
    Element* k_rows = &f.near[(warp - 1) * 3 * 16 * kTileRow<Element>];
    Element *q_rows = k_rows + 16 * kTileRow<Element>, *earlier = q_rows + 16 * kTileRow<Element>;
    const float* first = &f.G[16 * warp * kGateRowSm80];
    for (int x = lane; x < 16 * kTile; x += 32) {
      const int i = x / kTile, c = x % kTile, row = 16 * warp + i;
      const float decay = exp2f(first[i * kGateRowSm80 + c] - first[c]);
      const int from = row * kTileRow<Element> + c, to = i * kTileRow<Element> + c;
      k_rows[to] = Element(static_cast<float>(f.k[0][from]) * shared.rows.k_norm[row] * decay);
      q_rows[to] = Element(static_cast<float>(f.q[0][from]) * shared.rows.q_norm[row] * decay);
    }
    CUTE_UNROLL
    for (int block = 0; block < 3; ++block) {
      if (block >= warp) continue;
      for (int x = lane; x < 16 * kTile; x += 32) {
        const int c = x % kTile, row = 16 * block + x / kTile;
        const float decay = exp2f(first[c] - f.G[row * kGateRowSm80 + c]);
        earlier[x / kTile * kTileRow<Element> + c] = Element(
            static_cast<float>(f.k[0][row * kTileRow<Element> + c]) * shared.rows.k_norm[row] * decay);
      }
      __syncwarp();
      Accumulator<1, 16> a, p;
      a.clear(), p.clear();
      CUTE_UNROLL
      for (int k = 0; k < kTile; k += F::kDepth) {
        multiply_step<true>(a, F::left(k_rows + k, kTileRow<Element>), earlier, k);
        multiply_step<true>(p, F::left(q_rows + k, kTileRow<Element>), earlier, k);
      }
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          A.tile[0][2 * block + n][i] += a.tile[0][n][i];
          P.tile[0][2 * block + n][i] += p.tile[0][n][i];
        }
      }
      __syncwarp();
    }
  }

  // Pair `x` of the lower triangle of a block of 16.
  __device__ static void pair_of(int x, int& i, int& j) {
    i = 0;
    while ((i + 1) * (i + 2) / 2 <= x) ++i;
    j = x - i * (i + 1) / 2;
  }

  // The pairs inside the warp's block, one by one.
  __device__ void multiply_pairs(float (&a)[kPairsPerLane], float (&p)[kPairsPerLane]) {
    const auto& f = shared.features;
    CUTE_UNROLL
    for (int n = 0; n < kPairsPerLane; ++n) {
      if (lane + 32 * n >= 136) continue;
      int i, j;
      pair_of(lane + 32 * n, i, j);
      i += 16 * warp, j += 16 * warp;
#pragma unroll 4
      for (int c0 = 0; c0 < kTile; ++c0) {
        const int c = (c0 + lane) % kTile;
        const float decay = exp2f(f.G[i * kGateRowSm80 + c] - f.G[j * kGateRowSm80 + c]);
        const float source = static_cast<float>(f.k[0][j * kTileRow<Element> + c]) * decay;
        a[n] += static_cast<float>(f.k[0][i * kTileRow<Element> + c]) * source;
        p[n] += static_cast<float>(f.q[0][i * kTileRow<Element> + c]) * source;
      }
    }
  }

  // Abar_ij goes where the substitution reads it.
  __device__ void keep_pair(int i, int j, float a) {
    shared.solve.Z[i * kTile + j] = a;
    shared.solve.A[j * kColumnSm80 + i] = a * shared.rows.beta(j);
  }

  // Z, and the sum of squares of N = diag(beta) Z; or what rounding Z lost.
  template <bool kLow>
  __device__ float emit_Z() {
    constexpr int kPiece = Piece<Element>::kCount;
    Element* out = tile(tiles.Z()) + (kLow ? kTileElements : 0);
    float sum = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < kTile * kTile / kPiece / kTileThreads; ++i) {
      const int first = kPiece * (static_cast<int>(threadIdx.x) + i * kTileThreads);
      const float beta = shared.rows.beta(first / kTile);
      Piece<Element> piece;
      CUTE_UNROLL
      for (int c = 0; c < kPiece; ++c) {
        const float z = shared.solve.Z[first + c];
        piece.at[c] = half_of<kLow, Element>(z);
        sum += beta * z * (beta * z);
      }
      *reinterpret_cast<Piece<Element>*>(out + first) = piece;
    }
    return sum;
  }

  // V or dO, padded with zeros.
  __device__ void copy_values(const Rows<void>& from, int index) {
    const bool given = from.data != nullptr;
    const Element* first = given ? row_at<Element>(from, place.b, place.t, hv) : nullptr;
    for (int block = 0; block < tiles.values; ++block)
      copy_rows<kTile>(tile(index + block), first + block * kTile, from.token, given ? place.rows : 0,
                       static_cast<int>(in.value_dim) - block * kTile);
  }

  // Two neighbors of a row, as one access.
  __device__ __forceinline__ static void store_pair(Element* to, float x, float y) {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    using Word = std::conditional_t<kIsWide<Element>, uint64_t, uint32_t>;
    const auto pair = convert(cutlass::Array<float, 2>{x, y});
    *reinterpret_cast<Word*>(to) = reinterpret_cast<const Word&>(pair);
  }
  // x_ij with the decay from j to i and both norms, zero above the diagonal; f(i, first j, the values of two
  // j) for what this lane holds of the warp's 16 rows. With a gate per channel x is all of it already.
  template <class F>
  __device__ __forceinline__ void for_pairs(const Rows64& x, const float* row_norm, const F& f) const {
    const auto two = [](const float* from) { return *reinterpret_cast<const float2*>(from); };
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int j = 8 * n + lane % 4 * 2;
      float2 high, low, norm;
      const bool decays = !kChannelGate && n < 2 * (warp + 1);
      if (decays)
        high = two(shared.G_high + j), low = two(shared.G_low + j), norm = two(shared.rows.k_norm + j);
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * warp + lane / 4 + 8 * half;
        float2 value{x.tile[0][n][2 * half], x.tile[0][n][2 * half + 1]};
        if (decays) {
          const float row_high = shared.G_high[i], row_low = shared.G_low[i], scale = row_norm[i];
          value.x = i >= j ? value.x * (exp2f(row_high - high.x + (row_low - low.x)) * norm.x) * scale : 0.f;
          value.y = i > j ? value.y * (exp2f(row_high - high.y + (row_low - low.y)) * norm.y) * scale : 0.f;
        }
        f(i, j, value);
      }
    }
  }
  // P scaled and rounded, or the low half of that.
  template <bool kLow>
  __device__ __forceinline__ void emit_P(const Rows64& P) const {
    Element* to = tile(kLow ? tiles.P_low() : tiles.P());
    const float scale = static_cast<float>(in.scale);
    for_pairs(P, shared.rows.q_norm, [&](int i, int j, float2 p) {
      p.x *= scale, p.y *= scale;
      if constexpr (kLow) {
        p.x -= static_cast<float>(Element(p.x)), p.y -= static_cast<float>(Element(p.y));
      }
      store_pair(to + i * kTile + j, p.x, p.y);
    });
  }
  // Abar, for the substitution and for the gradient.
  __device__ __forceinline__ void emit_A(const Rows64& A) {
    Element* to = tile(tiles.Abar());
    const bool raw = args.scratch.raw;
    for_pairs(A, shared.rows.k_norm, [&](int i, int j, float2 a) {
      if (i == j) a.x = 0.f;
      if (i == j + 1) a.y = 0.f;
      keep_pair(i, j, a.x), keep_pair(i, j + 1, a.y);
      if (!raw) store_pair(to + i * kTile + j, a.x, a.y);
    });
  }

  // ---- A gate per head ----

  // Starts bringing features from block `first` on.
  __device__ void bring(int first) {
    constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece;
    auto& f = shared.features;
    const auto copy = [&](Element* to, const Rows<void>& from, int block) {
      const Element* rows = row_at<Element>(from, place.b, place.t, head()) + block * kTile;
      const int features = static_cast<int>(in.key_dim) - block * kTile;
      if (reinterpret_cast<uintptr_t>(rows) % 16 == 0 && from.token % kPiece == 0 && features % kPiece == 0) {
        const int row = static_cast<int>(threadIdx.x) / kPieces,
                  column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
        CUTE_UNROLL
        for (int i = 0; i < kTile; i += kTileThreads / kPieces)
          cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
              *reinterpret_cast<const cute::uint128_t*>(rows + (row + i) * from.token + column),
              *reinterpret_cast<cute::uint128_t*>(to + (row + i) * kTileRow<Element> + column),
              row + i < place.rows && column < features);
      } else {
        load_rows(to, rows, from.token, place.rows, features);
      }
    };
    for (int i = 0; i < f.kBlocks && first + i < tiles.keys; ++i)
      copy(f.k[i], in.k, first + i), copy(f.q[i], in.q, first + i);
    cute::cp_async_fence();
  }
  // f(block, where it is held) for all blocks, kBlocks at a time; `held` says which are in shared memory.
  template <class F>
  __device__ __forceinline__ void for_blocks(int& held, const F& f) {
    constexpr int kBlocks = PrepareShared<Element, kChannelGate>::Features::kBlocks;
    for (int first = 0; first < tiles.keys; first += kBlocks) {
      if (held != first) {
        __syncthreads();
        bring(first);
        held = first;
      }
      cute::cp_async_wait<0>();
      __syncthreads();
      for (int i = 0; i < kBlocks && first + i < tiles.keys; ++i) f(first + i, i);
    }
  }
  // Abar, P and what the walks read of the features; or the low halves of P, Kh and Kt.
  template <bool kLow>
  __device__ __forceinline__ void emit_head_products(int held) {
    const auto& f = shared.features;
    const int columns = 16 * (warp + 1);  // the others are above the diagonal
    Rows64 x;
    x.clear();
    for_blocks(held,
               [&](int, int at) { multiply_tiles<false, true>(x, f.q[at], 16 * warp, f.k[at], columns); });
    emit_P<kLow>(x);
    if (kLow && args.scratch.raw) return;
    x.clear();
    for_blocks(held, [&](int block, int at) {
      if (!kLow) multiply_tiles<false, true>(x, f.k[at], 16 * warp, f.k[at], columns);
      if (!args.scratch.raw) emit_features<kLow>(block, at);
    });
    __syncthreads();
    if (!kLow) emit_A(x);
    __syncthreads();
  }

  // ---- A gate per channel: the same ----

  template <bool kLow>
  __device__ __forceinline__ void emit_channel_products() {
    const auto& rows = shared.rows;
    auto& f = shared.features;
    Rows64 A, P;
    A.clear(), P.clear();
    float near_A[kPairsPerLane] = {}, near_P[kPairsPerLane] = {};
    for (int block = 0; block < tiles.keys; ++block) {
      const int first = block * kTile, features = static_cast<int>(in.key_dim) - first;
      load_rows(f.k[0], row_at<Element>(in.k, place.b, place.t, head()) + first, in.k.token, place.rows,
                features);
      load_rows(f.q[0], row_at<Element>(in.q, place.b, place.t, head()) + first, in.q.token, place.rows,
                features);
      sum_channel_gates(first);
      __syncthreads();
      multiply_earlier(A, P);
      multiply_pairs(near_A, near_P);
      emit_features<kLow>(block, 0);
      __syncthreads();
    }
    emit_P<kLow>(P);
    if (!kLow) emit_A(A);
    __syncthreads();
    CUTE_UNROLL
    for (int n = 0; n < kPairsPerLane; ++n) {
      if (lane + 32 * n >= 136) continue;
      int i, j;
      pair_of(lane + 32 * n, i, j);
      const bool diagonal = i == j;
      i += 16 * warp, j += 16 * warp;
      const float a = diagonal ? 0.f : near_A[n] * rows.k_norm[i] * rows.k_norm[j];
      const float p = near_P[n] * rows.q_norm[i] * rows.k_norm[j];
      tile(kLow ? tiles.P_low() : tiles.P())[i * kTile + j] =
          half_of<kLow, Element>(p * static_cast<float>(in.scale));
      if constexpr (kLow) continue;
      keep_pair(i, j, a);
      tile(tiles.Abar())[i * kTile + j] = Element(a);
    }
    __syncthreads();
  }

  // By the mean square of a row of N; see kHardSquare.
  __device__ bool is_hard(float sum) {
    CUTE_UNROLL
    for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) shared.squares[warp] = sum;
    __syncthreads();
    sum = 0.f;
    for (const float square : shared.squares) sum += square;
    return sum > kHardSquare * static_cast<float>(place.rows);
  }

  __device__ void run() {
    if (place.rows == 0) return;
    const bool raw = args.scratch.raw;
    if (!raw) copy_values(in.v, tiles.V());
    if (args.scratch.backward) copy_values(args.d_o, tiles.dO());
    if constexpr (!kChannelGate) bring(0);
    prepare_rows();
    __syncthreads();
    if constexpr (kChannelGate) {
      emit_channel_products<false>();
    } else {
      emit_head_products<false>(0);
    }
    if (threadIdx.x < kTile) solve_column(shared.solve, threadIdx.x);
    __syncthreads();
    const bool hard = is_hard(emit_Z<false>()) && kHasLow<Element>;
    if (!kIsWide<Element> && (!raw || hard)) emit_Z<true>();
    if (threadIdx.x < kTile) {
      const int i = static_cast<int>(threadIdx.x);
      ChunkRowsSm80& out = args.scratch.rows[chunk];
      const auto& rows = shared.rows;
      out.factors.first[i] = rows.factors.first[i], out.factors.second[i] = rows.factors.second[i];
      out.G[i] = rows.G[i], out.q_norm[i] = rows.q_norm[i], out.k_norm[i] = rows.k_norm[i];
      if (i == 0) out.factors.hard = hard ? 1.f : 0.f;
    }
    if constexpr (kHasLow<Element>) {
      if (hard) {
        __syncthreads();
        if constexpr (kChannelGate) {
          emit_channel_products<true>();
        } else {
          emit_head_products<true>(-1);
        }
      }
    }
  }
};

template <class Element, bool kChannelGate>
__global__ void __launch_bounds__(kTileThreads, kChannelGate ? 2 : 4)
    prepare_sm80_kernel(const __grid_constant__ PrepareSm80Args args) {
  PrepareCta<Element, kChannelGate>(args,
                                    *reinterpret_cast<PrepareShared<Element, kChannelGate>*>(portable_shared))
      .run();
}

template <class Tag, bool kChannelGate>
int prepare_sm80<Tag, kChannelGate>::run(const PrepareSm80Args& args, void* stream) {
  using Element = portable_t<Tag>;
  constexpr int kBytes = sizeof(PrepareShared<Element, kChannelGate>);
  static_assert(kBytes <= 99 * 1024, "CTAs of 8.6, 8.9 and 12.0 have 99 KB");
  auto* kernel = &prepare_sm80_kernel<Element, kChannelGate>;
  if (const int error = allow_shared(kernel, kBytes)) return error;
  const dim3 grid(static_cast<unsigned>(ChunkSlots(args.in).total),
                  static_cast<unsigned>(args.in.value_heads));
  kernel<<<grid, kTileThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::delta
