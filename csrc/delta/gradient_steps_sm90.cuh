// What the chunk gradient's warps do with accumulators and images: products, sums over rows, columns, pairs
// of tokens and states, and gradients on their way out. An accumulator is (64 rows, 64 columns) or some of
// the columns, of which a warp has rows 16 warp and following.
#pragma once

#include "delta/gradient_place_sm90.cuh"
#include "nearfield/matrices.cuh"

namespace nearfield::delta {

// ---- Products ----

// acc (+)= A B of two images, contracting 64.
template <bool kZeroInit, class LayoutA, class LayoutB, class Element, class Mma, class Acc>
__device__ __forceinline__ void multiply(Mma& mma, Element* a, Element* b, Acc& acc) {
  const auto thread_mma = mma.get_slice(threadIdx.x % 128);
  Tensor sA = make_tensor(make_smem_ptr(a), LayoutA{});
  Tensor sB = make_tensor(make_smem_ptr(b), LayoutB{});
  issue_gemm<kZeroInit>(mma, thread_mma.partition_fragment_A(sA), thread_mma.partition_fragment_B(sB), acc);
}

// acc (+)= A B for half of the features of an image, of which the descriptors are those of the whole, 64
// bytes further on.
template <class Traits, bool kZeroInit, class Element, class Acc>
__device__ __forceinline__ void multiply_half(Element* a, Element* b, int half, Acc& acc) {
  typename Traits::MmaFeatures mma;
  const auto thread_mma = mma.get_slice(threadIdx.x % 128);
  Tensor A =
      thread_mma.partition_fragment_A(make_tensor(make_smem_ptr(a), LayoutByRow<Element, kImageColumns>{}));
  Tensor B = thread_mma.partition_fragment_B(
      make_tensor(make_smem_ptr(b), LayoutByFeature<Element, kImageColumns>{}));
  warpgroup_fence_operand(acc);
  warpgroup_arrive();
  CUTE_UNROLL
  for (int k = 0; k < size<2>(A); ++k) {
    auto b_at = *B(_, _, k).data();
    b_at.bitfield.start_address_ += 4 * half;
    const uint64_t from_a = *A(_, _, k).data(), from_b = b_at;
    const auto fma = [&](auto&... d) {
      Traits::HalfAtom::fma(from_a, from_b, d...,
                            kZeroInit && k == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One);
    };
    fma(acc(0), acc(1), acc(2), acc(3), acc(4), acc(5), acc(6), acc(7), acc(8), acc(9), acc(10), acc(11),
        acc(12), acc(13), acc(14), acc(15));
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(acc);
}

// ---- Matrices of an image ----

// Where a lane begins with a warp's 16 rows of an image, at piece `first_piece`. Pieces of a row are permuted
// by XOR, so those j further on are where some of the bits 4 to 6 are flipped.
template <class Element>
__device__ __forceinline__ uint32_t rows_at(Element* image, int warp, int first_piece = 0) {
  return opaque(cast_smem_ptr_to_uint(&matrices_at<true>(image, 16 * warp, first_piece)));
}
// store_rows of a whole image and store_transposed.
template <class Element>
__device__ __forceinline__ void store_both_ways(Element* image, Element* image_transposed, int warp,
                                                const uint32_t (&words)[16],
                                                const uint32_t (&transposed)[16]) {
  const uint32_t at = rows_at(image, warp);
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    store_matrices(at ^ j * 16, words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]);
  }
  const uint32_t at_transposed =
      opaque(cast_smem_ptr_to_uint(&matrices_at<false>(image_transposed, 0, 2 * warp)));
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    store_matrices_transposed(at_transposed + 8 * j * kImageColumns * 2, transposed[2 * j],
                              transposed[2 * j + 1], transposed[2 * j + 2], transposed[2 * j + 3]);
  }
}

// ---- Rows, diagonals and sums ----

// Sums that the compiler must have by here: it would hold what they are made of, in registers that are
// spilled then, until they are stored.
template <class... Sums>
__device__ __forceinline__ void settle(Sums&... sums) {
  (..., [](float& x) { asm volatile("" : "+f"(x)); }(sums));
}

// Of a (64, 8 pieces) accumulator: the product of 64 rows with all columns of an image, or some of them.
template <class Acc>
constexpr int kPiecesOf = decltype(size(std::declval<Acc>()))::value / 4;

// For each pair of columns of an accumulator and the same of an image, from a piece on: f(place in the
// accumulator, h, pair), in row 16 warp + lane / 4 + 8 h.
template <class Element, class Acc, class F>
__device__ __forceinline__ void for_pairs_of(Element* image, int warp, int first_piece, const Acc&,
                                             const F& f) {
  const uint32_t at = rows_at(image, warp, first_piece);
  CUTE_UNROLL
  for (int j = 0; j < kPiecesOf<Acc>; j += 2) {
    uint32_t words[4];
    load_matrices(at ^ j * 16, words);
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w) f(4 * (j + w / 2) + 2 * (w % 2), w % 2, unpack<Element>(words[w]));
  }
}

// The rows of an accumulator times those of an image, summed over the columns: for rows 16 warp + lane / 4
// and + 8, in every lane of a quad.
template <class Element, class Acc>
__device__ __forceinline__ void row_dots(Element* image, int warp, const Acc& acc, float (&sum)[2],
                                         int first_piece = 0) {
  sum[0] = sum[1] = 0.f;
  for_pairs_of(image, warp, first_piece, acc,
               [&](int at, int h, float2 x) { sum[h] += x.x * acc(at) + x.y * acc(at + 1); });
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
  }
}

template <class Acc>
__device__ __forceinline__ void scale_rows(Acc& acc, float first, float second) {
  CUTE_UNROLL
  for (int x = 0; x < size(acc); ++x) acc(x) *= x % 4 < 2 ? first : second;
}

// acc -= factor of the row times the row of the image.
template <class Element, class Acc>
__device__ __forceinline__ void subtract_rows(Element* image, int warp, const float (&factor)[2], Acc& acc,
                                              int first_piece) {
  for_pairs_of(image, warp, first_piece, acc, [&](int at, int h, float2 x) {
    acc(at) -= factor[h] * x.x;
    acc(at + 1) -= factor[h] * x.y;
  });
}

// The diagonal of a (64, 64) accumulator: rows 16 warp + lane / 4 and + 8, in the lanes that have it.
__device__ __forceinline__ bool has_diagonal() { return threadIdx.x % 4 == threadIdx.x % 32 / 8; }
template <class Acc>
__device__ __forceinline__ void diagonal_of(const Acc& acc, int warp, float (&diagonal)[2]) {
  const bool odd = threadIdx.x & 4;
  CUTE_UNROLL
  for (int n = 0; n < 8; ++n) {
    const int h = n % 2, at = 4 * n + 2 * h;
    if (n / 2 == warp) diagonal[h] = odd ? acc(at + 1) : acc(at);
  }
}

// This lane's share of the sum of products of 16 rows (values) of two states, each [K / 64] images: the
// diagonals of 8 x 8 blocks of S dS^T by mma.sync, half of which is thrown away. has_read(j): its pieces j
// and j + 1 of the state's first image.
template <class Element, class Read>
__device__ __forceinline__ float dot_of_states(Element* state, Element* d_state, int warp,
                                               const Read& has_read) {
  float upper[4] = {}, lower[4] = {};
  const uint32_t at_state = rows_at(state, warp), at_d_state = rows_at(d_state, warp);
  CUTE_UNROLL
  for (int k = 0; k < 2; ++k) {
    CUTE_UNROLL
    for (int j = 0; j < 8; j += 2) {
      uint32_t a[4], b[4];
      load_matrices((at_state + k * kImageBytes) ^ j * 16, a);
      load_matrices((at_d_state + k * kImageBytes) ^ j * 16, b);
      warp_mma<Element>(upper, a, b[0], b[2]);
      warp_mma<Element>(lower, a, b[1], b[3]);
      if (k == 0) has_read(j);
    }
  }
  const bool odd = threadIdx.x & 4;
  return has_diagonal() ? (odd ? upper[1] + lower[3] : upper[0] + lower[2]) : 0.f;
}

// Four threads per row, in rows that ask for it, of which there are few: a thread's share of a row of V, and
// the dot product of Y with it. All reads at once: each is one of memory.
template <class Element>
__device__ __forceinline__ void load_v_row(const Element* v, int columns, uint4 (&pieces)[4]) {
  CUTE_UNROLL
  for (int m = 0; m < 4; ++m) {
    const int piece = 4 * m + static_cast<int>(threadIdx.x % 4);
    pieces[m] = uint4{0, 0, 0, 0};
    if (v != nullptr && piece * 8 < columns) pieces[m] = *reinterpret_cast<const uint4*>(v + piece * 8);
  }
}
template <class Element>
__device__ __forceinline__ float dot_with_v(Element* y, const uint4 (&pieces)[4], int columns) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  float sum = 0.f;
  CUTE_UNROLL
  for (int m = 0; m < 4; ++m) {
    const int piece = 4 * m + part;
    if (piece * 8 >= columns) continue;
    const uint4 a = *reinterpret_cast<const uint4*>(image_piece(y + piece / 8 * kImage, row, piece % 8));
    const uint4 b = pieces[m];
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    CUTE_UNROLL
    for (int w = 0; w < 4; ++w) {
      const float2 p = unpack<Element>(left[w]), r = unpack<Element>(right[w]);
      sum += p.x * r.x + p.y * r.y;
    }
  }
  sum += __shfl_xor_sync(kAll, sum, 1);
  return sum + __shfl_xor_sync(kAll, sum, 2);
}

// kCount sums over the lanes that differ in bits from kLowest to kStep: each step halves those of a lane,
// until it has kKept of them, from number kCount / (2 kStep) * (lane % (2 kStep)) on, rounded down to a
// multiple of kKept. kHeld: those left at this step, at the first all.
template <int kKept, int kLowest, int kStep = 16, int kHeld = -1, int kCount>
__device__ __forceinline__ void sum_over_lanes(float (&x)[kCount]) {
  constexpr int kLeft = (kHeld < 0 ? kCount : kHeld) / 2;
  CUTE_UNROLL
  for (int i = 0; i < (kLeft < kKept ? kKept : 0); ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], kStep);
  const bool upper = threadIdx.x & kStep;
  CUTE_UNROLL
  for (int i = 0; i < (kLeft < kKept ? 0 : kLeft); ++i) {
    const float give = upper ? x[i] : x[i + kLeft], keep = upper ? x[i + kLeft] : x[i];
    x[i] = keep + __shfl_xor_sync(0xffffffffu, give, kStep);
  }
  if constexpr (kStep > kLowest) sum_over_lanes<kKept, kLowest, kStep / 2, kLeft>(x);
}
// Eight lanes (lane / 4) share columns 8 n + 2 (lane % 4) and the next, n < 8 or n < 4; their sums end in
// lanes with n = lane / 4, or n = lane / 8.
template <int kColumns>
__device__ __forceinline__ float2 sum_over_rows(float (&column)[kColumns]) {
  sum_over_lanes<2, 4>(column);
  return {column[0], column[1]};
}
template <int kColumns>
__device__ __forceinline__ int column_after_sum() {
  const int lane = threadIdx.x % 32;
  return 8 * (lane / (64 / kColumns)) + 2 * (lane % 4);
}

// Sum over rows i >= t and columns j < t of a strictly lower (64, 64) accumulator M, over this warp's 16
// rows: the lane ends with t = 16 (lane % 4) + lane / 4 and t + 8. By products of triangles and blocks of
// ones with M^T, whose accumulator has M's words as right operands, in two halves of bfloat16.
template <class Acc>
__device__ __forceinline__ void pair_sums(const Acc& m, int warp, float (&sum)[2]) {
  using Half = cutlass::bfloat16_t;
  const int lane = threadIdx.x % 32, quad = lane % 4, r = lane / 4;
  constexpr uint32_t kOnes = 0x3f803f80u;
  const uint32_t below = (2 * quad < r ? kOnes & 0xffffu : 0u) | (2 * quad + 1 < r ? kOnes << 16 : 0u);
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes}, triangle[4] = {below, kOnes, 0u, below};
  float column[8] = {}, last[2] = {};  // of rows t; of those of the block on the diagonal
  float before[2][4] = {};             // [h][..] with rows t, columns i: all columns j of earlier blocks
  CUTE_UNROLL
  for (int block = 0; block < 4; ++block) {
    float all[2][4];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int at = 8 * block + 2 * h;
      uint32_t high[2], low[2];
      CUTE_UNROLL
      for (int x = 0; x < 2; ++x) {
        high[x] = pack<Half>(m(at + 4 * x), m(at + 4 * x + 1));
        low[x] = pack_low<Half>(m(at + 4 * x), m(at + 4 * x + 1), high[x]);
      }
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) all[h][x] = before[h][x];
      warp_mma<Half>(all[h], triangle, high[0], high[1]);
      warp_mma<Half>(all[h], triangle, low[0], low[1]);
      if (block < warp) {
        warp_mma<Half>(before[h], ones, high[0], high[1]);
        warp_mma<Half>(before[h], ones, low[0], low[1]);
      }
    }
    if (block == warp) {  // rows i = 2 quad and the next beside t = lane / 4, in 8 of each
      const auto from_t = [&](float even, float odd) {
        return (2 * quad >= r ? even : 0.f) + (2 * quad + 1 >= r ? odd : 0.f);
      };
      last[0] = from_t(all[0][0], all[0][1]) + (all[1][0] + all[1][1]);
      last[1] = from_t(all[1][2], all[1][3]);
      break;
    }
    column[2 * block] = (all[0][0] + all[0][1]) + (all[1][0] + all[1][1]);
    column[2 * block + 1] = (all[0][2] + all[0][3]) + (all[1][2] + all[1][3]);
  }
  CUTE_UNROLL
  for (int x = 0; x < 8; ++x)
    if (x / 2 == warp) column[x] = last[x % 2];
  sum_over_lanes<2, 1, 2>(column);
  sum[0] = column[0], sum[1] = column[1];
}

// ---- Out ----

// A warp's 16 rows of an accumulator, rounded, to rows of `out` that are `stride` elements apart.
template <class Element, class Acc>
__device__ __forceinline__ void store_gradient(Element* image, int warp, int first_piece, const Acc& acc,
                                               Element* out, int64_t stride, int valid, int columns) {
  constexpr int kPieces = kPiecesOf<Acc>, kAtOnce = 32 / kPieces;
  uint32_t words[2 * kPieces];
  CUTE_UNROLL
  for (int x = 0; x < 2 * kPieces; ++x) words[x] = pack<Element>(acc(2 * x), acc(2 * x + 1));
  store_rows<kPieces>(image, warp, words, first_piece);
  __syncwarp();
  const int lane = threadIdx.x % 32, piece = lane % kPieces;
  CUTE_UNROLL
  for (int i = 0; i < 16; i += kAtOnce) {
    const int row = 16 * warp + i + lane / kPieces;
    if (row < valid && piece * 8 < columns) {
      *reinterpret_cast<uint4*>(out + row * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(image_piece(image, row, first_piece + piece));
    }
  }
}

template <class Acc>
__device__ __forceinline__ void store_head_gradient(int warp, const Acc& acc, float* out, int64_t stride,
                                                    int valid, int columns) {
  const int lane = threadIdx.x % 32;
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = 16 * warp + 8 * h + lane / 4;
    CUTE_UNROLL
    for (int n = 0; n < kPiecesOf<Acc>; ++n) {
      const int column = 8 * n + 2 * (lane % 4);
      if (row < valid && column < columns)
        *reinterpret_cast<float2*>(out + row * stride + column) =
            float2{acc(4 * n + 2 * h), acc(4 * n + 2 * h + 1)};
    }
  }
}

// dq and dk of this warpgroup's features, times the factors of the norms, to where they belong. A warp has
// rows 16 warp and following. q and k: the images with these features; dq_image and dk_image: places for
// those on the way out. All threads.
template <class Element, class Sums, class Acc>
__device__ __forceinline__ void finish_rows(const ChunkGradientArgs& args, const GradientPlace& z, Sums& sums,
                                            int warp, Element* q, Element* k, Element* dq_image,
                                            Element* dk_image, Acc& dq, Acc& dk, const float (&q_norm)[2],
                                            const float (&k_norm)[2]) {
  const InputsSm90& in = args.in;
  const int wg = threadIdx.x / 128, lane = threadIdx.x % 32;
  constexpr int kColumns = 8 * kPiecesOf<Acc>, kGroups = static_cast<int>(std::extent_v<decltype(sums.q_dq)>);
  const int row0 = 16 * warp + lane / 4, first_key = wg * kColumns;
  const int first_piece = first_key % kImageColumns / 8;
  const int columns = static_cast<int>(in.key_dim) - first_key;
  if (args.dq_heads != nullptr) {
    const int64_t out = z.first_row * in.key_dim + first_key, stride = z.row * in.key_dim;
    store_head_gradient(warp, dq, args.dq_heads + out, stride, z.valid, columns);
    store_head_gradient(warp, dk, args.dk_heads + out, stride, z.valid, columns);
    return;
  }
  if (in.qk_l2norm) {  // dx = z - x rstd^2 (x . z), where z = rstd dy
    float q_dot[2], k_dot[2];
    row_dots(q, warp, dq, q_dot, first_piece);
    row_dots(k, warp, dk, k_dot, first_piece);
    if (lane % 4 == 0) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        sums.q_dq[wg][row0 + 8 * h] = q_dot[h];
        sums.k_dk[wg][row0 + 8 * h] = k_dot[h];
      }
    }
    __syncthreads();
    float along[2][2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int i = row0 + 8 * h;
      float of_q = 0.f, of_k = 0.f;
      CUTE_UNROLL
      for (int g = 0; g < kGroups; ++g) of_q += sums.q_dq[g][i], of_k += sums.k_dk[g][i];
      along[0][h] = q_norm[h] * q_norm[h] * of_q;
      along[1][h] = k_norm[h] * k_norm[h] * of_k;
    }
    subtract_rows(q, warp, along[0], dq, first_piece);
    subtract_rows(k, warp, along[1], dk, first_piece);
  }
  // one block, and as many value heads as key heads
  const int64_t out = z.first_row * in.key_dim + first_key, stride = z.row * in.key_dim;
  store_gradient(dq_image, warp, first_piece, dq, static_cast<Element*>(args.dq) + out, stride, z.valid,
                 columns);
  store_gradient(dk_image, warp, first_piece, dk, static_cast<Element*>(args.dk) + out, stride, z.valid,
                 columns);
}

}  // namespace nearfield::delta
