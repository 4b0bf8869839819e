// All gradients of a chunk but dv, one CTA per slot and value head, a warp per 16 rows; formulas: README.md.
// V and K are walked in blocks of 64, so the kernel fits any head dims. With r the error just before a token
// and Y the gradient of V' = beta r, every product of the backward is one of tiles that the walks left:
//   dbeta_i = Y_i . r_i                    beta_i dA_ij = -beta_i beta_j Y_i . r_j     dP_ij = scale beta_j
//   dO_i . r_j dQh = scale dO S^T                     dKh = -diag(beta) Y S^T                     dKt =
//   diag(beta) r dS^T
#pragma once

#include "delta/tile_sm80.cuh"

namespace nearfield::delta {

constexpr int kPairRow = 65;  // floats in a row of M: rows and columns in different banks

constexpr int kNearRow = 68;  // floats in a row of a warp's own buffer; at least a padded row of elements

// Sums over the 16 rows of a warp, of 64 features.
struct ChannelSums {
  float enter[4][kTile], leave[4][kTile];
  float across[3][kTile];   // pairs of blocks 0 2, 0 3, 1 3: they leap over a block
  float through[2][kTile];  // S . dS, in two halves
  float rate[4][kTile], bias[4][kTile];
};
struct HeadSums {
  float pairs[kTile], enter[kTile], leave[kTile];
  double through[kTileThreads / 32];
};

template <class Element, bool kChannelGate>
struct GradientShared {
  ChunkRowsSm80 rows;
  float dbeta[kTile];
  std::conditional_t<kChannelGate, ChannelSums, HeadSums> sums;
  alignas(16) Element E[kTileShared<Element>], F[kTileShared<Element>];
  union {
    Element x[3][kTileShared<Element>];
    float M[kChannelGate ? 1 : kTile * kPairRow];
    struct {
      Element k_q[2][kTileShared<Element>];
      float near[kChannelGate ? 4 : 1][16 * kNearRow];  // 16 rows of a warp's own
    };
  };
};

template <class Element, bool kChannelGate>
struct GradientCta {
  using Shared = GradientShared<Element, kChannelGate>;
  const GradientSm80Args& args;
  const InputsSm80& in;
  Shared& shared;
  const ChunkPlace place;
  const int64_t hv, chunk;
  const ChunkTiles tiles;
  const int warp, lane;

  __device__ GradientCta(const GradientSm80Args& a, Shared& s)
      : args(a),
        in(a.in),
        shared(s),
        place(find_chunk(a.in, blockIdx.x)),
        hv(blockIdx.y),
        chunk(static_cast<int64_t>(blockIdx.x) * a.in.value_heads + blockIdx.y),
        tiles(a.in.key_dim, a.in.value_dim, kIsWide<Element>, kHasLow<Element>),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  // ---- Tiles ----

  __device__ int64_t head() const { return hv / (in.value_heads / in.heads); }
  __device__ int value_blocks() const { return tiles.values; }
  __device__ const Element* chunk_tile(int index) const {
    return static_cast<const Element*>(args.scratch.tiles) +
           (chunk * tiles.total(true) + index) * kTileElements;
  }
  __device__ void copy_values(int x, const void* from, int block) const {
    copy_tile(shared.x[x],
              static_cast<const Element*>(from) + (chunk * value_blocks() + block) * kTileElements,
              kTileThreads);
  }
  __device__ void copy_state(int x, const void* from, int value_block, int key_block) const {
    const int64_t index = (chunk * value_blocks() + value_block) * tiles.keys + key_block;
    copy_tile(shared.x[x], static_cast<const Element*>(from) + index * kTileElements, kTileThreads);
  }
  __device__ void copy_d_o(int x, int block) const {
    copy_tile(shared.x[x], chunk_tile(tiles.dO() + block), kTileThreads);
  }
  __device__ static void arrived() {
    cute::cp_async_fence();
    cute::cp_async_wait<0>();
    __syncthreads();
  }
  // Rows of q or k, normalised.
  __device__ void load_normalised(int x, const Rows<void>& from, const float* norm, int block) const {
    load_rows(shared.x[x], row_at<Element>(from, place.b, place.t, head()) + block * kTile, from.token,
              place.rows, static_cast<int>(in.key_dim) - block * kTile);
    if (!in.qk_l2norm) return;
    __syncthreads();
    for (int at = threadIdx.x; at < kTile * kTile; at += kTileThreads) {
      Element& e = shared.x[x][at / kTile * kTileRow<Element> + at % kTile];
      e = Element(static_cast<float>(e) * norm[at / kTile]);
    }
  }

  __device__ float decay_between(int i, int j) const {
    return exp2f(static_cast<float>(shared.rows.G[i] - shared.rows.G[j]));
  }

  // E, F (without the decay if that is per channel) and the pairs of dg, from Y r^T and dO r^T.
  __device__ void make_E_F() {
    Rows64 Yr, Or;
    Yr.clear(), Or.clear();
    for (int block = 0; block < value_blocks(); ++block) {
      copy_values(0, args.left.r, block);
      copy_values(1, args.left.Y, block);
      copy_d_o(2, block);
      arrived();
      multiply_tiles<false, true>(Yr, shared.x[1], 16 * warp, shared.x[0]);
      multiply_tiles<false, true>(Or, shared.x[2], 16 * warp, shared.x[0]);
      __syncthreads();
    }
    const auto& rows = shared.rows;
    const Element *Abar = chunk_tile(tiles.Abar()), *P = chunk_tile(tiles.P());
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int i = 16 * warp + lane / 4 + x / 2 * 8, j = 8 * n + lane % 4 * 2 + x % 2;
        const float yr = Yr.tile[0][n][x], dA = i > j ? -rows.beta(i) * rows.beta(j) * yr : 0.f;
        const float dP = i >= j ? rows.beta(j) * Or.tile[0][n][x] : 0.f;
        if (i == j) shared.dbeta[i] = yr;
        const float decay = kChannelGate ? 1.f : i >= j ? decay_between(i, j) : 0.f;
        shared.E[i * kTileRow<Element> + j] = Element(dA * decay);
        shared.F[i * kTileRow<Element> + j] = Element(static_cast<float>(in.scale) * dP * decay);
        if constexpr (!kChannelGate) {
          const float a = static_cast<float>(Abar[i * kTile + j]), p = static_cast<float>(P[i * kTile + j]);
          shared.M[i * kPairRow + j] = i > j ? dA * a + dP * p : 0.f;
        }
      }
    }
    __syncthreads();
    if constexpr (!kChannelGate) sum_pairs();
  }

  __device__ void sum_pairs() {
    // pairs_t = sum over readers i >= t and sources j < t
    if (threadIdx.x < kTile) {
      float* row = &shared.M[threadIdx.x * kPairRow];
      float before = 0.f;
      for (int j = 0; j < kTile; ++j) {
        const float m = row[j];
        row[j] = before;
        before += m;
      }
    }
    __syncthreads();
    if (threadIdx.x < kTile) {
      float sum = 0.f;
      for (int i = threadIdx.x; i < kTile; ++i) sum += shared.M[i * kPairRow + threadIdx.x];
      shared.sums.pairs[threadIdx.x] = sum;
    }
    __syncthreads();
  }

  // Of 64 features: dO S^T, Y S^T, r dS^T, and this thread's share of S . dS (of column threadIdx.x % 64).
  // Leaves normalised k and q in x[0] and x[1].
  __device__ float state_products(int block, Rows64& dq, Rows64& dk, Rows64& dKt) const {
    float through = 0.f;
    dq.clear(), dk.clear(), dKt.clear();
    for (int v = 0; v < value_blocks(); ++v) {
      copy_d_o(0, v);
      copy_values(1, args.left.Y, v);
      copy_state(2, args.left.S, v, block);
      arrived();
      multiply_tiles<false, false>(dq, shared.x[0], 16 * warp, shared.x[2]);
      multiply_tiles<false, false>(dk, shared.x[1], 16 * warp, shared.x[2]);
      __syncthreads();
      copy_values(0, args.left.r, v);
      copy_state(1, args.left.dS, v, block);
      arrived();
      multiply_tiles<false, false>(dKt, shared.x[0], 16 * warp, shared.x[1]);
      for (int at = threadIdx.x; at < kTile * kTile; at += kTileThreads) {
        const int x = at / kTile * kTileRow<Element> + at % kTile;
        through += static_cast<float>(shared.x[1][x]) * static_cast<float>(shared.x[2][x]);
      }
      __syncthreads();
    }
    load_normalised(0, in.k, shared.rows.k_norm, block);
    load_normalised(1, in.q, shared.rows.q_norm, block);
    __syncthreads();
    return through;
  }

  // dq, dk of 64 features; adds to the sums of this lane's two rows and to that of the whole chunk.
  __device__ void key_block(int block, float (&enter)[2], float (&leave)[2], double& through) {
    Rows64 dq, dk, dKt;
    through += state_products(block, dq, dk, dKt);
    const Element *k = shared.x[0], *q = shared.x[1];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = 16 * warp + lane / 4 + 8 * half;
      const float read = exp2f(static_cast<float>(shared.rows.G[i])), write = decay_between(kTile - 1, i);
      const float beta = shared.rows.beta(i);
      CUTE_UNROLL
      for (int n = 0; n < 8; ++n) {
        CUTE_UNROLL
        for (int x = 2 * half; x < 2 * half + 2; ++x) {
          const int at = i * kTileRow<Element> + 8 * n + lane % 4 * 2 + x % 2;
          const float k_at = static_cast<float>(k[at]), q_at = static_cast<float>(q[at]);
          float &to_q = dq.tile[0][n][x], &to_k = dk.tile[0][n][x];
          const float to_end = dKt.tile[0][n][x] * beta * write;
          to_q *= static_cast<float>(in.scale) * read;
          to_k *= -beta * read;
          enter[half] += q_at * to_q + k_at * to_k;
          leave[half] += k_at * to_end;
          to_k += to_end;
        }
      }
    }
    multiply_tiles<false, false>(dq, shared.F, 16 * warp, k);
    multiply_tiles<false, false>(dk, shared.E, 16 * warp, k);
    multiply_tiles<true, false>(dk, shared.E, 16 * warp, k);
    multiply_tiles<true, false>(dk, shared.F, 16 * warp, q);
    store_heads(dq, args.dq_heads, block);
    store_heads(dk, args.dk_heads, block);
    __syncthreads();
  }

  __device__ int64_t row(int i) const { return (place.b * in.tokens + place.t + i) * in.value_heads + hv; }

  __device__ void store_heads(Rows64& x, float* to, int block) const {
    for_each(x, [&](int r, int column, float& at) {
      const int i = 16 * warp + r, c = block * kTile + column;
      if (i < place.rows && c < in.key_dim) to[row(i) * in.key_dim + c] = at;
    });
  }

  __device__ static float sum_quad(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // Through the activation.
  __device__ void store_dbeta(int t) {
    const int64_t at = row(t);
    const float beta = shared.rows.beta(t), dbeta = shared.dbeta[t];
    const float top = in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f;
    args.dbeta[at] = in.beta_activation == BetaActivation::kNone ? dbeta : dbeta * beta * (1.f - beta / top);
  }

  // From dg to the gradient of the raw gate; A: the share of dA_log.
  __device__ float gate_gradient(float raw, int c, float dg, float& A) const {
    if (in.gate == Gate::kLog) return dg;
    const float rate = in.A_log != nullptr ? expf(in.A_log[hv]) : 1.f;
    const float x = raw + (in.dt_bias != nullptr ? in.dt_bias[hv * in.gate_dim() + c] : 0.f);
    if (in.gate == Gate::kSoftplus) {
      const float open = sigmoid_of(x);
      A = -dg * rate * (fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))));
      return -dg * rate * open;
    }
    const float open = sigmoid_of(rate * x);
    const float da = dg * static_cast<float>(in.gate_bound) * open * (1.f - open) * rate;
    A = da * x;
    return da;
  }

  __device__ void start() {
    if (threadIdx.x < kTile) {
      const ChunkRowsSm80& from = args.scratch.rows[chunk];
      const int i = static_cast<int>(threadIdx.x);
      shared.rows.G[i] = from.G[i], shared.rows.factors.first[i] = from.factors.first[i];
      shared.rows.q_norm[i] = from.q_norm[i], shared.rows.k_norm[i] = from.k_norm[i];
    }
    __syncthreads();
    make_E_F();
    if (static_cast<int>(threadIdx.x) < place.rows) store_dbeta(static_cast<int>(threadIdx.x));
  }

  __device__ void run_head_gate() {
    float enter[2] = {}, leave[2] = {};
    double through = 0.0;
    for (int block = 0; block < tiles.keys; ++block) key_block(block, enter, leave, through);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = 16 * warp + lane / 4 + 8 * half;
      const float e = sum_quad(enter[half]), l = sum_quad(leave[half]);
      if (lane % 4 == 0) shared.sums.enter[i] = e, shared.sums.leave[i] = l;
    }
    CUTE_UNROLL
    for (int step = 16; step >= 1; step /= 2) through += __shfl_xor_sync(0xffffffffu, through, step);
    if (lane == 0) shared.sums.through[warp] = through;
    __syncthreads();
    const int t = static_cast<int>(threadIdx.x);
    float dg = 0.f;
    if (t < kTile) {
      const double sum =
          shared.sums.through[0] + shared.sums.through[1] + shared.sums.through[2] + shared.sums.through[3];
      dg = shared.sums.pairs[t] +
           static_cast<float>(sum) * exp2f(static_cast<float>(shared.rows.G[kTile - 1]));
      for (int i = t; i < kTile; ++i) dg += shared.sums.enter[i];
      for (int j = 0; j < t; ++j) dg += shared.sums.leave[j];
    }
    __syncthreads();
    if (t < place.rows && args.dg != nullptr) {
      float A = 0.f;
      shared.sums.enter[t] = args.dg[row(t)] = gate_gradient(in.g[row(t)], 0, dg, A);
      shared.sums.leave[t] = A;
    }
    __syncthreads();
    if (t == 0 && args.gate_parts != nullptr) {
      double A = 0.0, bias = 0.0;
      for (int i = 0; i < place.rows; ++i) A += shared.sums.leave[i], bias += shared.sums.enter[i];
      const int64_t slots = gridDim.x;
      args.gate_parts[chunk] = static_cast<float>(A);
      args.gate_parts[slots * in.value_heads + chunk] = static_cast<float>(bias);
    }
  }

  // ---- A gate per channel ----

  // Sum over the warp's 16 rows, into the 64 columns of `to`.
  __device__ void sum_rows(const Rows64& x, float* to) const {
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        float sum = x.tile[0][n][c] + x.tile[0][n][c + 2];
        CUTE_UNROLL
        for (int step = 4; step <= 16; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane < 4) to[8 * n + 2 * lane + c] = sum;
      }
    }
  }

  // 16 rows of k or q from `first` on, times 2^exponent(row, channel), as the right operand of this warp.
  template <class Exponent>
  __device__ const Element* scaled_rows(const Element* from, int first, const Exponent& exponent) const {
    auto* near = reinterpret_cast<Element*>(shared.near[warp]);
    __syncwarp();
    for (int at = lane; at < 16 * kTile; at += 32) {
      const int i = first + at / kTile, c = at % kTile;
      near[at / kTile * kTileRow<Element> + c] =
          Element(static_cast<float>(from[i * kTileRow<Element> + c]) * exp2f(exponent(i, c)));
    }
    __syncwarp();
    return near;
  }

  // The warp's 16 x 64 values, so that a lane can read columns.
  __device__ const float* by_column(Rows64& x) const {
    float* near = shared.near[warp];
    __syncwarp();
    for_each(x, [&](int row, int column, float& at) { near[row * kNearRow + column] = at; });
    __syncwarp();
    return near;
  }

  // dq, dk, dg of 64 channels. A gate acts on the pairs of an earlier source and a later reader around it.
  // With blocks of 16 rows, a warp's own: readers here with earlier sources (`row`), sources here with later
  // readers (`column`), sources before and readers after (`whole`), and pairs inside the block, one by one.
  // Decays between blocks go through the first row of the reader's block, so that no exponent is positive.
  __device__ void channel_block(int block) {
    using F = TileFragments<Element>;
    constexpr int kRow = kTileRow<Element>;
    Rows64 dq, dk, column;
    const float through = state_products(block, dq, dk, column);
    shared.sums.through[threadIdx.x / kTile][threadIdx.x % kTile] = through;
    const Element *k = shared.x[0], *q = shared.x[1];
    const int64_t padded = static_cast<int64_t>(tiles.keys) * kTile;
    const float* gates = args.scratch.G + chunk * kTile * padded + block * kTile;
    const auto G = [&](int i, int c) { return gates[i * padded + c]; };
    const int own = 16 * warp;

    Rows64 row;
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int i = own + lane / 4 + x / 2 * 8, c = 8 * n + lane % 4 * 2 + x % 2;
        const float k_at = static_cast<float>(k[i * kRow + c]), q_at = static_cast<float>(q[i * kRow + c]);
        const float beta = shared.rows.beta(i);
        float &to_q = dq.tile[0][n][x], &to_k = dk.tile[0][n][x], &to_end = column.tile[0][n][x];
        const float read = exp2f(G(i, c));
        to_q *= static_cast<float>(in.scale) * read;
        to_k *= -beta * read;
        to_end *= beta * exp2f(G(kTile - 1, c) - G(i, c));
        row.tile[0][n][x] = q_at * to_q + k_at * to_k;
        to_k += to_end;
        to_end *= k_at;
      }
    }
    sum_rows(row, shared.sums.enter[warp]);
    sum_rows(column, shared.sums.leave[warp]);

    {  // Sources in earlier blocks.
      Rows64 to_q, to_k;
      to_q.clear(), to_k.clear();
#pragma unroll 1
      for (int first = 0; first < own; first += 16) {
        const Element* near = scaled_rows(k, first, [&](int j, int c) { return G(own, c) - G(j, c); });
        CUTE_UNROLL
        for (int d = 0; d < 16; d += F::kDepth) {
          multiply_step<false>(to_q, F::left(shared.F + own * kRow + first + d, kRow), near, d);
          multiply_step<false>(to_k, F::left(shared.E + own * kRow + first + d, kRow), near, d);
        }
      }
      CUTE_UNROLL
      for (int n = 0; n < 8; ++n) {
        CUTE_UNROLL
        for (int x = 0; x < 4; ++x) {
          const int i = own + lane / 4 + x / 2 * 8, c = 8 * n + lane % 4 * 2 + x % 2;
          const float decay = exp2f(G(i, c) - G(own, c));
          const float a = to_q.tile[0][n][x] * decay, b = to_k.tile[0][n][x] * decay;
          dq.tile[0][n][x] += a;
          dk.tile[0][n][x] += b;
          row.tile[0][n][x] +=
              static_cast<float>(q[i * kRow + c]) * a + static_cast<float>(k[i * kRow + c]) * b;
        }
      }
    }
#pragma unroll 1
    for (int first = own + 16; first < kTile; first += 16) {  // Readers in a later block.
      Rows64 sum;
      sum.clear();
      const auto to_first = [&](int i, int c) { return G(i, c) - G(first, c); };
      const auto add = [&](const Element* reader, const Element* matrix) {
        const Element* near = scaled_rows(reader, first, to_first);
        CUTE_UNROLL
        for (int d = 0; d < 16; d += F::kDepth)
          multiply_step<false>(sum, F::left_transposed(matrix + (first + d) * kRow + own), near, d);
      };
      add(q, shared.F);
      add(k, shared.E);
      CUTE_UNROLL
      for (int n = 0; n < 8; ++n) {
        CUTE_UNROLL
        for (int x = 0; x < 4; ++x) {
          const int j = own + lane / 4 + x / 2 * 8, c = 8 * n + lane % 4 * 2 + x % 2;
          float& at = sum.tile[0][n][x];
          at *= exp2f(G(first, c) - G(j, c));
          dk.tile[0][n][x] += at;
          at *= static_cast<float>(k[j * kRow + c]);
          column.tile[0][n][x] += at;
        }
      }
      const int reader = first / 16;
      if (reader > warp + 1) sum_rows(sum, shared.sums.across[warp + reader - 2]);
    }

    store_heads(dq, args.dq_heads, block);
    store_heads(dk, args.dk_heads, block);
    float dg[2][16];
    const float* near = by_column(row);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
      CUTE_UNROLL
      for (int t = 15; t >= 0; --t) dg[half][t] = sum += near[t * kNearRow + lane + 32 * half];
    }
    near = by_column(column);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
      CUTE_UNROLL
      for (int t = 1; t < 16; ++t) dg[half][t] += sum += near[(t - 1) * kNearRow + lane + 32 * half];
    }
    __syncthreads();
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int c = lane + 32 * half;
      const auto& s = shared.sums;
      float whole = (s.through[0][c] + s.through[1][c]) * exp2f(G(kTile - 1, c));
      for (int w = warp + 1; w < 4; ++w) whole += s.enter[w][c];
      for (int w = 0; w < warp; ++w) whole += s.leave[w][c];
      if (warp == 1) whole += s.across[0][c] + s.across[1][c];
      if (warp == 2) whole += s.across[1][c] + s.across[2][c];
      CUTE_UNROLL
      for (int t = 0; t < 16; ++t) dg[half][t] += whole;
      inside_block(c, block, gates + c, padded, dg[half]);
    }
    __syncthreads();
    store_gate_parts(block);
  }

  // Pairs inside the warp's block for one channel, and the results of that channel.
  __device__ void inside_block(int c, int block, const float* gates, int64_t padded, float (&dg)[16]) {
    constexpr int kRow = kTileRow<Element>;
    const int own = 16 * warp;
    const Element *k = shared.x[0] + own * kRow + c, *q = shared.x[1] + own * kRow + c;
    const Element *E = shared.E + own * kRow + own, *F = shared.F + own * kRow + own;
    float G[16], source[16], to_k[16];
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      G[i] = gates[(own + i) * padded];
      source[i] = static_cast<float>(k[i * kRow]);
      to_k[i] = 0.f;
    }
    const int64_t channel = block * kTile + c;
    const bool exists = channel < in.key_dim;
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      const float q_i = static_cast<float>(q[i * kRow]), k_i = source[i];
      const float own_pair = static_cast<float>(F[i * kRow + i]);
      float to_q = own_pair * k_i, before = 0.f;
      to_k[i] += own_pair * q_i;
      CUTE_UNROLL
      for (int j = 0; j < 16; ++j) {
        if (j >= i) continue;
        const float e = exp2f(G[i] - G[j]), at = e * source[j];
        const float f = static_cast<float>(F[i * kRow + j]), d = static_cast<float>(E[i * kRow + j]);
        const float reader = f * q_i + d * k_i;
        to_q += f * at;
        to_k[i] += d * at;
        to_k[j] += reader * e;
        before += reader * at;
        dg[j + 1] += before;
      }
      if (exists && own + i < place.rows) args.dq_heads[row(own + i) * in.key_dim + channel] += to_q;
    }
    float rate = 0.f, bias = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (!exists || own + i >= place.rows) continue;
      const int64_t at = row(own + i) * in.key_dim + channel;
      args.dk_heads[at] += to_k[i];
      float A = 0.f;
      const float da = gate_gradient(in.g[at], static_cast<int>(channel), dg[i], A);
      args.dg[at] = da;
      rate += A, bias += da;
    }
    shared.sums.rate[warp][c] = rate, shared.sums.bias[warp][c] = bias;
  }

  // The next block of features writes the sums only after its own barriers.
  __device__ void store_gate_parts(int block) const {
    const int c = static_cast<int>(threadIdx.x), channel = block * kTile + c;
    if (args.gate_parts == nullptr || c >= kTile || channel >= in.key_dim) return;
    const auto& s = shared.sums;
    const int64_t half = static_cast<int64_t>(gridDim.x) * in.value_heads * in.key_dim;
    float* to = args.gate_parts + chunk * in.key_dim + channel;
    to[0] = s.rate[0][c] + s.rate[1][c] + s.rate[2][c] + s.rate[3][c];
    to[half] = s.bias[0][c] + s.bias[1][c] + s.bias[2][c] + s.bias[3][c];
  }

  __device__ void run() {
    if (place.rows == 0) return;
    start();
    if constexpr (kChannelGate) {
      for (int block = 0; block < tiles.keys && block * kTile < in.key_dim; ++block) channel_block(block);
    } else {
      run_head_gate();
    }
  }
};

template <class Element, bool kChannelGate>
__global__ void __launch_bounds__(kTileThreads)
    gradient_sm80_kernel(const __grid_constant__ GradientSm80Args args) {
  GradientCta<Element, kChannelGate>(
      args, *reinterpret_cast<GradientShared<Element, kChannelGate>*>(portable_shared))
      .run();
}

// ---- Sums, in a fixed order ----

// A warp per row [K] of dq (blockIdx.y = 0) or dk: the value heads of a group, and back through the norm.
template <class Element>
__global__ void __launch_bounds__(kTileThreads)
    sum_heads_sm80_kernel(const __grid_constant__ GradientSm80Args args) {
  const InputsSm80& in = args.in;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kTileThreads / 32) + threadIdx.x / 32;
  const int64_t token = row / in.heads, head = row % in.heads;
  const int64_t tokens =
      in.cu_seqlens != nullptr ? min(in.cu_seqlens[in.sequences], in.tokens) : in.batch * in.tokens;
  if (token >= tokens) return;
  const bool is_k = blockIdx.y == 1;
  const int64_t group = in.value_heads / in.heads, K = in.key_dim;
  const float* parts = (is_k ? args.dk_heads : args.dq_heads) + (token * in.value_heads + head * group) * K;
  const Element* raw = row_at<Element>(is_k ? in.k : in.q, token / in.tokens, token % in.tokens, head);
  Element* out = static_cast<Element*>(is_k ? args.dk : args.dq) + row * K;
  constexpr int kCount = kMostFeaturesSm80 / 32;
  float dy[kCount], x[kCount], along = 0.f, square = 0.f;
  CUTE_UNROLL
  for (int p = 0; p < kCount; ++p) {
    const int c = lane + 32 * p;
    dy[p] = x[p] = 0.f;
    if (c >= K) continue;
    for (int64_t r = 0; r < group; ++r) dy[p] += parts[r * K + c];
    x[p] = static_cast<float>(raw[c]);
    along += dy[p] * x[p];
    square += x[p] * x[p];
  }
  float rstd = 1.f, factor = 0.f;
  if (in.qk_l2norm) {  // dx = rstd (dy - y (y . dy)), y = rstd x
    CUTE_UNROLL
    for (int step = 16; step >= 1; step /= 2) {
      along += __shfl_xor_sync(0xffffffffu, along, step);
      square += __shfl_xor_sync(0xffffffffu, square, step);
    }
    rstd = 1.f / sqrtf(square + static_cast<float>(kNormEps));
    factor = along * rstd * rstd;
  }
  CUTE_UNROLL
  for (int p = 0; p < kCount; ++p)
    if (lane + 32 * p < K) out[lane + 32 * p] = Element(rstd * (dy[p] - factor * x[p]));
}

// A warp per sum over the chunks: dA_log (blockIdx.y = 0; over the channels too) or ddt_bias.
template <class Element>
__global__ void __launch_bounds__(32)
    sum_chunks_sm80_kernel(const __grid_constant__ GradientSm80Args args, int64_t slots) {
  const int64_t HV = args.in.value_heads, G = args.in.gate_dim(), index = blockIdx.x;
  const bool is_rate = blockIdx.y == 0;
  float* out = is_rate ? args.dA_log : args.ddt_bias;
  if (out == nullptr || (is_rate && index >= HV)) return;
  const float* parts = is_rate ? args.gate_parts + index * G : args.gate_parts + slots * HV * G + index;
  double sum = 0.0;
  for (int64_t slot = threadIdx.x; slot < slots; slot += 32) {
    if (find_chunk(args.in, slot).rows == 0) continue;
    for (int64_t c = 0; c < (is_rate ? G : 1); ++c) sum += parts[slot * HV * G + c];
  }
  CUTE_UNROLL
  for (int step = 16; step >= 1; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x == 0) out[index] = static_cast<float>(sum);
}

template <class Tag, bool kChannelGate>
int gradient_sm80<Tag, kChannelGate>::run(const GradientSm80Args& args, void* stream_) {
  using Element = portable_t<Tag>;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const InputsSm80& in = args.in;
  constexpr int kBytes = sizeof(GradientShared<Element, kChannelGate>);
  static_assert(kBytes <= kPortableShared);
  auto* kernel = &gradient_sm80_kernel<Element, kChannelGate>;
  if (const int error = allow_shared_memory(kernel, kBytes)) return error;
  const int64_t slots = ChunkSlots(in).total;
  const dim3 grid(static_cast<unsigned>(slots), static_cast<unsigned>(in.value_heads));
  kernel<<<grid, kTileThreads, kBytes, stream>>>(args);
  const int64_t rows = in.batch * in.tokens * in.heads, per_block = kTileThreads / 32;
  const dim3 row_grid(static_cast<unsigned>((rows + per_block - 1) / per_block), 2);
  sum_heads_sm80_kernel<Element><<<row_grid, kTileThreads, 0, stream>>>(args);
  if (args.gate_parts != nullptr) {
    const dim3 sum_grid(static_cast<unsigned>(in.value_heads * in.gate_dim()), 2);
    sum_chunks_sm80_kernel<Element><<<sum_grid, 32, 0, stream>>>(args, slots);
  }
  return cudaGetLastError();
}

}  // namespace nearfield::delta
