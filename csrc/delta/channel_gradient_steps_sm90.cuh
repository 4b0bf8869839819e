// The steps of chunk_gradient_channel_sm90.cuh: products of a warp's rows and channels, pairs of rows in
// different blocks and in one, dg.
#pragma once

#include "delta/gradient_steps_sm90.cuh"

namespace nearfield::delta {

constexpr int kBlockRows = 16, kBlocks = kRows / kBlockRows;
constexpr int kGroupColumns = 32, kGroupPieces = kGroupColumns / 8;

// What a warp owns: rows 16 block and following, channels 32 group and following.
struct OwnPart {
  int block, group;

  __device__ __forceinline__ OwnPart() {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    group = warp / kBlocks;
    block = (warp + group) % kBlocks;  // blocks differ in work, and a scheduler has every fourth warp
  }
  __device__ __forceinline__ int index() const { return kBlocks * group + block; }
  __device__ __forceinline__ int first_row() const { return kBlockRows * block; }
  __device__ __forceinline__ int first_channel() const { return kGroupColumns * group; }
  // The image with its channels, and the first piece there.
  template <class Element>
  __device__ __forceinline__ Element* image(Element* images) const {
    return images + group / 2 * kImage;
  }
  __device__ __forceinline__ int first_piece() const { return group % 2 * kGroupPieces; }
};

// Of the part: row first_row + lane / 4 + 8 h, channels 8 n + 2 (lane % 4) and the next at 4 n + 2 h.
__device__ __forceinline__ auto part_accumulator() {
  Tensor acc = make_tensor<float>(Int<4 * kGroupPieces>{});
  clear(acc);
  return acc;
}

// dA = -tril(Y V'^T, -1) and dP = s tril(dO V'^T): the warp takes the columns of one block.
template <class Storage>
__device__ __forceinline__ void score_gradients(Storage& s, const OwnPart& part, int value_images,
                                                float scale) {
  using Element = std::remove_reference_t<decltype(s.q[0])>;
  const int lane = threadIdx.x % 32, columns = part.group;
  if (columns > part.block) return;
  float dA[2][4] = {}, dP[2][4] = {};
  CUTE_NO_UNROLL
  for (int v = 0; v < value_images; ++v) {
    CUTE_UNROLL
    for (int piece = 0; piece < 8; piece += 2) {
      uint32_t y[4], d[4], b[4];
      const auto at = [&](Element* images) -> auto& {
        return matrices_at<true>(images + v * kImage, part.first_row(), piece);
      };
      SM75_U32x4_LDSM_N::copy(at(s.y), y[0], y[1], y[2], y[3]);
      SM75_U32x4_LDSM_N::copy(at(s.dout), d[0], d[1], d[2], d[3]);
      SM75_U32x4_LDSM_N::copy(matrices_at<false>(s.v_new + v * kImage, kBlockRows * columns, piece), b[0],
                              b[1], b[2], b[3]);
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        warp_mma<Element>(dA[n], y, b[2 * n], b[2 * n + 1]);
        warp_mma<Element>(dP[n], d, b[2 * n], b[2 * n + 1]);
      }
    }
  }
  if (columns == part.block && has_diagonal()) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h)
      s.sums.y_vnew[part.first_row() + lane / 4 + 8 * h] = lane & 4 ? dA[h][2 * h + 1] : dA[h][2 * h];
  }
  CUTE_UNROLL
  for (int n = 0; n < 2; ++n) {
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) dA[n][x] *= -1.f, dP[n][x] *= scale;
  }
  if (columns == part.block) {
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const int n = x / 2, h = x % 2, i = lane / 4 + 8 * h, j = 8 * n + lane % 4 * 2;
      *reinterpret_cast<float4*>(&s.diagonal[part.block][i][j]) =
          float4{i > j ? dA[n][2 * h] : 0.f, i >= j ? dP[n][2 * h] : 0.f, i > j + 1 ? dA[n][2 * h + 1] : 0.f,
                 i >= j + 1 ? dP[n][2 * h + 1] : 0.f};
    }
    return;
  }
  const auto store = [&](Element* image, const float (&c)[2][4]) {
    uint32_t words[4];
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) words[x] = pack<Element>(c[x / 2][x % 2 * 2], c[x / 2][x % 2 * 2 + 1]);
    store_rows<2>(image, part.block, words, 2 * columns);
  };
  store(s.dA, dA);
  store(s.dP, dP);
}

// acc += the part's rows of `left` [64][values] times its channels of a state [values][channels], for each
// of several.
template <int kProducts, class Element, class Acc>
__device__ __forceinline__ void through_state(const OwnPart& part, int value_images, Element* states,
                                              Element* const (&left)[kProducts],
                                              Acc* const (&acc)[kProducts]) {
  CUTE_NO_UNROLL
  for (int v = 0; v < value_images; ++v) {
    Element* state = part.image(states + 2 * v * kImage);
    CUTE_UNROLL
    for (int piece = 0; piece < 8; piece += 2) {
      uint32_t a[kProducts][4];
      CUTE_UNROLL
      for (int p = 0; p < kProducts; ++p)
        SM75_U32x4_LDSM_N::copy(matrices_at<true>(left[p] + v * kImage, part.first_row(), piece), a[p][0],
                                a[p][1], a[p][2], a[p][3]);
      CUTE_UNROLL
      for (int n = 0; n < kGroupPieces; n += 2) {
        uint32_t b[4];
        SM75_U16x8_LDSM_T::copy(matrices_at<true>(state, 8 * piece, part.first_piece() + n), b[0], b[1], b[2],
                                b[3]);
        CUTE_UNROLL
        for (int p = 0; p < kProducts; ++p) {
          CUTE_UNROLL
          for (int x = 0; x < 2; ++x) {
            float (&c)[4] = *reinterpret_cast<float (*)[4]>(&(*acc[p])(4 * (n + x)));
            warp_mma<Element>(c, a[p], b[2 * x], b[2 * x + 1]);
          }
        }
      }
    }
  }
}

// Calls f(index in an accumulator of the part, h, that element of the image and the next).
template <class Element, class F>
__device__ __forceinline__ void for_elements(Element* images, const OwnPart& part, const F& f) {
  CUTE_UNROLL
  for (int n = 0; n < kGroupPieces; n += 2) {
    uint32_t words[4];
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(part.image(images), part.first_row(), part.first_piece() + n),
                            words[0], words[1], words[2], words[3]);
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w) f(4 * (n + w / 2) + 2 * (w % 2), w % 2, unpack<Element>(words[w]));
  }
}

// Where a warp keeps row `row` and channel `column` of its part: banks differ for eight columns of four rows
// as well as for the columns of a row.
__device__ __forceinline__ float& parked_at(float* parked, int row, int column) {
  return parked[row * kGroupColumns + (column ^ (row & 3) << 3)];
}
// Calls f(index in the accumulator, the two neighbours there) for the warp's part.
template <class F>
__device__ __forceinline__ void for_parked(float* parked, const F& f) {
  const int lane = threadIdx.x % 32;
  CUTE_UNROLL
  for (int x = 0; x < 2 * kGroupPieces; ++x)
    f(2 * x,
      *reinterpret_cast<float2*>(&parked_at(parked, 8 * (x % 2) + lane / 4, 8 * (x / 2) + 2 * (lane % 4))));
}

// One piece of 8 channels of a row times a factor and decays.
template <class Element>
__device__ __forceinline__ uint4 scaled_piece(const uint4& piece, float factor, const float (&decay)[8]) {
  const uint32_t in[4] = {piece.x, piece.y, piece.z, piece.w};
  uint32_t out[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<Element>(in[i]);
    out[i] = pack<Element>(factor * x.x * decay[2 * i], factor * x.y * decay[2 * i + 1]);
  }
  return {out[0], out[1], out[2], out[3]};
}

// The operands of the pairs of different blocks, and the decays from block to block. All threads, a piece of
// two rows each.
template <class Traits>
__device__ __forceinline__ void scale_blocks(typename Traits::Storage& s) {
  using Element = typename Traits::Element;
  if (threadIdx.x < 2 * Traits::kKeyDim) {
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
  constexpr int kAtOnce = Traits::kThreads / 16;
  CUTE_NO_UNROLL
  for (int row = threadIdx.x / 16; row < kRows; row += kAtOnce) {
    const int block = row / kBlockRows;
    const auto at = [&](Element* images) -> uint4& {
      return *reinterpret_cast<uint4*>(image_piece(images + offset, row, piece % 8));
    };
    float here[8], anchor[8], decay[8];
    gates(row, here);
    const float k_norm = s.k_norm[row];
    const uint4 k = at(s.k);
    if (block < kBlocks - 1) {
      gates(kBlockRows * (block + 1), anchor);
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) decay[c] = exp2_fast(anchor[c] - here[c]);
      at(s.k_source) = scaled_piece<Element>(k, k_norm, decay);
    }
    if (block > 0) {
      gates(kBlockRows * block, anchor);
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) decay[c] = exp2_fast(here[c] - anchor[c]);
      at(s.k_reader) = scaled_piece<Element>(k, k_norm * s.beta[row], decay);
      at(s.q_reader) = scaled_piece<Element>(at(s.q), s.q_norm[row], decay);
    }
  }
}

// Pairs of different blocks. dk_row (without beta) and dk_column: as reader and as source.
template <class Traits, class Acc>
__device__ __forceinline__ void cross_blocks(typename Traits::Storage& s, const OwnPart& part, Acc& dq,
                                             Acc& dk_row, Acc& dk_column) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, block = part.block, row0 = part.first_row() + lane / 4;
  Element* k_source = part.image(s.k_source);
  Element *k_reader = part.image(s.k_reader), *q_reader = part.image(s.q_reader);
  const int channels = part.first_channel() + 2 * (lane % 4);  // of this lane in piece 0
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
  if (block > 0) {
    // This block reads: sources in blocks J before, at the anchor of block J + 1.
    float to_q[kGroupPieces][4] = {}, to_k[kGroupPieces][4] = {};
    CUTE_NO_UNROLL
    for (int J = 0; J < block; ++J) {
      if (J > 0) {
        CUTE_UNROLL
        for (int n = 0; n < kGroupPieces; ++n) {
          const float2 decay = step(J, n);
          scale(to_q[n], decay);
          scale(to_k[n], decay);
        }
      }
      uint32_t a[4], p[4];
      SM75_U32x4_LDSM_N::copy(matrices_at<true>(s.dA, part.first_row(), 2 * J), a[0], a[1], a[2], a[3]);
      SM75_U32x4_LDSM_N::copy(matrices_at<true>(s.dP, part.first_row(), 2 * J), p[0], p[1], p[2], p[3]);
      CUTE_UNROLL
      for (int n = 0; n < kGroupPieces; n += 2) {
        uint32_t b[4];
        SM75_U16x8_LDSM_T::copy(matrices_at<true>(k_source, kBlockRows * J, part.first_piece() + n), b[0],
                                b[1], b[2], b[3]);
        CUTE_UNROLL
        for (int x = 0; x < 2; ++x) {
          warp_mma<Element>(to_q[n + x], p, b[2 * x], b[2 * x + 1]);
          warp_mma<Element>(to_k[n + x], a, b[2 * x], b[2 * x + 1]);
        }
      }
    }
    CUTE_UNROLL
    for (int x = 0; x < 2 * kGroupPieces; ++x) {
      const int n = x / 2, h = x % 2, at = 4 * n + 2 * h;
      const float2 decay = between(row0 + 8 * h, part.first_row(), n);
      dq(at) += decay.x * to_q[n][2 * h], dq(at + 1) += decay.y * to_q[n][2 * h + 1];
      dk_row(at) += decay.x * to_k[n][2 * h], dk_row(at + 1) += decay.y * to_k[n][2 * h + 1];
    }
  }
  if (block == kBlocks - 1) return;
  CUTE_UNROLL
  for (int pair = 0; pair < kGroupPieces / 2; ++pair) {
    // This block is read: by blocks I behind. far: not by the next block; last: by block 3, if that is not
    // far.
    float sum[2][4] = {}, far[2][4] = {}, last[2][4] = {};
    for (int I = kBlocks - 1; I > block; --I) {
      if (I < kBlocks - 1) {
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float2 decay = step(I, 2 * pair + n);
          scale(sum[n], decay);
          scale(last[n], decay);
          CUTE_UNROLL
          for (int x = 0; x < 4; ++x) {
            if (I == block + 1) far[n][x] = sum[n][x];
            if (I == 2) last[n][x] = sum[n][x];
          }
        }
      }
      uint32_t a[4], p[4], k[4], q[4];
      SM75_U16x8_LDSM_T::copy(matrices_at<false>(s.dA, kBlockRows * I, 2 * block), a[0], a[1], a[2], a[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<false>(s.dP, kBlockRows * I, 2 * block), p[0], p[1], p[2], p[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<true>(k_reader, kBlockRows * I, part.first_piece() + 2 * pair),
                              k[0], k[1], k[2], k[3]);
      SM75_U16x8_LDSM_T::copy(matrices_at<true>(q_reader, kBlockRows * I, part.first_piece() + 2 * pair),
                              q[0], q[1], q[2], q[3]);
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        warp_mma<Element>(sum[n], a, k[2 * n], k[2 * n + 1]);
        warp_mma<Element>(sum[n], p, q[2 * n], q[2 * n + 1]);
      }
    }
    uint32_t words[4];
    SM75_U32x4_LDSM_N::copy(
        matrices_at<true>(part.image(s.k), part.first_row(), part.first_piece() + 2 * pair), words[0],
        words[1], words[2], words[3]);
    float sums[4 * 2] = {};  // far and last, of both pieces
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const int n = x / 2, h = x % 2, at = 4 * (2 * pair + n) + 2 * h;
      const float2 decay = between(part.first_row() + kBlockRows, row0 + 8 * h, 2 * pair + n);
      float2 k = unpack<Element>(words[x]);
      const float norm = s.k_norm[row0 + 8 * h];
      dk_column(at) += decay.x * sum[n][2 * h], dk_column(at + 1) += decay.y * sum[n][2 * h + 1];
      k.x *= norm * decay.x, k.y *= norm * decay.y;
      sums[2 * n] += k.x * far[n][2 * h], sums[2 * n + 1] += k.y * far[n][2 * h + 1];
      sums[4 + 2 * n] += k.x * last[n][2 * h], sums[5 + 2 * n] += k.y * last[n][2 * h + 1];
    }
    if (block > 1) continue;
    const float2 passing = sum_over_rows(sums);
    const int which = lane / 8;
    if ((lane & 4) == 0 && (block == 0 || which < 2))
      *reinterpret_cast<float2*>(
          &s.sums.pairs[block == 0 ? which / 2 : 2][channels + 8 * (2 * pair + which % 2)]) = passing;
  }
}

// e^{G_C} S . dS per channel: a warp has 8 channels, whose products with themselves are the diagonal of one
// by mma.sync.
template <class Element>
__device__ __forceinline__ void state_dots(Element* state, Element* d_state, int value_images,
                                           const float* G_end, float* out) {
  const int lane = threadIdx.x % 32, piece = threadIdx.x / 32;
  float sum[4] = {};
  CUTE_NO_UNROLL
  for (int v = 0; v < value_images; ++v) {
    CUTE_UNROLL
    for (int x = 0; x < kRows; x += 32) {
      const auto load = [&](Element* images, uint32_t (&to)[4]) {
        Element* from = image_piece(images + (2 * v + piece / 8) * kImage, x + lane, piece % 8);
        SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const uint128_t*>(from), to[0], to[1], to[2], to[3]);
      };
      uint32_t a[4], b[4];
      load(state, a);
      load(d_state, b);
      warp_mma<Element>(sum, {a[0], 0, a[1], 0}, b[0], b[1]);
      warp_mma<Element>(sum, {a[2], 0, a[3], 0}, b[2], b[3]);
    }
  }
  const int channel = 8 * piece + lane / 4;
  if (has_diagonal()) out[channel] = (lane & 4 ? sum[1] : sum[0]) * exp2_fast(G_end[channel]);
}

// The pairs within a block, a lane per channel: what they give is added to the parked dq and dk and to dg.
// From the last row to the first, so that dk_j has what reaches it from rows from i on when row i asks for
// it:
//   dg_i += sum_{j < i} k_j sum_{m >= i} e^{G_m - G_j} (beta_m dA_mj k_m + dP_mj q_m)
// and k . dk as a reader where dbeta needs it.
template <class Traits>
__device__ __forceinline__ void pairs_in_block(typename Traits::Storage& s, const OwnPart& part,
                                               bool dbeta_needs_k) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, first = part.first_row();
  const float* G = s.G + first * Traits::kGateRow + part.first_channel() + lane;
  float *parked_q = s.parked_dq[part.index()], *parked_k = s.parked_dk[part.index()];
  float* parked_g = s.dg[part.index()];
  const auto value = [&](Element* images, int i) {
    return static_cast<float>(
        image_piece(part.image(images), first + i, part.first_piece() + lane / 8)[lane % 8]);
  };
  // dq and dg take the places of q and the decays.
  float k[kBlockRows], q[kBlockRows], decay[kBlockRows], dk[kBlockRows] = {}, k_dk[kBlockRows];
  float before = G[0];
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) {
    k[i] = s.k_norm[first + i] * value(s.k, i);
    q[i] = s.q_norm[first + i] * value(s.q, i);
    const float here = G[i * Traits::kGateRow];
    decay[i] = exp2_fast(here - before);
    before = here;
  }
  CUTE_UNROLL
  for (int i = kBlockRows - 1; i >= 0; --i) {
    const float beta = s.beta[first + i], beta_k = beta * k[i];
    const float2* d = s.diagonal[part.block][i];
    float dq = d[i].y * k[i], dk_row = 0.f, dg = 0.f, e = 1.f;
    CUTE_UNROLL
    for (int j = i - 1; j >= 0; --j) {
      e *= decay[j + 1];
      const float source = e * k[j];
      dq += d[j].y * source;
      dk_row += d[j].x * source;
      dk[j] += e * (d[j].x * beta_k + d[j].y * q[i]);
      dg += k[j] * dk[j];
    }
    k_dk[i] = k[i] * dk_row;
    dk[i] += d[i].y * q[i] + beta * dk_row;
    q[i] = dq;
    decay[i] = dg;
  }
  CUTE_UNROLL
  for (int i = 0; i < kBlockRows; ++i) {
    parked_at(parked_q, i, lane) += q[i];
    parked_at(parked_k, i, lane) += dk[i];
    parked_at(parked_g, i, lane) += decay[i];
  }
  if (!dbeta_needs_k) return;
  sum_over_lanes<1, 1>(k_dk);
  if (lane % 2 == 0) s.sums.k_diagonal[part.group][first + lane / 2] = k_dk[0];
}

// dg of the part, a lane per channel, through the activation of the gate to memory.
template <class Traits>
__device__ __forceinline__ void finish_gates(typename Traits::Storage& s, const OwnPart& part,
                                             const ChunkGradientArgs& args, const GradientPlace& z) {
  const InputsSm90& in = args.in;
  const int lane = threadIdx.x % 32, channel = part.first_channel() + lane;
  const int rows = min(z.valid - part.first_row(), kBlockRows);  // may be negative
  const bool inside = channel < in.key_dim;
  float* dg = s.dg[part.index()];
  const int64_t stride = z.row * in.key_dim;
  float* out = args.dg + z.first_row * in.key_dim + part.first_row() * stride + channel;
  if (in.gate == Gate::kLog) {
    CUTE_UNROLL
    for (int t = 0; t < kBlockRows; ++t)
      if (t < rows && inside) out[t * stride] = parked_at(dg, t, lane);
    return;
  }
  const float rate = in.A_log != nullptr ? expf(in.A_log[z.head]) : 1.f;
  const float bias = in.dt_bias != nullptr && inside ? in.dt_bias[z.head * in.key_dim + channel] : 0.f;
  const float* g = in.g + z.token_head(in, part.first_row()) * in.key_dim + channel;
  const int64_t g_stride = in.value_heads * in.key_dim;
  constexpr int kAtOnce = 4;
  float d_rate = 0.f, d_bias = 0.f;
  CUTE_NO_UNROLL
  for (int first = 0; first < (inside ? rows : 0); first += kAtOnce) {
    float x[kAtOnce];
    CUTE_UNROLL
    for (int t = 0; t < kAtOnce; ++t) x[t] = bias + (first + t < rows ? g[(first + t) * g_stride] : 0.f);
    CUTE_UNROLL
    for (int t = 0; t < kAtOnce; ++t) {
      if (first + t >= rows) break;
      const float dg_t = parked_at(dg, first + t, lane);
      float da;
      if (in.gate == Gate::kSoftplus) {
        da = -dg_t * rate * sigmoid(x[t]);
        d_rate += dg_t * log2_decay(in, x[t], rate) * (1.f / kLog2e);
      } else {
        const float open = sigmoid(rate * x[t]);
        da = dg_t * static_cast<float>(in.gate_bound) * open * (1.f - open) * rate;
        d_rate += da * x[t];
      }
      d_bias += da;
      out[(first + t) * stride] = da;
    }
  }
  if (args.rate_parts == nullptr) return;
  if (inside) args.bias_parts[z.part(in, kBlocks, part.block) * in.key_dim + channel] = d_bias;
  CUTE_UNROLL
  for (int step = 16; step >= 1; step /= 2) d_rate += __shfl_xor_sync(0xffffffffu, d_rate, step);
  if (lane == 0) args.rate_parts[z.part(in, Traits::kWarps, part.index())] = d_rate;
}

}  // namespace nearfield::delta
