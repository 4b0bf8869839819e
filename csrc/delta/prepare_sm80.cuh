// Everything of a chunk that does not depend on the state, one CTA per slot and value head. K is walked in
// blocks of 64 features, so the kernel fits any K. Per block: rows come to shared memory as they are, give
// their share of K K^T and Q K^T, and leave as Kh, Qh and Kt unless the walk reads q and k in place. Then Z
// by substitution in float32. A chunk that turns out to be hard goes through its features once more, for the
// low halves.
#pragma once

#include "delta/channel_rows_sm80.cuh"
#include "delta/solve_sm80.cuh"

namespace nearfield::delta {

// Floats in a row of sums of gates: in float32, rows of a column in different banks.
template <class Element>
constexpr int kGateRowSm80 = kIsWide<Element> ? 65 : ChannelRows<Element>::kGateRow;
constexpr int kPairsPerLane = 5;  // of the 136 pairs of a diagonal 16 x 16 block

template <class Element, bool kChannelGate>
struct PrepareShared {
  ChunkRowsSm80 rows;
  float G_high[kChunk], G_low[kChunk];  // of rows.G: a difference of sums in float32 loses nothing
  float squares[kTileThreads / 32];
  struct Features {
    static constexpr int kBlocks = kChannelGate && kIsWide<Element> ? 1 : 2;  // of 64 features at a time
    alignas(16) Element k[kBlocks][kTileShared<Element>], q[kBlocks][kTileShared<Element>];
    alignas(16) float G[kChannelGate ? kTile * kGateRowSm80<Element> : 4];
    // Of a warp: its rows of k and q and 16 earlier rows of k, decayed from or to its first row; or rows of a
    // level. In float32 there is no room for the first warp, nor need.
    static constexpr int kNear = 3 * 16 * kTileRow<Element>;
    static_assert(kIsWide<Element> || kNear * sizeof(Element) >= kStageRows * kTile * sizeof(float));
    alignas(16) Element near[kChannelGate ? (kIsWide<Element> ? 3 : 4) * kNear : 8];
    float sums[kChannelGate ? kTile : 1];  // of the gates of the first half of the rows
  };
  union {
    Features features;
    ChunkSolver<Element> solver;
  };
};

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

  // 1 / norm of a row, two lanes each. Rows of at most kBlocks blocks are in shared memory.
  __device__ __forceinline__ float norm_of(const Rows<void>& from,
                                           const Element (*held)[kTileShared<Element>], int row) const {
    constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece;
    const int half = static_cast<int>(threadIdx.x) % 2, K = static_cast<int>(in.key_dim);
    float sum = 0.f;
    const auto add = [&](const Element& e) {
      const float x = static_cast<float>(e);
      sum += x * x;
    };
    const auto add_piece = [&](const Element* at) {
      const auto piece = *reinterpret_cast<const cute::uint128_t*>(at);  // one load
      for (const Element& e : reinterpret_cast<const Piece<Element>&>(piece).at) add(e);
    };
    if (Shared::Features::kBlocks > 1 && tiles.keys <= Shared::Features::kBlocks) {
      for (int block = 0; block < tiles.keys; ++block) {
#pragma unroll 4
        for (int piece = half; piece < kPieces; piece += 2)
          add_piece(&held[block][row * kTileRow<Element> + piece * kPiece]);
      }
    } else if (row < place.rows) {
      const Element* first = row_at<Element>(from, place.b, place.t + row, head());
      if (reinterpret_cast<uintptr_t>(first) % 16 == 0 && K % kPiece == 0) {
#pragma unroll 4
        for (int c = half * kPiece; c < K; c += 2 * kPiece) add_piece(first + c);
      } else {
        for (int c = half; c < K; c += 2) add(first[c]);
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return 1.f / sqrtf(sum + static_cast<float>(kNormEps));
  }

  // Write strengths, and the sums of a gate per head; then, once the features are there, norms.
  __device__ void prepare_rows() {
    static_assert(kTileThreads == 2 * kChunk);
    auto& rows = shared.rows;
    const int row = static_cast<int>(threadIdx.x) / 2, i = static_cast<int>(threadIdx.x) % kTile;
    const auto at = [&](int t) { return (place.b * in.tokens + place.t + t) * in.value_heads + hv; };
    if (static_cast<int>(threadIdx.x) >= kTile)
      rows.factors.first[i].beta = i < place.rows ? beta_of(in, in.beta[at(i)]) : 0.f;
    if (warp == 0) {  // a lane has two tokens
      const auto gate = [&](int t) {
        const bool has_gate = !kChannelGate && in.gated && t < place.rows;
        return has_gate ? static_cast<double>(gate_of(in, in.g[at(t)], hv, 0)) : 0.0;
      };
      const double first = gate(2 * lane), both = first + gate(2 * lane + 1);
      double sum = both;
      CUTE_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
      }
      const double G[2] = {sum - both + first, sum};
      CUTE_UNROLL
      for (int x = 0; x < 2; ++x) {
        rows.G[2 * lane + x] = G[x];
        shared.G_high[2 * lane + x] = static_cast<float>(G[x]);
        shared.G_low[2 * lane + x] = static_cast<float>(G[x] - static_cast<double>(static_cast<float>(G[x])));
      }
    }
    cute::cp_async_wait<0>();
    __syncthreads();
    float q_norm = 1.f, k_norm = 1.f;
    if (in.qk_l2norm) {
      q_norm = norm_of(in.q, shared.features.q, row);
      k_norm = norm_of(in.k, shared.features.k, row);
    }
    if (threadIdx.x % 2 == 0) rows.q_norm[row] = q_norm, rows.k_norm[row] = k_norm;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kTile) {  // the other warps have the longer rows of Abar and P
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

  // The sums of a gate per channel for features [first, first + 64), two threads a channel.
  __device__ void sum_channel_gates(int first) {
    constexpr int kHalf = kTile / 2, kRow = kGateRowSm80<Element>;
    float* G = shared.features.G;
    const int c = static_cast<int>(threadIdx.x) % kTile;
    const bool second = static_cast<int>(threadIdx.x) >= kTile, inside = first + c < in.key_dim;
    const int begin = second ? kHalf : 0;
    const int64_t step = in.value_heads * in.key_dim;
    const float* g =
        in.g + ((place.b * in.tokens + place.t + begin) * in.value_heads + hv) * in.key_dim + first + c;
    const int rows = inside ? place.rows - begin : 0;
    float* column = G + begin * kRow + c;
    float raw[kHalf];  // so that the loads overlap
    CUTE_UNROLL
    for (int i = 0; i < kHalf; ++i) raw[i] = i < rows ? g[i * step] : 0.f;
    CUTE_UNROLL
    for (int i = 0; i < kHalf; ++i) column[i * kRow] = raw[i];
    float sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < kHalf; ++i) {
      if (i < rows) sum += gate_of(in, column[i * kRow], hv, first + c);
      column[i * kRow] = sum;
    }
    if (!second) shared.features.sums[c] = sum;
    __syncthreads();
    if (second) {
      const float before = shared.features.sums[c];
#pragma unroll 8
      for (int i = 0; i < kHalf; ++i) column[i * kRow] += before;
    }
    __syncthreads();
  }

  // e^{G_i}, or e^{G_C - G_i}
  __device__ float decay_of(int i, int c, bool to_end) const {
    if constexpr (kChannelGate) {
      const float* G = shared.features.G;
      const float here = G[i * kGateRowSm80<Element> + c];
      return exp2f(to_end ? G[(kTile - 1) * kGateRowSm80<Element> + c] - here : here);
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
    if (!kLow) emit_decay(block);
  }
  // Of 64 features across the chunk; and for the gradient the sums behind it.
  __device__ __forceinline__ void emit_decay(int block) {
    const int64_t padded = static_cast<int64_t>(tiles.keys) * kTile;
    if (threadIdx.x < kTile)
      args.scratch.decay[chunk * padded + block * kTile + threadIdx.x] =
          decay_of(kTile - 1, threadIdx.x, false);
    if constexpr (kChannelGate) {
      if (!args.scratch.backward) return;
      for (int x = threadIdx.x; x < kTile * kTile; x += kTileThreads)
        args.scratch.G[(chunk * kTile + x / kTile) * padded + block * kTile + x % kTile] =
            shared.features.G[x / kTile * kGateRowSm80<Element> + x % kTile];
    }
  }

  // With a gate per channel, rows of the warp's block of 16 against earlier blocks: both are decayed to the
  // block's first row, so that no exponent is positive. put_own and put_earlier bring them so.
  template <class PutOwn, class PutEarlier>
  __device__ __forceinline__ void multiply_earlier(Rows64& A, Rows64& P, Element* near, const PutOwn& put_own,
                                                   const PutEarlier& put_earlier) {
    using F = TileFragments<Element>;
    if (warp == 0) return;
    Element *k_rows = near, *q_rows = k_rows + 16 * kTileRow<Element>,
            *earlier = q_rows + 16 * kTileRow<Element>;
    put_own(k_rows, q_rows);
    CUTE_UNROLL
    for (int block = 0; block < 3; ++block) {
      if (block >= warp) continue;
      put_earlier(earlier, block);
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
        const float decay = exp2f(f.G[i * kGateRowSm80<Element> + c] - f.G[j * kGateRowSm80<Element> + c]);
        const float source = static_cast<float>(f.k[0][j * kTileRow<Element> + c]) * decay;
        a[n] += static_cast<float>(f.k[0][i * kTileRow<Element> + c]) * source;
        p[n] += static_cast<float>(f.q[0][i * kTileRow<Element> + c]) * source;
      }
    }
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
  // f(n, half, i, first j, factors of two j) for what this lane holds of the warp's 16 rows: decay from j to
  // i and norm of j, zero above the diagonal. To earlier blocks of 16 the decay goes through the first row of
  // the warp's block, a factor of the row and one of the column, neither above 1. With a gate per channel
  // decays are in the products.
  template <class F>
  __device__ __forceinline__ void for_pairs(const F& f) const {
    const auto two = [](const float* from) { return *reinterpret_cast<const float2*>(from); };
    const int first = 16 * warp, row = first + lane / 4;
    const float from_first[2] = {exp2f(gap(row, first)), exp2f(gap(row + 8, first))};
    const float G_high = shared.G_high[first], G_low = shared.G_low[first];
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const int j = 8 * n + lane % 4 * 2;
      if (n >= 2 * (warp + 1)) continue;
      const float2 norm = two(shared.rows.k_norm + j);
      float2 factor[2] = {norm, norm};
      if constexpr (!kChannelGate) {
        const float2 high = two(shared.G_high + j), low = two(shared.G_low + j);
        if (n < 2 * warp) {
          const float2 to_first{exp2f(G_high - high.x + (G_low - low.x)) * norm.x,
                                exp2f(G_high - high.y + (G_low - low.y)) * norm.y};
          CUTE_UNROLL
          for (int half = 0; half < 2; ++half)
            factor[half] = {to_first.x * from_first[half], to_first.y * from_first[half]};
        } else {
          CUTE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int i = row + 8 * half;
            const float row_high = shared.G_high[i], row_low = shared.G_low[i];
            factor[half] = {i >= j ? exp2f(row_high - high.x + (row_low - low.x)) * norm.x : 0.f,
                            i > j ? exp2f(row_high - high.y + (row_low - low.y)) * norm.y : 0.f};
          }
        }
      }
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) f(n, half, row + 8 * half, j, factor[half]);
    }
  }
  // P scaled and rounded, or the low half of that; Abar, for the solver and for the gradient.
  template <bool kLow>
  __device__ __forceinline__ void emit_pairs(const Rows64& A, const Rows64& P) {
    Element *to_P = tile(kLow ? tiles.P_low() : tiles.P()), *to_A = tile(tiles.Abar());
    const int row = 16 * warp + lane / 4;
    const float scale = static_cast<float>(in.scale);
    float q_norm[2], k_norm[2];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half)
      q_norm[half] = scale * shared.rows.q_norm[row + 8 * half],
      k_norm[half] = shared.rows.k_norm[row + 8 * half];
    const bool keep_A = args.scratch.backward;
    __syncthreads();  // the solver's place is that of the features
    for_pairs([&](int n, int half, int i, int j, float2 factor) {
      const float *p = &P.tile[0][n][2 * half], *a = &A.tile[0][n][2 * half];
      float2 p2{p[0] * factor.x * q_norm[half], p[1] * factor.y * q_norm[half]};
      if constexpr (kLow)
        p2 = {p2.x - static_cast<float>(Element(p2.x)), p2.y - static_cast<float>(Element(p2.y))};
      store_pair(to_P + i * kTile + j, p2.x, p2.y);
      if constexpr (kLow) return;
      const float2 a2{i == j ? 0.f : a[0] * factor.x * k_norm[half],
                      i == j + 1 ? 0.f : a[1] * factor.y * k_norm[half]};
      shared.solver.set_pair(i, j, a2, {shared.rows.beta(j), shared.rows.beta(j + 1)});
      if (keep_A) store_pair(to_A + i * kTile + j, a2.x, a2.y);
    });
    // Above the diagonal.
    for (int at = lane; at < 16 * (8 - 2 * (warp + 1)); at += 32) {
      const int pieces = 8 - 2 * (warp + 1);
      const int to = (16 * warp + at / pieces) * kTile + (2 * (warp + 1) + at % pieces) * 8;
      clear_eight(to_P + to);
      if (!kLow && keep_A) clear_eight(to_A + to);
    }
  }
  __device__ __forceinline__ static void clear_eight(Element* to) {
    CUTE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Element)) / 2; ++i) reinterpret_cast<uint4*>(to)[i] = uint4{};
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
  // A += K K^T, P += Q K^T of a block, as far as the diagonal.
  __device__ __forceinline__ void multiply_keys(Rows64& A, Rows64& P, int held) const {
    using F = TileFragments<Element>;
    const Element *k = shared.features.k[held], *q = shared.features.q[held];
    const int at = 16 * warp * kTileRow<Element>, columns = 16 * (warp + 1);
#pragma unroll 2
    for (int c = 0; c < kTile; c += F::kDepth) {
      const typename F::A k_rows = F::left(k + at + c, kTileRow<Element>),
                          q_rows = F::left(q + at + c, kTileRow<Element>);
      CUTE_UNROLL
      for (int n = 0; n < kTile; n += F::kColumns) {
        if (n >= columns) break;
        typename F::B b[F::kColumns / 8];
        F::right_transposed(b, k + n * kTileRow<Element> + c, kTileRow<Element>);
        CUTE_UNROLL
        for (int j = 0; j < F::kColumns / 8; ++j) {
          F::multiply(A.tile[0][n / 8 + j], k_rows, b[j]);
          F::multiply(P.tile[0][n / 8 + j], q_rows, b[j]);
        }
      }
    }
  }
  // Abar, P and what the walks read of the features; or the low halves of P, Kh and Kt.
  template <bool kLow>
  __device__ __forceinline__ void emit_head_products(int held) {
    Rows64 A, P;
    A.clear(), P.clear();
    for_blocks(held, [&](int block, int at) {
      multiply_keys(A, P, at);
      if (!args.scratch.raw) emit_features<kLow>(block, at);
    });
    emit_pairs<kLow>(A, P);
    __syncthreads();
  }

  // ---- A gate per channel: the same ----

  // Pairs inside the warp's block, once the others are where they belong.
  template <bool kLow>
  __device__ __forceinline__ void put_near_pair(int i, int j, float a, float p) {
    const auto& rows = shared.rows;
    i += 16 * warp, j += 16 * warp;
    p *= rows.q_norm[i] * static_cast<float>(in.scale) * rows.k_norm[j];
    tile(kLow ? tiles.P_low() : tiles.P())[i * kTile + j] = half_of<kLow, Element>(p);
    if constexpr (kLow) return;
    a = i == j ? 0.f : a * rows.k_norm[i] * rows.k_norm[j];
    shared.solver.set(i, j, a, rows.beta(j));
    if (args.scratch.backward) tile(tiles.Abar())[i * kTile + j] = Element(a);
  }

  template <bool kLow>
  __device__ __forceinline__ void emit_channel_products(int held) {
    using F = TileFragments<Element>;
    auto& f = shared.features;
    Rows64 A, P;
    A.clear(), P.clear();
    float4 near[kLevels] = {};
    Accumulator<1, 16> diagonal;  // q_i k_i
    diagonal.clear();
    Element* space = &f.near[warp * Shared::Features::kNear];
    for_blocks(held, [&](int block, int at) {
      sum_channel_gates(block * kTile);
      ChannelRows<Element> own;
      own.load(f.k[at], f.q[at], f.G, 16 * warp);
      multiply_earlier(
          A, P, space, [&](Element* k, Element* q) { own.put_from_first(k, q); },
          [&](Element* rows, int earlier) { own.put_earlier(rows, f.k[at], f.G, earlier); });
      const auto add = [&](float4& to, float4 x) { to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w; };
      auto* stage = reinterpret_cast<float*>(space);
      add(near[0], diagonal_level<0>(stage, own));
      add(near[1], diagonal_level<1>(stage, own));
      add(near[2], diagonal_level<2>(stage, own));
      add(near[3], diagonal_level<3>(stage, own));
      const Element *k_rows = f.k[at] + 16 * warp * kTileRow<Element>,
                    *q_rows = f.q[at] + 16 * warp * kTileRow<Element>;
      CUTE_UNROLL
      for (int k = 0; k < kTile; k += F::kDepth)
        multiply_step<true>(diagonal, F::left(q_rows + k, kTileRow<Element>), k_rows, k);
      own.template emit<kLow>(tile((kLow ? tiles.Kh_low() : tiles.Kh()) + block), tile(tiles.Qh() + block),
                              tile((kLow ? tiles.Kt_low() : tiles.Kt()) + block), f.G, shared.rows.k_norm,
                              shared.rows.q_norm, static_cast<float>(in.scale));
      if (!kLow) emit_decay(block);
      __syncthreads();
    });
    emit_pairs<kLow>(A, P);
    __syncwarp();
    CUTE_UNROLL
    for (int level = 0; level < kLevels; ++level)
      for_level(level, near[level], [&](int i, int j, float a, float p) { put_near_pair<kLow>(i, j, a, p); });
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int i = lane / 4 + c / 2 * 8, j = 8 * n + lane % 4 * 2 + c % 2;
        if (i == j) put_near_pair<kLow>(i, j, 0.f, diagonal.tile[0][n][c]);
      }
    }
    __syncthreads();
  }

  // In float32 pairs inside a block are done one by one.
  __device__ __forceinline__ void emit_wide_channel_products() {
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
      constexpr int kRow = kGateRowSm80<Element>;
      const float* G = &f.G[16 * warp * kRow];
      const auto put_own = [&](Element* k, Element* q) {
        for (int x = lane; x < 16 * kTile; x += 32) {
          const int i = x / kTile, c = x % kTile, from = (16 * warp + i) * kTileRow<Element> + c;
          const float decay = exp2f(G[i * kRow + c] - G[c]);
          k[i * kTileRow<Element> + c] = f.k[0][from] * decay,
                                    q[i * kTileRow<Element> + c] = f.q[0][from] * decay;
        }
      };
      const auto put_earlier = [&](Element* rows, int earlier) {
        for (int x = lane; x < 16 * kTile; x += 32) {
          const int c = x % kTile, row = 16 * earlier + x / kTile;
          const float decay = exp2f(G[c] - f.G[row * kRow + c]);
          rows[x / kTile * kTileRow<Element> + c] = f.k[0][row * kTileRow<Element> + c] * decay;
        }
      };
      multiply_earlier(A, P, &f.near[(warp - 1) * Shared::Features::kNear], put_own, put_earlier);
      multiply_pairs(near_A, near_P);
      emit_features<false>(block, 0);
      __syncthreads();
    }
    emit_pairs<false>(A, P);
    __syncwarp();
    CUTE_UNROLL
    for (int n = 0; n < kPairsPerLane; ++n) {
      if (lane + 32 * n >= 136) continue;
      int i, j;
      pair_of(lane + 32 * n, i, j);
      put_near_pair<false>(i, j, near_A[n], near_P[n]);
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
    constexpr bool kWideChannels = kChannelGate && kIsWide<Element>;
    if constexpr (!kWideChannels) bring(0);
    prepare_rows();
    if constexpr (kWideChannels) {
      emit_wide_channel_products();
    } else if constexpr (kChannelGate) {
      emit_channel_products<false>(0);
    } else {
      emit_head_products<false>(0);
    }
    const float squares = shared.solver.solve([&](int i) { return shared.rows.beta(i); });
    const bool hard = is_hard(squares) && kHasLow<Element>;
    shared.solver.template emit<false>(tile(tiles.Z()));
    if constexpr (!kIsWide<Element>) {
      if (args.scratch.backward || hard) shared.solver.template emit<true>(tile(tiles.Z()) + kTileElements);
    }
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
          emit_channel_products<true>(-1);
        } else {
          emit_head_products<true>(-1);
        }
      }
    }
  }
};

template <class Element, bool kChannelGate>
__global__ void __launch_bounds__(kTileThreads, kChannelGate || kIsWide<Element> ? 2 : 3)
    prepare_sm80_kernel(const __grid_constant__ PrepareSm80Args args) {
  PrepareCta<Element, kChannelGate>(args,
                                    *reinterpret_cast<PrepareShared<Element, kChannelGate>*>(portable_shared))
      .run();
}

template <class Tag, bool kChannelGate>
int prepare_sm80<Tag, kChannelGate>::run(const PrepareSm80Args& args, void* stream) {
  using Element = portable_t<Tag>;
  constexpr int kBytes = sizeof(PrepareShared<Element, kChannelGate>);
  static_assert(kBytes <= kPortableShared);
  auto* kernel = &prepare_sm80_kernel<Element, kChannelGate>;
  if (const int error = allow_shared_memory(kernel, kBytes)) return error;
  const dim3 grid(static_cast<unsigned>(ChunkSlots(args.in).total),
                  static_cast<unsigned>(args.in.value_heads));
  kernel<<<grid, kTileThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::delta
