// What the warps that prepare a chunk with a gate per channel do (prepare_channel_sm90.cuh). e^{G_i - G_j}
// has a factor for each channel and does not split over 64 rows without overflow, so exponents are taken from
// rows between i and j, where no factor exceeds 1, however strong the gate. Rows are in blocks of 16. Pairs
// of different blocks I > J:
//   L_I = [k; q] e^{G_i - m_I} times R_J = k e^{m_(J+1) - G_j}, with m_I = G of the first row of block I,
// and e^{m_I - m_(J+1)} between them where the blocks are not neighbors. Pairs of the same block are grouped
// by the highest bit in which i and j differ. Each warp does it for the rows and channels that it owns
// (prepare_channel_rows_sm90.cuh). L takes the place of K and Q.
#pragma once

#include "delta/prepare_channel_rows_sm90.cuh"

namespace nearfield::delta {

// ---- Diagonal blocks: each warp its channels ----

// The power of two that brings a row of so many squares to a norm of at most 1, and back.
__device__ __forceinline__ float scale_for_levels(float squares) {
  const int power = (static_cast<int>(__float_as_uint(squares) >> 23 & 255) - 125) >> 1;
  return __uint_as_float((127 - power) << 23);
}
__device__ __forceinline__ float inverse_of_power(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

// Two channels times their decays in float16. In float16 itself, of which more is asked, the decays are not
// rounded.
template <bool kRounded>
__device__ __forceinline__ uint32_t decayed(uint32_t word, float2 e) {
  if constexpr (kRounded) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(word), "r"(pack<cutlass::half_t>(e.x, e.y)));
    return product;
  } else {
    const float2 x = unpack<cutlass::half_t>(word) * e;
    return pack<cutlass::half_t>(x.x, x.y);
  }
}

// Where the pair of columns 2 t and the next of row r of 8 x 8 is among those below the diagonal, all of
// which take 16 places; negative: it is not.
__device__ __forceinline__ int place_of_sums(int r, int t) { return 2 * t < r ? r * r / 4 + t : -1; }

// Pairs of a diagonal block over a warp's channels, grouped by the highest bit l in which i and j differ:
// between them lies a row m, the first with this bit set, and the decays from j to m and from m to i are at
// most 1, however strong the gate. For each level all rows are multiplied by their decay to the nearest such
// m; of its products those count whose m is the same. Takes K and Q.
template <class Traits>
__device__ __forceinline__ void diagonal_levels(typename Traits::Storage& s, const OwnRows<Traits>& own,
                                                KeysAndQueries& kq) {
  using Element = typename Traits::Element;
  constexpr bool kScaled = Traits::kScaled;
  constexpr int kSteps = OwnRows<Traits>::kSteps;
  const int lane = thread_now() % 32, r = lane / 4, t = lane % 4, first = Traits::kBlockRows * own.block;
  const auto& squares = s.products[own.half];
  if constexpr (kScaled) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int of_q = 0; of_q < 2; ++of_q) {
        const float scale = scale_for_levels(squares[of_q][first + 8 * h + r]);
        const uint32_t twice = __byte_perm(__float_as_uint(scale), 0, 0x3232);  // in bfloat16
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          CUTE_UNROLL
          for (int x = of_q; x < 4; x += 2) {
            uint32_t& word = kq[step][h][x];
            asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(twice));
            const float2 y = unpack<Element>(word);
            word = pack<cutlass::half_t>(y.x, y.y);
          }
        }
      }
    }
  }
  const auto decay = [&](const uint32_t (&left)[4], int step, uint32_t (&rows)[2][4]) {
    float2 e[4];
    own.decays(left, step, e);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) rows[h][x] = decayed<kScaled>(kq[step][h][x], e[x / 2 * 2 + h]);
    }
  };
  uint32_t left[4], rows[2][4];
  float far[4] = {},
        near[2][4] = {};  // rows 8 to 15 with those before; rows 0 to 7, and 8 to 15, with each other
  own.load_between(s, kOfLevel + 3, left);
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    decay(left, step, rows);
    warp_mma<cutlass::half_t>(far, rows[1], rows[0][0], rows[0][2]);
  }
  CUTE_NO_UNROLL
  for (int level = 2; level >= 0; --level) {
    own.load_between(s, kOfLevel + level, left);
    float sums[2][4] = {};
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      decay(left, step, rows);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) warp_mma<cutlass::half_t>(sums[h], rows[h], rows[h][0], rows[h][2]);
    }
    // Rows and columns of the same group of this level.
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x)
        if ((r ^ (2 * t + x % 2)) < 2 << level) near[h][x] = sums[h][x];
    }
  }
  auto& to = s.level_sums[own.number()];
  const auto put = [&](int at, const float (&sum)[4], int row, int column) {
    float2 of_row[2] = {{1.f, 1.f}, {1.f, 1.f}};
    if constexpr (kScaled) {
      const auto back = [&](int x, int i) {
        return inverse_of_power(scale_for_levels(squares[x][first + i]));
      };
      const float2 of_column{back(0, column), back(0, column + 1)};
      CUTE_UNROLL
      for (int x = 0; x < 2; ++x) of_row[x] = float2{back(x, row), back(x, row)} * of_column;
    }
    CUTE_UNROLL
    for (int x = 0; x < 2; ++x) to[x][at] = float2{sum[2 * x], sum[2 * x + 1]} * of_row[x];
  };
  put(lane, far, 8 + r, 2 * t);
  const int at = place_of_sums(r, t);
  if (at >= 0) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) put(32 + 16 * h + at, near[h], 8 * h + r, 8 * h + 2 * t);
  }
}

// Calls f(row, column, sums) for the pairs of columns of diagonal block w of A or of P that this lane has:
// the column and the next, which may be on the diagonal, of which the sums are not here.
template <bool kOfP, class Traits, class F>
__device__ __forceinline__ void for_block(typename Traits::Storage& s, int w, const F& f) {
  const int lane = thread_now() % 32;
  CUTE_UNROLL
  for (int at = lane; at < Traits::kLevelWords; at += 32) {
    float2 sums{0.f, 0.f};
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half)
      sums = sums + s.level_sums[half * Traits::kBlocks + w][kOfP][at];
    int i = 8 + lane / 4, j = lane % 4 * 2;
    if (at >= 32) {  // as place_of_sums has them
      const int place = lane % 16, row = 0x7777666555443321ull >> (4 * place) & 7, down = lane / 16 * 8;
      i = down + row, j = down + 2 * (place - row * row / 4);
    }
    f(Traits::kBlockRows * w + i, Traits::kBlockRows * w + j, sums);
  }
}

// ---- Rows ----

// A warp: norms and factors of its rows, from the products of all channels. Warps that share rows write the
// same.
template <class Traits>
__device__ __forceinline__ void put_factors(typename Traits::Storage& s, const ForwardInputsSm90& in,
                                            int block, int valid) {
  const int lane = thread_now() % 32, row = Traits::kBlockRows * block + lane;
  if (lane < Traits::kBlockRows) {
    const bool inside = row < valid;
    float sums[3] = {};
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half) {
      CUTE_UNROLL
      for (int x = 0; x < 3; ++x) sums[x] += s.products[half][x][row];
    }
    const auto norm = [&](float squares) {
      if (!inside) return 0.f;
      return in.qk_l2norm ? rsqrtf(squares + static_cast<float>(kNormEps)) : 1.f;
    };
    const float k_norm = norm(sums[0]), q_norm = norm(sums[1]),
                beta = inside ? activated_beta(in, s.raw_beta[row]) : 0.f;
    s.k_norm[row] = k_norm;
    s.q_norm[row] = q_norm;
    s.beta[row] = beta;
    s.a_row[row] = beta * k_norm;
    s.p_row[row] = static_cast<float>(in.scale) * q_norm;
    s.q_k[row] = sums[2];
    // Rows of L and R are times the norm of k, in bfloat16 those of q, too, so that one decay serves both.
    s.k_log[block][lane % 8][lane / 8] = {__log2f(k_norm), __log2f(k_norm)};
    s.q_row[row] = !inside ? 0.f : Traits::kScaled ? __fdividef(s.p_row[row], k_norm) : s.p_row[row];
  }
  __syncwarp();
}

// Kh, scale Qh and Kt to scratch; L and R.
template <class Traits>
__device__ __forceinline__ void scale_rows(typename Traits::Storage& s, const PrepareArgs& args,
                                           int64_t index, const OwnRows<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kLast = Traits::kBlocks - 1;
  const int number = own.number(), lane = thread_now() % 32, row = Traits::kBlockRows * own.block + lane / 4;
  {  // the lane's channels
    const float2 start = own.start(s);
    const auto put = [&](float* channels, float2 x) {
      *reinterpret_cast<float2*>(channels + 2 * lane) = exp2_fast(x);
    };
    put(s.from_start[number], start);
    put(s.to_end[number], own.after(s));
    if (own.block < 2) put(s.to_block[number][0], own.of(s.gates[own.block + 1]));
    if (own.block == 0) put(s.to_block[number][1], own.of(s.gates[1]) + own.of(s.gates[2]));
    if (own.block == kLast)
      own.put(args.scratch.decay + index * Traits::kKeyDim, exp2_fast(start + own.of(s.gates[own.block])));
  }
  __syncwarp();
  float k_log[4];
  load_four(&s.k_log[own.block][lane / 4], k_log);
  const float q_row[2] = {s.q_row[row], s.q_row[row + 8]};
  // Of word x of K or Q: rows + 8 (x % 2), channels + 8 (x / 2).
  const auto of_channels = [&](const float* channels, int step, int x) {
    return *reinterpret_cast<const float2*>(channels + 16 * step + x / 2 * 8 + lane % 4 * 2);
  };
  const auto rounded = [](float2 x) { return pack<Element>(x.x, x.y); };
  uint32_t anchor[4];
  own.load_between(s, kFromFirst, anchor);
  uint32_t k[OwnRows<Traits>::kSteps][4];
  // L, which nobody needs of the first block.
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
    uint32_t q[4], Kh[4], Qh[4], L[4];
    own.load(s, s.k, step, k[step]);
    own.load(s, s.q, step, q);
    const float2 from_start[2] = {of_channels(s.from_start[number], step, 0),
                                  of_channels(s.from_start[number], step, 2)};
    float2 e[4];
    own.decays(anchor, step, e, k_log);
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const float2 y = unpack<Element>(k[step][x]) * e[x];
      L[x] = rounded(y);
      Kh[x] = rounded(y * from_start[x / 2]);
    }
    if (own.block > 0) own.store(s, s.k, step, L);
    if constexpr (!Traits::kScaled) own.decays(anchor, step, e);
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      const float2 y = unpack<Element>(q[x]) * e[x];
      L[x] = rounded(y);
      Qh[x] = rounded(y * (float2{q_row[x % 2], q_row[x % 2]} * from_start[x / 2]));
    }
    if (own.block > 0) own.store(s, s.q, step, L);
    own.store(s, s.staged_k, step, Kh);
    own.store(s, s.staged_q, step, Qh);
  }
  own.send(args.scratch.Kh, index, s.staged_k);
  own.send(args.scratch.Qh, index, s.staged_q);
  // R, which nobody needs of the last block; also for blocks that are not the next. K becomes Kt.
  own.load_between(s, kToNext, anchor);
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) {
    float2 e[4];
    own.decays(anchor, step, e, k_log);
    uint32_t R[4];
    CUTE_UNROLL
    for (int x = 0; x < 4; ++x) {
      e[x] = unpack<Element>(k[step][x]) * e[x];
      R[x] = rounded(e[x]);
      k[step][x] = rounded(e[x] * of_channels(s.to_end[number], step, x));
    }
    if (own.block < kLast) own.store(s, s.right, step, R);
    const auto put_far = [&](const Element* tile, const float* to_block) {
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) R[x] = rounded(e[x] * of_channels(to_block, step, x));
      own.store(s, tile, step, R);
    };
    if (own.block < 2)
      put_far(own.block == 0 ? s.k : s.right + (kLast - 1) * Traits::kPart, s.to_block[number][0]);
    if (own.block == 0) put_far(s.q, s.to_block[number][1]);
  }
  if (lane == 0) tma_store_wait<1>();  // Kh has been read
  __syncwarp();
  CUTE_UNROLL
  for (int step = 0; step < OwnRows<Traits>::kSteps; ++step) own.store(s, s.staged_k, step, k[step]);
  own.send(args.scratch.Kt, index, s.staged_k);
  if (lane == 0) tma_store_wait<1>();  // and Qh, whose place P takes
}

// What rounding Kt lost, to scratch. K, gates and Kt come from memory again: hard chunks are few.
template <class Traits>
__device__ __forceinline__ void put_Kt_low(typename Traits::Storage& s, const PrepareArgs& args,
                                           const ChunkPlace& place, const OwnRows<Traits>& own) {
  using Element = typename Traits::Element;
  constexpr int kBlockRows = Traits::kBlockRows;
  const ForwardInputsSm90& in = args.in;
  const int c = own.channel(), first = kBlockRows * own.block;
  const auto to = [&](void* scratch) {
    return own.own(static_cast<Element*>(scratch) + place.index * Traits::kTile);
  };
  auto *Kt = to(args.scratch.Kt), *Kt_low = to(args.scratch.Kt_low);
  if (thread_now() % 32 == 0) wait_for_stores();
  __syncwarp();
  const auto* K = static_cast<const Element*>(in.k.data) + place.batch * in.k.batch +
                  place.head_k * in.k.head + place.token * in.k.token + c;
  const float2 to_end = exp2_fast(own.after(s));
  const Activation activation(in, place.head, c);
  const float* g = in.g + place.token_head(in, 0) * in.key_dim + c;
  float2 e{1.f, 1.f};
  CUTE_NO_UNROLL
  for (int i = kBlockRows - 1; i >= 0; --i) {
    const int row = first + i;
    if (row + 1 < place.valid && c < in.key_dim) {
      const float2 raw = *reinterpret_cast<const float2*>(g + (row + 1) * in.token_heads * in.key_dim);
      e = e * exp2_fast(activation(in, raw));
    }
    const bool inside = row < place.valid && c < in.key_dim;
    float2 x = unpack<Element>(inside ? *reinterpret_cast<const uint32_t*>(K + row * in.k.token) : 0u) * e;
    x = x * (float2{s.k_norm[row], s.k_norm[row]} * to_end);
    const auto at = [&](Element* image) {
      return reinterpret_cast<uint32_t*>(image_piece(image, i, c % kImageColumns / 8) + c % 8);
    };
    *at(Kt_low) = pack_low<Element>(x.x, x.y, __ldcg(at(Kt)));
  }
}

// ---- Pairs of different blocks ----

// A warp: [k; q] of block I times k of block J, all channels.
template <class Traits>
struct BlockProduct {
  float of_k[2][4] = {}, of_q[2][4] = {};  // columns 0 to 7 and 8 to 15

  __device__ __forceinline__ BlockProduct(typename Traits::Storage& s, int I, int J) {
    const int lane = thread_now() % 32;
    const int tile = bytes_to(s, I == J + 2 && J == 0 ? s.k
                                 : I == J + 3         ? s.q
                                                      : s.right),
              place = I == J + 2 && J == 1 ? I : J;
    const auto start = [&](int block) { return cast_smem_ptr_to_uint(&s) + block * Traits::kPart * 2; };
    const uint32_t left_start = start(I) + matrix_start(lane / 8 % 2, lane / 16),
                   right_start = start(place) + tile + matrix_start(lane / 16, lane / 8 % 2);
    CUTE_UNROLL
    for (int half = 0; half < Traits::kHalves; ++half) {
      CUTE_UNROLL
      for (int piece = 0; piece < 8; piece += 2) {
        uint32_t k[4], q[4], right[4];
        load_matrices(right_start, half * kImageBytes, piece, right);
        load_matrices(left_start, bytes_to(s, s.k + half * kImage), piece, k);
        load_matrices(left_start, bytes_to(s, s.q + half * kImage), piece, q);
        CUTE_UNROLL
        for (int n = 0; n < 2; ++n) {
          warp_mma<typename Traits::Element>(of_k[n], k, right[2 * n], right[2 * n + 1]);
          warp_mma<typename Traits::Element>(of_q[n], q, right[2 * n], right[2 * n + 1]);
        }
      }
    }
  }

  // Its part of A and of P.
  __device__ __forceinline__ void put(typename Traits::Storage& s, int I, int J) const {
    using Element = typename Traits::Element;
    const int lane = thread_now() % 32, t = lane % 4, block = SplitBlocks::index(I, J);
    uint32_t words[2][2];  // of P
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h + lane / 4, i = 16 * I + row;
        const auto scaled = [&](const float (&c)[4], float factor) -> float2 {
          return {factor * c[2 * h], factor * c[2 * h + 1]};
        };
        const float2 a = scaled(of_k[n], s.beta[i]), p = scaled(of_q[n], s.q_row[i]);
        uint32_t high, low;
        split_pair(a.x, a.y, high, low);
        const int at = block_piece_at(row, n) + 2 * t;
        *reinterpret_cast<uint32_t*>(&s.a.high[block][at]) = high;
        *reinterpret_cast<uint32_t*>(&s.a.low[block][at]) = low;
        words[n][h] = pack<Element>(p.x, p.y);
        if constexpr (Traits::kLow) {
          *reinterpret_cast<uint32_t*>(image_piece(s.p_low, i, 2 * J + n) + 2 * t) =
              pack_low<Element>(p.x, p.y, words[n][h]);
        }
      }
    }
    SM90_U16x8_STSM_T::copy(words[0][0], words[0][1], words[1][0], words[1][1],
                            matrices_at<false>(s.np, 16 * J, 2 * I));
  }
};

// A warp: diagonal block w of P; in what P lost to rounding also zeros above the diagonal.
template <class Traits>
__device__ __forceinline__ void put_diagonal_of_P(typename Traits::Storage& s, int w) {
  using Element = typename Traits::Element;
  const int lane = thread_now() % 32;
  if constexpr (Traits::kLow) {
    *reinterpret_cast<uint4*>(image_piece(s.p_low, 16 * w + lane % 16, 2 * w + lane / 16)) =
        uint4{0, 0, 0, 0};
    __syncwarp();
  }
  const auto put = [&](int i, int j, float2 p) {
    const float factor = s.p_row[i];
    const float2 k_norm = *reinterpret_cast<const float2*>(&s.k_norm[j]);
    p = p * (float2{factor, factor} * k_norm);
    const uint32_t high = pack<Element>(p.x, p.y);
    CUTE_UNROLL
    for (int e = 0; e < 2; ++e) {
      *reinterpret_cast<uint16_t*>(image_piece(s.np, j + e, i / 8) + i % 8) =
          static_cast<uint16_t>(high >> 16 * e);
    }
    if constexpr (Traits::kLow)
      *reinterpret_cast<uint32_t*>(image_piece(s.p_low, i, j / 8) + j % 8) =
          pack_low<Element>(p.x, p.y, high);
  };
  if (lane < 8) {
    const int i = 16 * w + 2 * lane;
    put(i, i, {s.q_k[i], 0.f});
  }
  for_block<true, Traits>(s, w, [&](int i, int j, float2 sums) {
    if (j + 1 == i) sums.y = s.q_k[i];
    put(i, j, sums);
  });
}

}  // namespace nearfield::delta
