// As chunk_gradient_sm90.cuh, with a gate per channel. e^{G_i - G_j} then stands inside the sums over
// channels:
//   dq_i += sum_j dP_ij k_j e^{G_i - G_j},  dk_i += beta_i sum_j dA_ij k_j e^{G_i - G_j},  dk_j += sum_i (..)
//   e^{..}
// Rows are taken in four blocks of 16, one per warp (and 64 channels per warpgroup), anchored at their first
// rows, so that no exponent is positive:
//   * blocks I > J: products of k_j e^{G_(first of J + 1) - G_j} with k_i, q_i e^{G_i - G_(first of I)}; what
//   lies
//     between the two anchors is multiplied to the accumulators block after block (Horner).
//   * within a block: pair by pair in float32, a lane per channel, decays multiplied up from row to row.
// dg is the sum over pairs of README.md, grouped by these blocks. A warp keeps what belongs to its rows and
// channels to itself; accumulators turn into a column per lane through its own piece of shared memory.
// Memory: dO, Y -> dS -> scaled K -> dk; S -> dA, dP, scaled Q -> dq; V' -> sums.
#pragma once

#include "delta/chunk_gradient_sm90.cuh"

namespace nearfield::delta {

constexpr int kBlockRows = 16, kBlocks = kRows / kBlockRows;

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct ChunkGradientChannelTraits : ChunkGradientTraits<Tag, kKeyDim_> {
  using Base = ChunkGradientTraits<Tag, kKeyDim_>;
  using typename Base::Element;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kTile = Base::kTile, kImages = Base::kImages;
  static constexpr int kParked = kBlockRows * kImageColumns;  // floats of a warp's rows and channels
  // Floats in a row of G: rows that follow each other begin 8 banks apart, so that the channels of a quad of
  // eight rows are in different banks.
  static constexpr int kGateRow = kKeyDim + 8;

  struct Sums {
    // Per channel: of q dq + k dk through the entering state over blocks 1, 2, 3; of k dk through the leaving
    // state over blocks 0, 1, 2; over pairs of blocks 0 and (2, 3), 0 and 3, 1 and 3; e^{G_C} S . dS.
    float enter[3][kKeyDim], leave[3][kKeyDim], pairs[3][kKeyDim], through[kKeyDim];
    float k_row[2][kRows], k_diagonal[2][kRows];  // k . dk as a reader, without beta
    float y_vnew[kRows], y_v[kRows];
    float q_dq[2][kRows], k_dk[2][kRows];
  };
  struct Storage {
    alignas(1024) Element q[kTile];  // in the end dq on the way out, as dk in K
    alignas(1024) Element k[kTile];
    union {
      alignas(1024) Element v_new[kTile];
      struct {
        alignas(1024) float2 diagonal[kBlocks][kBlockRows][kBlockRows];  // (dA, dP)
        Sums sums;
      };
    };
    union {
      struct {
        alignas(1024) Element dout[kTile];
        alignas(1024) Element y[kTile];
      };
      alignas(1024) Element d_state[kImages * kTile];
      struct {
        alignas(1024) Element k_source[kTile];  // to the first row of the next block
        alignas(1024) Element k_reader[kTile];  // from the first row of the block, times beta
      };
      float parked_dk[8][kParked];
    };
    union {
      alignas(1024) Element state[kImages * kTile];
      struct {
        alignas(1024) Element dA[kImage];
        alignas(1024) Element dP[kImage];
        alignas(1024) Element q_reader[kTile];
      };
      float parked_dq[8][kParked];
    };
    alignas(128) float G[kRows * kGateRow];
    alignas(8) float steps[2][kKeyDim];  // e^{G_32 - G_16}, e^{G_48 - G_32}
    float beta[kRows], k_norm[kRows], q_norm[kRows];
    GradientPlace place;
    uint64_t qk_here, values_here, state_here, d_state_here;
  };
  static_assert(sizeof(Sums) + sizeof(float2) * kRows * kBlockRows <= kTile * sizeof(Element));
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// ---- Steps ----

// Calls f(index in a (64, 64) accumulator, h, that element of the image and the next); h: the row is
// 16 warp + 8 h + lane / 4.
template <class Element, class F>
__device__ __forceinline__ void for_elements(Element* image, int warp, const F& f) {
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    uint32_t words[4];
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(image, 16 * warp, j), words[0], words[1], words[2], words[3]);
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w) f(4 * (j + w / 2) + 2 * (w % 2), w % 2, unpack<Element>(words[w]));
  }
}

// Where a warp keeps row `row` (of 16) and channel `column` (of 64): banks differ for eight columns of four
// rows as well as for 32 columns of a row.
__device__ __forceinline__ float& parked_at(float* parked, int row, int column) {
  return parked[row * kImageColumns + (column ^ (row & 3) << 3)];
}
// Calls f(index in the accumulator, the two neighbours there) for the warp's part.
template <class F>
__device__ __forceinline__ void for_parked(float* parked, const F& f) {
  const int lane = threadIdx.x % 32;
  CUTE_UNROLL
  for (int x = 0; x < 16; ++x)
    f(2 * x,
      *reinterpret_cast<float2*>(&parked_at(parked, 8 * (x % 2) + lane / 4, 8 * (x / 2) + 2 * (lane % 4))));
}

// One piece of 8 channels of a row times 2^exponent and a factor.
template <class Element>
__device__ __forceinline__ uint4 scaled_piece(const uint4& piece, float factor, const float (&to)[8],
                                              const float (&from)[8]) {
  const uint32_t in[4] = {piece.x, piece.y, piece.z, piece.w};
  uint32_t out[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<Element>(in[i]);
    out[i] = pack<Element>(factor * x.x * exp2_fast(to[2 * i] - from[2 * i]),
                           factor * x.y * exp2_fast(to[2 * i + 1] - from[2 * i + 1]));
  }
  return {out[0], out[1], out[2], out[3]};
}

// The operands of the pairs of different blocks, and the decays from block to block. All threads, a piece of
// four rows each.
template <class Traits>
__device__ __forceinline__ void scale_blocks(typename Traits::Storage& s) {
  using Element = typename Traits::Element;
  static_assert(Traits::kThreads == 2 * Traits::kKeyDim);
  {
    const int to = threadIdx.x / Traits::kKeyDim, channel = threadIdx.x % Traits::kKeyDim;
    const float* from = s.G + (to + 1) * kBlockRows * Traits::kGateRow + channel;
    s.steps[to][channel] = exp2_fast(from[kBlockRows * Traits::kGateRow] - from[0]);
  }
  const int piece = threadIdx.x % 16, offset = piece / 8 * static_cast<int>(kImage);
  const auto gates = [&](int row, float (&g)[8]) {
    const auto* from = reinterpret_cast<const float4*>(s.G + row * Traits::kGateRow + 8 * piece);
    const float4 a = from[0], b = from[1];
    g[0] = a.x, g[1] = a.y, g[2] = a.z, g[3] = a.w, g[4] = b.x, g[5] = b.y, g[6] = b.z, g[7] = b.w;
  };
  CUTE_NO_UNROLL
  for (int block = 0; block < kBlocks; ++block) {
    const int row = kBlockRows * block + threadIdx.x / 16;
    const auto at = [&](Element* images) -> uint4& {
      return *reinterpret_cast<uint4*>(image_piece(images + offset, row, piece % 8));
    };
    float here[8], anchor[8];
    gates(row, here);
    const float k_norm = s.k_norm[row];
    const uint4 k = at(s.k);
    if (block < kBlocks - 1) {
      gates(kBlockRows * (block + 1), anchor);
      at(s.k_source) = scaled_piece<Element>(k, k_norm, anchor, here);
    }
    if (block > 0) {
      gates(kBlockRows * block, anchor);
      at(s.k_reader) = scaled_piece<Element>(k, k_norm * s.beta[row], here, anchor);
      at(s.q_reader) = scaled_piece<Element>(at(s.q), s.q_norm[row], here, anchor);
    }
  }
}

// Pairs of different blocks; the warp has block `warp` and the channels of warpgroup wg. dk_row (without
// beta) and dk_column: as reader and as source.
template <class Traits, class Acc>
__device__ __forceinline__ void cross_blocks(typename Traits::Storage& s, int wg, int warp, Acc& dq,
                                             Acc& dk_row, Acc& dk_column) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, row0 = kBlockRows * warp + lane / 4;
  Element* k_source = s.k_source + wg * kImage;
  Element *k_reader = s.k_reader + wg * kImage, *q_reader = s.q_reader + wg * kImage;
  const int channels = 64 * wg + 2 * (lane % 4);  // of this lane in piece 0
  const auto gate = [&](int row, int n) {
    return *reinterpret_cast<const float2*>(&s.G[row * Traits::kGateRow + channels + 8 * n]);
  };
  const auto step = [&](int J, int n) {  // from the anchor of block J, 1 or 2, to the next
    return *reinterpret_cast<const float2*>(&s.steps[J - 1][channels + 8 * n]);
  };
  const auto between = [&](int to, int from, int n) -> float2 {
    const float2 a = gate(to, n), b = gate(from, n);
    return {exp2_fast(a.x - b.x), exp2_fast(a.y - b.y)};
  };
  const auto scale = [](float (&c)[4], const float2& by) {
    c[0] *= by.x, c[1] *= by.y, c[2] *= by.x, c[3] *= by.y;
  };
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {  // of pieces of 8 channels
    // This block reads: sources in blocks J before, at the anchor of block J + 1.
    float to_q[2][4] = {}, to_k[2][4] = {};
    for (int J = 0; J < warp; ++J) {
      if (J > 0) {
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float2 decay = step(J, 2 * pair + n);
          scale(to_q[n], decay);
          scale(to_k[n], decay);
        }
      }
      uint32_t a[4], p[4], b[4];
      SM75_U32x4_LDSM_N::copy(matrices_at<true>(s.dA, kBlockRows * warp, 2 * J), a[0], a[1], a[2], a[3]);
      SM75_U32x4_LDSM_N::copy(matrices_at<true>(s.dP, kBlockRows * warp, 2 * J), p[0], p[1], p[2], p[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<true>(k_source, kBlockRows * J, 2 * pair), b[0], b[1], b[2], b[3]);
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        warp_mma<Element>(to_q[n], p, b[2 * n], b[2 * n + 1]);
        warp_mma<Element>(to_k[n], a, b[2 * n], b[2 * n + 1]);
      }
    }
    if (warp > 0) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int n = x / 2, h = x % 2, at = 4 * (2 * pair + n) + 2 * h;
        const float2 decay = between(row0 + 8 * h, kBlockRows * warp, 2 * pair + n);
        dq(at) += decay.x * to_q[n][2 * h], dq(at + 1) += decay.y * to_q[n][2 * h + 1];
        dk_row(at) += decay.x * to_k[n][2 * h], dk_row(at + 1) += decay.y * to_k[n][2 * h + 1];
      }
    }
  }
  if (warp == kBlocks - 1) return;
  CUTE_UNROLL
  for (int pair = 0; pair < 4; ++pair) {
    // This block is read: by blocks I behind. far: not by the next block; last: by block 3, if that is not
    // far.
    float sum[2][4] = {}, far[2][4] = {}, last[2][4] = {};
    for (int I = kBlocks - 1; I > warp; --I) {
      if (I < kBlocks - 1) {
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float2 decay = step(I, 2 * pair + n);
          scale(sum[n], decay);
          scale(last[n], decay);
          CUTE_UNROLL
          for (int x = 0; x < 4; ++x) {
            if (I == warp + 1) far[n][x] = sum[n][x];
            if (I == 2) last[n][x] = sum[n][x];
          }
        }
      }
      uint32_t a[4], p[4], k[4], q[4];
      SM75_U16x8_LDSM_T::copy(matrices_at<false>(s.dA, kBlockRows * I, 2 * warp), a[0], a[1], a[2], a[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<false>(s.dP, kBlockRows * I, 2 * warp), p[0], p[1], p[2], p[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<true>(k_reader, kBlockRows * I, 2 * pair), k[0], k[1], k[2], k[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<true>(q_reader, kBlockRows * I, 2 * pair), q[0], q[1], q[2], q[3]);
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        warp_mma<Element>(sum[n], a, k[2 * n], k[2 * n + 1]);
        warp_mma<Element>(sum[n], p, q[2 * n], q[2 * n + 1]);
      }
    }
    uint32_t words[4];
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(s.k + wg * kImage, kBlockRows * warp, 2 * pair), words[0],
                            words[1], words[2], words[3]);
    float far_sum[2][2] = {}, last_sum[2][2] = {};
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const int n = x / 2, h = x % 2, at = 4 * (2 * pair + n) + 2 * h;
      const float2 decay = between(kBlockRows * (warp + 1), row0 + 8 * h, 2 * pair + n);
      const float2 k = unpack<Element>(words[x]);
      const float norm = s.k_norm[row0 + 8 * h];
      dk_column(at) += decay.x * sum[n][2 * h], dk_column(at + 1) += decay.y * sum[n][2 * h + 1];
      far_sum[n][0] += norm * k.x * decay.x * far[n][2 * h];
      far_sum[n][1] += norm * k.y * decay.y * far[n][2 * h + 1];
      last_sum[n][0] += norm * k.x * decay.x * last[n][2 * h];
      last_sum[n][1] += norm * k.y * decay.y * last[n][2 * h + 1];
    }
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const int n = x / 2, e = x % 2, channel = 64 * wg + 8 * (2 * pair + n) + 2 * (lane % 4) + e;
      CUTE_UNROLL
      for (int lanes = 4; lanes <= 16; lanes *= 2) {
        far_sum[n][e] += __shfl_xor_sync(0xffffffffu, far_sum[n][e], lanes);
        last_sum[n][e] += __shfl_xor_sync(0xffffffffu, last_sum[n][e], lanes);
      }
      if (lane >= 4) continue;
      if (warp == 0) s.sums.pairs[0][channel] = far_sum[n][e], s.sums.pairs[1][channel] = last_sum[n][e];
      if (warp == 1) s.sums.pairs[2][channel] = far_sum[n][e];
    }
  }
}

// e^{G_C} S . dS per channel: a warp has 16 channels, a lane 8 of them and every 16th value.
template <class Element>
__device__ __forceinline__ void state_dots(Element* state, Element* d_state, int value_images,
                                           const float* G_end, float& out) {
  const int lane = threadIdx.x % 32, piece = 2 * (threadIdx.x / 32) + lane / 16;
  float sum[8] = {};
  for (int v = 0; v < value_images; ++v) {
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const auto at = [&](Element* images) {
        return *reinterpret_cast<const uint4*>(
            image_piece(images + (2 * v + piece / 8) * kImage, lane % 16 + 16 * x, piece % 8));
      };
      const uint4 a = at(state), b = at(d_state);
      const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) {
        const float2 y = unpack<Element>(left[w]), z = unpack<Element>(right[w]);
        sum[2 * w] += y.x * z.x;
        sum[2 * w + 1] += y.y * z.y;
      }
    }
  }
  CUTE_UNROLL
  for (int step = 8, left = 4; step >= 2; step /= 2, left /= 2) {
    const bool upper = lane & step;
    CUTE_UNROLL
    for (int x = 0; x < left; ++x) {
      const float give = upper ? sum[x] : sum[x + left], keep = upper ? sum[x + left] : sum[x];
      sum[x] = keep + __shfl_xor_sync(0xffffffffu, give, step);
    }
  }
  sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
  const int channel = 8 * piece + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2 + (lane >> 1 & 1);
  out = sum[0] * exp2_fast(G_end[channel]);
}
__device__ __forceinline__ int channel_of_state_dots() {
  const int lane = threadIdx.x % 32;
  return 16 * (threadIdx.x / 32) + lane / 16 * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2 +
         (lane >> 1 & 1);
}

// The pairs within a block of one channel, and dg with everything else of it (`others` of token t: row 16
// block + t). k, q: column of the block in their images; gradients are added to the parked ones.
struct BlockColumn {
  int column;            // of the warpgroup's 64
  const float* G;        // this channel, first row of the block
  int stride;            // between rows of G
  uint32_t no_division;  // rows whose dbeta needs k . dk
};
template <class Storage>
__device__ __forceinline__ void pairs_in_block(Storage& s, int wg, int block, const BlockColumn& z,
                                               float (&dg)[kBlockRows]) {
  using Element = std::remove_reference_t<decltype(s.q[0])>;
  const int lane = threadIdx.x % 32, part = 4 * wg + block, first = kBlockRows * block;
  float k[kBlockRows], decay[kBlockRows], dk[kBlockRows] = {};
  const auto value = [&](Element* images, int i) {
    return static_cast<float>(image_piece(images + wg * kImage, first + i, z.column / 8)[z.column % 8]);
  };
  float before = z.G[0];
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) {
    k[i] = s.k_norm[first + i] * value(s.k, i);
    const float here = z.G[i * z.stride];
    decay[i] = exp2_fast(here - before);
    before = here;
    dg[i] = 0.f;
  }
  const auto four_rows = [&](auto group) {  // a loop: code that is only run once has to be fetched each time
    constexpr int kFirst = 4 * decltype(group)::value, kColumns = kFirst + 4;
    CUTE_NO_UNROLL
    for (int i = kFirst; i < kColumns; ++i) {
      const float q = s.q_norm[first + i] * value(s.q, i), k_i = s.k_norm[first + i] * value(s.k, i);
      const float beta = s.beta[first + i], beta_k = beta * k_i;
      float dq = 0.f, dk_row = 0.f, e = 1.f, pair[kColumns];
      CUTE_UNROLL
      for (int j = kColumns - 1; j >= 0; --j) {  // dA and dP are 0 above the diagonal
        if (j < kColumns - 1) e = j < kFirst || j < i ? e * decay[j + 1] : 1.f;
        const float2 d = s.diagonal[block][i][j];
        const float source = e * k[j], reader = d.x * beta_k + d.y * q;
        dq += d.y * source;
        dk_row += d.x * source;
        dk[j] += e * reader;
        pair[j] = source * reader;
      }
      float sum = 0.f;
      CUTE_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        if (j >= kFirst) dk[j] += j == i ? beta * dk_row : 0.f;
        if (j == kColumns - 1) continue;
        sum += pair[j];
        dg[j + 1] += j < kFirst || j < i ? sum : 0.f;
      }
      parked_at(s.parked_dq[part], i, z.column) += dq;
      if (z.no_division >> i & 1) {
        float dot = k_i * dk_row;
        CUTE_UNROLL
        for (int step = 16; step >= 1; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        if (lane == 0) s.sums.k_diagonal[wg][first + i] += dot;
      }
    }
  };
  four_rows(Int<0>{});
  four_rows(Int<1>{});
  four_rows(Int<2>{});
  four_rows(Int<3>{});
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) parked_at(s.parked_dk[part], i, z.column) += dk[i];
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    chunk_gradient_channel_kernel(const __grid_constant__ ChunkGradientMaps maps,
                                  const __grid_constant__ ChunkGradientArgs args) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  using Features = LayoutByFeature<Element, kImageColumns>;
  using ByRow = LayoutByRow<Element, kImageColumns>;
  constexpr int kKeyDim = Traits::kKeyDim;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  wait_for_end_of_walk();
  const int wg = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quad = lane % 4;

  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&s.qk_here, &s.values_here, &s.state_here, &s.d_state_here})
      Barrier::init(barrier, 1);
    cutlass::arch::fence_barrier_init();
    s.place.find(args);
  }
  __syncthreads();
  const GradientPlace& z = s.place;
  if (!z.inside) {
    if (args.rate_parts == nullptr) return;
    if (lane == 0) args.rate_parts[z.part(in, 8, 4 * wg + warp)] = 0.f;
    const int64_t part = z.part(in, 4, warp) * in.key_dim;
    for (int c = 64 * wg + lane; c < min(64 * wg + 64, static_cast<int>(in.key_dim)); c += 32)
      args.bias_parts[part + c] = 0.f;
    return;
  }
  const int value_images = z.value_images;
  const ChunkRows& rows = args.rows[z.chunk];
  constexpr int kGateRow = Traits::kGateRow;

  if (threadIdx.x == 0) {
    const int head_k = static_cast<int>(z.head_k);
    Barrier::arrive_and_expect_tx(&s.qk_here, 2 * Traits::kTile * 2 + Traits::kTile * 4);
    load_tokens<kKeyDim>(maps.k, &s.qk_here, s.k, 0, z.token, head_k, z.sequence.batch);
    load_tokens<kKeyDim>(maps.q, &s.qk_here, s.q, 0, z.token, head_k, z.sequence.batch);
    load_values(s, maps, args, z);
  }
  if (threadIdx.x / 32 == 1) {
    for (int row = lane; row < kRows; row += 32) {
      const float* from = args.G + (z.chunk * kRows + row) * kKeyDim;
      copy_in(s.G + row * kGateRow, from, kKeyDim * 4, &s.qk_here);
    }
  }
  if (threadIdx.x < kRows) {
    s.beta[threadIdx.x] = rows.beta[threadIdx.x];
    s.k_norm[threadIdx.x] = rows.k_norm[threadIdx.x];
    s.q_norm[threadIdx.x] = rows.q_norm[threadIdx.x];
  }
  const Element* v = z.value_row<Element>(in, rows, threadIdx.x / 4);
  __syncthreads();
  Barrier::wait(&s.qk_here, 0);
  Barrier::wait(&s.values_here, 0);
  asm volatile("" ::: "memory");
  clear_tail(s, z.valid);

  // This thread's rows of every accumulator, its columns of a piece of 8 channels, and their gates.
  const int row0 = kBlockRows * warp + lane / 4;
  float beta[2], q_norm[2], k_norm[2];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    beta[h] = s.beta[row0 + 8 * h];
    q_norm[h] = s.q_norm[row0 + 8 * h];
    k_norm[h] = s.k_norm[row0 + 8 * h];
  }
  const auto gate = [&](int row, int n) {
    return *reinterpret_cast<const float2*>(&s.G[row * kGateRow + 64 * wg + 8 * n + 2 * quad]);
  };
  typename Traits::MmaRows mma_rows;
  typename Traits::MmaFeatures mma_features;
  const auto accumulator = [&] {
    return partition_fragment_C(mma_rows, cute::Shape<Int<kRows>, Int<kRows>>{});
  };

  // 1. First warpgroup: dA = -tril(Y V'^T, -1). Second: dP = s tril(dO V'^T). (rows i, rows j)
  uint32_t weights[16];
  float diagonal[8], y_vnew[2], y_v;  // of the diagonal block: index 4 (column / 8) + 2 h + e
  {
    Tensor product = accumulator();
    Element* left = wg == 0 ? s.y : s.dout;
    multiply<true, ByRow>(mma_rows, left, s.v_new, product);
    if (value_images == 2) multiply<false, ByRow>(mma_rows, left + kImage, s.v_new + kImage, product);
    y_v = dot_with_v(s.y, v, z.values(in));
    warpgroup_wait<0>();
    diagonal_of(product, warp, y_vnew);
    const float factor = wg == 0 ? -1.f : static_cast<float>(in.scale);
    CUTE_UNROLL
    for (int n = 0; n < 8; ++n) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const int i = row0 + 8 * (x / 2), j = 8 * n + 2 * quad + x % 2, at = 4 * n + x;
        product(at) = i > j || (wg == 1 && i == j) ? factor * product(at) : 0.f;
        if (n / 2 == warp) diagonal[4 * (n % 2) + x] = product(at);
      }
      weights[2 * n] = pack<Element>(product(4 * n), product(4 * n + 1));
      weights[2 * n + 1] = pack<Element>(product(4 * n + 2), product(4 * n + 3));
    }
  }

  // 2. Through the entering state: dq = s e^G dO S^T, dk = -e^G Y S^T (without beta).
  Barrier::wait(&s.state_here, 0);
  asm volatile("" ::: "memory");
  Tensor dq = accumulator(), dk_row = accumulator(), dk_column = accumulator();  // (rows, channels)
  const auto through_state = [&](Element* left, Element* state_images, auto& acc) {
    multiply<true, Features>(mma_features, left, state_images + wg * kImage, acc);
    if (value_images == 2)
      multiply<false, Features>(mma_features, left + kImage, state_images + (2 + wg) * kImage, acc);
  };
  through_state(s.dout, s.state, dq);
  through_state(s.y, s.state, dk_row);
  warpgroup_wait<0>();
  __syncthreads();  // dO and Y are free
  if (threadIdx.x == 0) load_states(s.d_state, args.d_states, &s.d_state_here, z);
  Element *q_image = s.q + wg * kImage, *k_image = s.k + wg * kImage;
  float2 enter, leave;
  {
    const float scale = static_cast<float>(in.scale);
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 g = gate(row0 + 8 * (x % 2), x / 2);
      const float first = exp2_fast(g.x), second = exp2_fast(g.y);
      dq(2 * x) *= scale * first, dq(2 * x + 1) *= scale * second;
      dk_row(2 * x) *= -first, dk_row(2 * x + 1) *= -second;
    }
    float column[16] = {};
    for_elements(q_image, warp, [&](int at, int h, float2 q) {
      column[at / 4 * 2] += q_norm[h] * q.x * dq(at);
      column[at / 4 * 2 + 1] += q_norm[h] * q.y * dq(at + 1);
    });
    for_elements(k_image, warp, [&](int at, int h, float2 k) {
      column[at / 4 * 2] += beta[h] * k_norm[h] * k.x * dk_row(at);
      column[at / 4 * 2 + 1] += beta[h] * k_norm[h] * k.y * dk_row(at + 1);
    });
    enter = sum_over_lanes(column);
  }

  // 3. Through the leaving state: dk = e^{G_C - G} V' dS^T.
  Barrier::wait(&s.d_state_here, 0);
  asm volatile("" ::: "memory");
  float through;
  through_state(s.v_new, s.d_state, dk_column);
  state_dots(s.state, s.d_state, value_images, s.G + (kRows - 1) * kGateRow, through);
  warpgroup_wait<0>();
  {
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 g = gate(row0 + 8 * (x % 2), x / 2), end = gate(kRows - 1, x / 2);
      dk_column(2 * x) *= exp2_fast(end.x - g.x), dk_column(2 * x + 1) *= exp2_fast(end.y - g.y);
    }
    float column[16] = {};
    for_elements(k_image, warp, [&](int at, int h, float2 k) {
      column[at / 4 * 2] += k_norm[h] * k.x * dk_column(at);
      column[at / 4 * 2 + 1] += k_norm[h] * k.y * dk_column(at + 1);
    });
    leave = sum_over_lanes(column);
  }
  __syncthreads();  // S, dS and V' are free

  // 4. Pairs of different blocks.
  store_rows(wg == 0 ? s.dA : s.dP, warp, weights);
  CUTE_UNROLL
  for (int x = 0; x < 8; ++x) {
    float2& pair = s.diagonal[warp][8 * (x / 2 % 2) + lane / 4][8 * (x / 4) + 2 * quad + x % 2];
    (wg == 0 ? pair.x : pair.y) = diagonal[x];
  }
  {
    const int channel = 64 * wg + column_after_sum();
    if (warp > 0) *reinterpret_cast<float2*>(&s.sums.enter[warp - 1][channel]) = enter;
    if (warp < 3) *reinterpret_cast<float2*>(&s.sums.leave[warp][channel]) = leave;
    if (lane % 2 == 0) s.sums.through[channel_of_state_dots()] = through;
    if (wg == 0 && has_diagonal()) {
      s.sums.y_vnew[row0] = y_vnew[0];
      s.sums.y_vnew[row0 + 8] = y_vnew[1];
    }
    if (threadIdx.x % 4 == 0) s.sums.y_v[threadIdx.x / 4] = y_v;
    if (threadIdx.x < 2 * kRows) s.sums.k_diagonal[threadIdx.x / kRows][threadIdx.x % kRows] = 0.f;
  }
  scale_blocks<Traits>(s);
  __syncthreads();
  cross_blocks<Traits>(s, wg, warp, dq, dk_row, dk_column);
  {
    float dot[2];
    row_dots(k_image, warp, dk_row, dot);
    if (quad == 0) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) s.sums.k_row[wg][row0 + 8 * h] = k_norm[h] * dot[h];
    }
  }
  __syncthreads();  // the operands are free, the sums complete

  // 5. A lane per channel from here. What dg_t has from other blocks: readers from t on, sources before t,
  // and what passes the whole block.
  float *parked_q = s.parked_dq[4 * wg + warp], *parked_k = s.parked_dk[4 * wg + warp];
  for_elements(q_image, warp, [&](int at, int h, float2 q) {
    float2& reader =
        *reinterpret_cast<float2*>(&parked_at(parked_q, 8 * h + lane / 4, 8 * (at / 4) + 2 * quad));
    reader = float2{q_norm[h] * q.x * dq(at), q_norm[h] * q.y * dq(at + 1)};
  });
  for_elements(k_image, warp, [&](int at, int h, float2 k) {
    const int row = 8 * h + lane / 4, column = 8 * (at / 4) + 2 * quad;
    float2& reader = *reinterpret_cast<float2*>(&parked_at(parked_q, row, column));
    float2& source = *reinterpret_cast<float2*>(&parked_at(parked_k, row, column));
    k.x *= k_norm[h], k.y *= k_norm[h];
    reader.x += beta[h] * k.x * dk_row(at), reader.y += beta[h] * k.y * dk_row(at + 1);
    source = float2{k.x * dk_column(at), k.y * dk_column(at + 1)};
    dk_row(at) = beta[h] * dk_row(at) + dk_column(at);
    dk_row(at + 1) = beta[h] * dk_row(at + 1) + dk_column(at + 1);
  });
  __syncwarp();
  // In dg, and in g.
  const int64_t dg_stride = z.row * in.key_dim, g_stride = in.value_heads * in.key_dim;
  float* dg_block = args.dg + z.first_row * in.key_dim + kBlockRows * warp * dg_stride + 64 * wg;
  const float* g_block = in.g + z.token_head(in, kBlockRows * warp) * in.key_dim + 64 * wg;
  const int block_rows = z.valid - kBlockRows * warp;  // may be negative
  CUTE_NO_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int column = lane + 32 * e, channel = 64 * wg + column;
    float whole = s.sums.through[channel];
    CUTE_UNROLL
    for (int b = 0; b < 3; ++b) {
      if (b + 1 > warp) whole += s.sums.enter[b][channel];
      if (b < warp) whole += s.sums.leave[b][channel];
    }
    if (warp == 1) whole += s.sums.pairs[0][channel];
    if (warp == 2) whole += s.sums.pairs[1][channel] + s.sums.pairs[2][channel];
    float others[kBlockRows], sum = 0.f;
    CUTE_UNROLL
    for (int t = 0; t < kBlockRows; ++t) {
      others[t] = sum;
      sum += parked_at(parked_k, t, column);
    }
    sum = 0.f;
    CUTE_UNROLL
    for (int t = kBlockRows - 1; t >= 0; --t) {
      sum += parked_at(parked_q, t, column);
      // dg waits at its place until the pairs of the block are known
      if (t < block_rows && channel < in.key_dim) dg_block[column + t * dg_stride] = others[t] + sum + whole;
    }
  }
  __syncwarp();
  for_parked(parked_q, [&](int at, float2& x) { x = float2{dq(at), dq(at + 1)}; });
  for_parked(parked_k, [&](int at, float2& x) { x = float2{dk_row(at), dk_row(at + 1)}; });
  __syncwarp();

  // 6. Pairs within the block; the gate's gradient through its activation.
  {
    const float rate = in.A_log != nullptr ? expf(in.A_log[z.head]) : 1.f;
    const uint32_t no_division = __ballot_sync(
        0xffffffffu, lane < kBlockRows && fabsf(s.beta[kBlockRows * warp + lane % 16]) < kLeastDivisor);
    float d_rate = 0.f;
    CUTE_NO_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = lane + 32 * e, channel = 64 * wg + column;
      float dg[kBlockRows], d_bias = 0.f;
      pairs_in_block(s, wg, warp,
                     {column, s.G + kBlockRows * warp * kGateRow + channel, kGateRow, no_division}, dg);
      if (channel >= in.key_dim) continue;
      const float bias = in.dt_bias != nullptr ? in.dt_bias[z.head * in.key_dim + channel] : 0.f;
      CUTE_UNROLL
      for (int t = 0; t < kBlockRows; ++t)
        if (t < block_rows) dg_block[column + t * dg_stride] += dg[t];
      CUTE_NO_UNROLL
      for (int t = 0; t < (in.gate == Gate::kLog ? 0 : min(block_rows, kBlockRows)); ++t) {
        float& out = dg_block[column + t * dg_stride];
        const float dg_t = out, x = g_block[column + t * g_stride] + bias;
        if (in.gate == Gate::kSoftplus) {
          out = -dg_t * rate * sigmoid(x);
          d_rate += dg_t * log2_decay(in, x, rate) * (1.f / kLog2e);
        } else {
          const float open = sigmoid(rate * x);
          out = dg_t * static_cast<float>(in.gate_bound) * open * (1.f - open) * rate;
          d_rate += out * x;
        }
        d_bias += out;
      }
      if (args.rate_parts != nullptr) args.bias_parts[z.part(in, 4, warp) * in.key_dim + channel] = d_bias;
    }
    if (args.rate_parts != nullptr) {
      CUTE_UNROLL
      for (int step = 16; step >= 1; step /= 2) d_rate += __shfl_xor_sync(0xffffffffu, d_rate, step);
      if (lane == 0) args.rate_parts[z.part(in, 8, 4 * wg + warp)] = d_rate;
    }
  }
  __syncwarp();
  for_parked(parked_q, [&](int at, float2& x) { dq(at) = x.x, dq(at + 1) = x.y; });
  for_parked(parked_k, [&](int at, float2& x) { dk_row(at) = x.x, dk_row(at + 1) = x.y; });
  __syncthreads();  // the sums are complete
  if (threadIdx.x < z.valid) {
    const int i = threadIdx.x;
    const float beta_i = s.beta[i];
    float dbeta = fabsf(beta_i) >= kLeastDivisor ? s.sums.y_vnew[i] / beta_i
                                                 : s.sums.y_v[i] + s.sums.k_row[0][i] + s.sums.k_row[1][i] +
                                                       s.sums.k_diagonal[0][i] + s.sums.k_diagonal[1][i];
    if (in.beta_activation != BetaActivation::kNone)
      dbeta *= beta_i * (1.f - beta_i / (in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f));
    args.dbeta[z.first_row + i * z.row] = dbeta;
  }
  scale_rows(dq, q_norm[0], q_norm[1]);
  scale_rows(dk_row, k_norm[0], k_norm[1]);
  finish_rows(args, z, s.sums, q_image, k_image, dq, dk_row, q_norm, k_norm);
}

template <class Tag, int kKeyDim>
int chunk_gradient_channel_sm90<Tag, kKeyDim>::run(const ChunkGradientArgs& args, void* stream) {
  using Traits = ChunkGradientChannelTraits<Tag, kKeyDim>;
  return launch_chunk_gradient<Traits>(chunk_gradient_channel_kernel<Traits>, args, std::is_same_v<Tag, bf16>,
                                       stream);
}

}  // namespace nearfield::delta
