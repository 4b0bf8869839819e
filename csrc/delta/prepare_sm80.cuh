// Everything of a chunk that does not depend on the state, one CTA per slot and value head. K is walked in
// blocks of 64 features, so the kernel fits any K. Per block: rows come to shared memory as they are, give
// their share of K K^T and Q K^T, and leave as Kh, Qh and Kt. Then Z by substitution in float32. A chunk that
// turns out to be hard goes through its features once more, for the low halves.
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
  float squares[kTileThreads / 32];
  struct Features {
    alignas(16) Element k[kTileShared<Element>], q[kTileShared<Element>];
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
        tiles(a.in.key_dim, a.in.value_dim, kIsWide<Element>, kHasLow<Element>),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ Element* tile(int index) const {
    return static_cast<Element*>(args.scratch.tiles) +
           (chunk * tiles.total(args.scratch.backward) + index) * kTileElements;
  }
  __device__ int64_t head() const { return hv / (in.value_heads / in.heads); }

  __device__ float norm_of(const Element* row) const {
    float sum = 0.f;
    for (int c = lane; c < in.key_dim; c += 32) {
      const float x = static_cast<float>(row[c]);
      sum += x * x;
    }
    CUTE_UNROLL
    for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return 1.f / sqrtf(sum + static_cast<float>(kNormEps));
  }

  // Norms, write strengths, and the sums of a gate per head.
  __device__ void prepare_rows() {
    for (int i = warp; i < kTile; i += kTileThreads / 32) {
      const bool inside = i < place.rows;
      float q_norm = 1.f, k_norm = 1.f;
      if (inside && in.qk_l2norm) {
        q_norm = norm_of(row_at<Element>(in.q, place.b, place.t + i, head()));
        k_norm = norm_of(row_at<Element>(in.k, place.b, place.t + i, head()));
      }
      if (lane == 0) shared.rows.q_norm[i] = q_norm, shared.rows.k_norm[i] = k_norm;
    }
    const int i = static_cast<int>(threadIdx.x);
    if (i < kTile) {
      const int64_t at = (place.b * in.tokens + place.t + i) * in.value_heads + hv;
      const bool inside = i < place.rows;
      shared.rows.beta[i] = inside ? beta_of(in, in.beta[at]) : 0.f;
      const bool has_gate = !kChannelGate && in.gated && inside;
      shared.gate[i] = has_gate ? static_cast<double>(gate_of(in, in.g[at], hv, 0)) : 0.0;
    }
    __syncthreads();
    if (i < kTile) {
      double G = 0.0;
      for (int j = 0; j <= i; ++j) G += shared.gate[j];
      shared.rows.G[i] = G;
    }
    __syncthreads();
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
      const double here = shared.rows.G[i];
      return exp2f(static_cast<float>(to_end ? shared.rows.G[kTile - 1] - here : here));
    }
  }

  // Kh, Qh, Kt of 64 features, and the decay across the chunk; or the low halves of Kh and Kt.
  template <bool kLow>
  __device__ __forceinline__ void emit_features(int block) {
    constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece;
    const auto& f = shared.features;
    for (int at = threadIdx.x; at < kTile * kPieces; at += kTileThreads) {
      const int i = at / kPieces, first = at % kPieces * kPiece;
      const float k_norm = shared.rows.k_norm[i];
      const float q_norm = shared.rows.q_norm[i] * static_cast<float>(in.scale);
      const auto k = *reinterpret_cast<const Piece<Element>*>(&f.k[i * kTileRow<Element> + first]);
      const auto q = *reinterpret_cast<const Piece<Element>*>(&f.q[i * kTileRow<Element> + first]);
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
      k_rows[to] = Element(static_cast<float>(f.k[from]) * shared.rows.k_norm[row] * decay);
      q_rows[to] = Element(static_cast<float>(f.q[from]) * shared.rows.q_norm[row] * decay);
    }
    CUTE_UNROLL
    for (int block = 0; block < 3; ++block) {
      if (block >= warp) continue;
      for (int x = lane; x < 16 * kTile; x += 32) {
        const int c = x % kTile, row = 16 * block + x / kTile;
        const float decay = exp2f(first[c] - f.G[row * kGateRowSm80 + c]);
        earlier[x / kTile * kTileRow<Element> + c] =
            Element(static_cast<float>(f.k[row * kTileRow<Element> + c]) * shared.rows.k_norm[row] * decay);
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
        const float source = static_cast<float>(f.k[j * kTileRow<Element> + c]) * decay;
        a[n] += static_cast<float>(f.k[i * kTileRow<Element> + c]) * source;
        p[n] += static_cast<float>(f.q[i * kTileRow<Element> + c]) * source;
      }
    }
  }

  // Abar_ij goes where the substitution reads it.
  __device__ void keep_pair(int i, int j, float a) {
    shared.solve.Z[i * kTile + j] = a;
    shared.solve.A[j * kColumnSm80 + i] = a * shared.rows.beta[j];
  }

  __device__ void emit_Z() {
    constexpr int kPiece = Piece<Element>::kCount;
    Element* out = tile(tiles.Z());
    for (int first = kPiece * threadIdx.x; first < kTile * kTile; first += kPiece * kTileThreads) {
      Piece<Element> high, low;
      CUTE_UNROLL
      for (int c = 0; c < kPiece; ++c) {
        const float z = shared.solve.Z[first + c];
        high.at[c] = Element(z);
        low.at[c] = Element(z - static_cast<float>(high.at[c]));
      }
      *reinterpret_cast<Piece<Element>*>(out + first) = high;
      if constexpr (!kIsWide<Element>) *reinterpret_cast<Piece<Element>*>(out + kTileElements + first) = low;
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

  // Abar, P and what the walks read of the features; or the low halves of P, Kh and Kt.
  template <bool kLow>
  __device__ __forceinline__ void emit_products() {
    const auto& rows = shared.rows;
    Element* P_tile = tile(kLow ? tiles.P_low() : tiles.P());
    Rows64 A, P;
    A.clear(), P.clear();
    float near_A[kPairsPerLane] = {}, near_P[kPairsPerLane] = {};
    for (int block = 0; block < tiles.keys; ++block) {
      const int first = block * kTile, features = static_cast<int>(in.key_dim) - first;
      auto& f = shared.features;
      load_rows(f.k, row_at<Element>(in.k, place.b, place.t, head()) + first, in.k.token, place.rows,
                features);
      load_rows(f.q, row_at<Element>(in.q, place.b, place.t, head()) + first, in.q.token, place.rows,
                features);
      if constexpr (kChannelGate) sum_channel_gates(first);
      __syncthreads();
      if constexpr (kChannelGate) {
        multiply_earlier(A, P);
        multiply_pairs(near_A, near_P);
      } else {
        multiply_tiles<false, true>(A, f.k, 16 * warp, f.k);
        multiply_tiles<false, true>(P, f.q, 16 * warp, f.k);
      }
      emit_features<kLow>(block);
      __syncthreads();
    }
    struct alignas(2 * sizeof(Element)) Pair {
      Element at[2];
    };
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * warp + lane / 4 + 8 * half, first = 8 * n + lane % 4 * 2;
        Pair a_pair, p_pair;
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int j = first + c;
          float a = A.tile[0][n][2 * half + c], p = P.tile[0][n][2 * half + c];
          if constexpr (!kChannelGate) {
            const float gap = static_cast<float>(rows.G[i] - rows.G[j]);
            const float decay = i >= j ? exp2f(gap) * rows.k_norm[j] : 0.f;
            a = i > j ? a * decay * rows.k_norm[i] : 0.f;
            p = i >= j ? p * decay * rows.q_norm[i] : 0.f;
          }
          if (!kLow) keep_pair(i, j, a);
          a_pair.at[c] = Element(a);
          p_pair.at[c] = half_of<kLow, Element>(p * static_cast<float>(in.scale));
        }
        if (!kLow) *reinterpret_cast<Pair*>(tile(tiles.Abar()) + i * kTile + first) = a_pair;
        *reinterpret_cast<Pair*>(P_tile + i * kTile + first) = p_pair;
      }
    }
    __syncthreads();
    if constexpr (kChannelGate) {
      CUTE_UNROLL
      for (int n = 0; n < kPairsPerLane; ++n) {
        if (lane + 32 * n >= 136) continue;
        int i, j;
        pair_of(lane + 32 * n, i, j);
        const bool diagonal = i == j;
        i += 16 * warp, j += 16 * warp;
        const float a = diagonal ? 0.f : near_A[n] * rows.k_norm[i] * rows.k_norm[j];
        const float p = near_P[n] * rows.q_norm[i] * rows.k_norm[j];
        P_tile[i * kTile + j] = half_of<kLow, Element>(p * static_cast<float>(in.scale));
        if constexpr (kLow) continue;
        keep_pair(i, j, a);
        tile(tiles.Abar())[i * kTile + j] = Element(a);
      }
      __syncthreads();
    }
  }

  // The mean square of a row of N = diag(beta) Z; see kHardSquare.
  __device__ bool is_hard() {
    float sum = 0.f;
    for (int x = threadIdx.x; x < kTile * kTile; x += kTileThreads) {
      const float n = shared.rows.beta[x / kTile] * shared.solve.Z[x];
      sum += n * n;
    }
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
    copy_values(in.v, tiles.V());
    if (args.scratch.backward) copy_values(args.d_o, tiles.dO());
    prepare_rows();
    const auto& rows = shared.rows;
    if (threadIdx.x < kTile) {
      ChunkRowsSm80& out = args.scratch.rows[chunk];
      out.G[threadIdx.x] = rows.G[threadIdx.x], out.beta[threadIdx.x] = rows.beta[threadIdx.x];
      out.q_norm[threadIdx.x] = rows.q_norm[threadIdx.x], out.k_norm[threadIdx.x] = rows.k_norm[threadIdx.x];
    }
    emit_products<false>();
    if (threadIdx.x < kTile) solve_column(shared.solve, threadIdx.x);
    __syncthreads();
    emit_Z();
    const bool hard = kHasLow<Element> && is_hard();
    if (threadIdx.x == 0) args.scratch.rows[chunk].hard = hard ? 1.f : 0.f;
    if constexpr (kHasLow<Element>) {
      if (hard) emit_products<true>();
    }
  }
};

template <class Element, bool kChannelGate>
__global__ void __launch_bounds__(kTileThreads, kChannelGate ? 2 : 3)
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
