// All gradients of a chunk but dv, from what the two walks have left: S (entering; of an odd chunk it may
// have to be made from that of the chunk before), dS (of the state after), V', Y. Token parallel: one CTA of
// two warpgroups per (slot, value head), two CTAs on an SM. Steps:
//   1. dA = -tril(Y V'^T, -1) and K K^T (first warpgroup), dP = s tril(dO V'^T) and Q K^T (second one): with
//      the decays they give E = beta dA . D, F = dP . D, and the pair sums that dbeta and dg need
//   2. dQh = s dO S^T, dKh = -Y S^T (without beta), each warpgroup for half of the key features
//   3. dKt = V' dS^T;  4. dq += F K, dk += (E + E^T) K + F^T Q
// Raw k and q are the operands; the factors of their norms go into rows and columns of E and F before
// rounding, and into the rows of what comes through the states (in float16 rows come after the products). dg
// is the sum over pairs of README.md: every term carries the decay across t. dS takes the place of dO and Y,
// E and F that of S. Where Y is said, it may be dV in its place, with 1 for beta (chunk_sm90.cuh).
#pragma once

#include "delta/gradient_loads_sm90.cuh"
#include "delta/gradient_steps_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct ChunkGradientTraits {
  using Element = element_t<Tag>;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr bool kAlwaysY = delta::kAlwaysY<Tag, /*kChannelGate=*/false>;
  static_assert(kKeyDim == 128, "each of the two warpgroups has an image of 64 key features");
  static constexpr int kThreads = 256;
  static constexpr int kImages = 2;  // of key or value features
  static constexpr int kTile = kImages * kImage;

  // E and F carry the norms of their rows and columns, so one image of each serves both ways. In float16 two
  // such factors may be out of range: there are two images, with the norms of the columns.
  static constexpr bool kNormsInside = std::is_same_v<Element, cutlass::bfloat16_t>;

  template <GMMA::Major kMajorA, GMMA::Major kMajorB>
  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<64>, Int<64>, Int<64>>, kMajorA,
                           kMajorB>()));
  // (64 values, K)
  using MmaToState = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<64>, Int<kKeyDim>, Int<64>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  using MmaRows = Mma<GMMA::Major::K, GMMA::Major::K>;       // right operand: rows of an image as N
  using MmaFeatures = Mma<GMMA::Major::K, GMMA::Major::MN>;  // right operand: features of an image as N
  using MmaColumns = Mma<GMMA::Major::MN, GMMA::Major::MN>;  // and columns of the left one as M
  using HalfAtom =
      std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                         SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::MN>,
                         SM90::GMMA::MMA_64x32x16_F32F16F16_SS<GMMA::Major::K, GMMA::Major::MN>>;
  using MmaHalf = decltype(make_tiled_mma(HalfAtom{}));

  struct OfWarp {  // what dg needs of each
    float pairs[kRows], through;
  };
  struct Sums {  // per row; [2] of a warpgroup
    // q . dO S^T, -k . Y S^T, k . V' dS^T and, of the first warpgroup, -dA . Abar: a lane of a quad has one
    float dots[4][2][kRows];
    OfWarp of_warp[kNormsInside ? 0 : 8];
    float q_dq[2][kRows], k_dk[2][kRows];
  };
  struct Storage {
    alignas(1024) Element q[kTile];  // to y ten images in a row
    alignas(1024) Element k[kTile];
    alignas(1024) Element v_new[kTile];  // in the end dq on the way out, and dk behind the sums
    union {
      struct {
        alignas(1024) Element dout[kTile];
        alignas(1024) Element y[kTile];
      };
      alignas(1024) Element d_state[kImages * kTile];
      Sums sums;
    };
    union {
      alignas(1024) Element state[kImages * kTile];  // S^T, [V / 64][K / 64] images
      struct {                                       // operands [rows of the result][contracted rows]
        alignas(1024) Element e[kImage];
        alignas(1024) Element e_t[kImage];
        alignas(1024) Element f[kImage];
        alignas(1024) Element f_t[kImage];
      };
      // With one image of E and F: each warp's sums are where it alone has read of S in the end.
      struct {
        Element of_pairs[kImage];
        struct {
          OfWarp sums;
          float rest[kImageBytes / 16 - sizeof(OfWarp) / 4];
        } of_warp[4];
      } half[2];
    };
    alignas(16) float G[kRows];
    float k_norm[kRows];
    float y_dot[kRows];  // Y . V', or where |beta| < kLeastDivisor Y . V
    GradientPlace place;
    uint64_t qk_here, values_here, state_here, state_made, d_state_here;

    __device__ __forceinline__ OfWarp& of_warp(int wg, int warp) {
      if constexpr (kNormsInside) return half[wg].of_warp[warp].sums;
      else return sums.of_warp[4 * wg + warp];
    }
  };
  static_assert(sizeof(Sums) <= 2 * kImageBytes);
  static_assert(2 * (sizeof(Storage) + 1024) <= 228 * 1024, "two CTAs on an SM");
};

// Barriers at which one warp, or a warp of each warpgroup, waits for the others.
enum ChunkGradientBarrier : uint32_t { kValuesRead, kKeysRead, kDoutAndYRead, kSumsHere };

// ---- Steps ----

// A warp, with two write strengths a lane: this chunk has Y, else dV in its place.
template <class Traits>
__device__ __forceinline__ bool gradient_has_y(float2 beta) {
  return Traits::kAlwaysY || needs_y(fminf(fabsf(beta.x), fabsf(beta.y)));
}

// One warp, two tokens per lane: dbeta from the sums, and through the activation.
template <class Traits>
__device__ __forceinline__ void finish_beta(const ChunkGradientArgs& a, const GradientPlace& z,
                                            const typename Traits::Storage& s) {
  const InputsSm90& in = a.in;
  const auto& sums = s.sums;
  const int lane = threadIdx.x % 32;
  const float2 betas = reinterpret_cast<const float2*>(a.rows[z.chunk].beta)[lane];
  const bool with_y = gradient_has_y<Traits>(betas);
  const float2 k_reads = reinterpret_cast<const float2*>(a.rows[z.chunk].k_read)[lane];
  cutlass::arch::NamedBarrier::sync(Traits::kThreads, kSumsHere);
  CUTE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i >= z.valid) continue;
    const float beta = e ? betas.y : betas.x, k_read = e ? k_reads.y : k_reads.x;
    const float k_dot = sums.dots[1][0][i] + sums.dots[1][1][i];
    // V'_i / beta_i is the error r_i against the memory just before token i, and dbeta_i = Y_i . r_i.
    float dbeta;
    if (!with_y) {
      dbeta = s.y_dot[i] / beta / beta;
    } else if (fabsf(beta) >= kLeastDivisor) {
      dbeta = s.y_dot[i] / beta;
    } else {
      dbeta = s.y_dot[i] + k_read * k_dot + sums.dots[3][0][i];
    }
    if (in.beta_activation != BetaActivation::kNone) {
      const float top = in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f;
      dbeta *= beta * (1.f - beta / top);
    }
    a.dbeta[z.first_row + i * z.row] = dbeta;
  }
}

// One warp, two tokens per lane: dg from the sums, and through the activation.
template <class Traits>
__device__ __forceinline__ void finish_gate(const ChunkGradientArgs& a, const GradientPlace& z,
                                            typename Traits::Storage& s) {
  const InputsSm90& in = a.in;
  const auto& sums = s.sums;
  const int lane = threadIdx.x % 32;
  const auto of_rows = [&](const float* row) { return reinterpret_cast<const float2*>(row)[lane]; };
  const ChunkRows& rows = a.rows[z.chunk];
  float2 beta = of_rows(rows.beta);
  const float2 q_read = of_rows(rows.q_read), k_read = of_rows(rows.k_read);
  const float2 k_write = of_rows(rows.k_write);
  if (!gradient_has_y<Traits>(beta)) beta = {1.f, 1.f};  // of dV, not of Y
  cutlass::arch::NamedBarrier::sync(Traits::kThreads, kSumsHere);
  if (a.dg == nullptr) return;
  constexpr uint32_t kAll = 0xffffffffu;
  const auto dot = [&](int which, int e) {
    const int i = 2 * lane + e;
    return sums.dots[which][0][i] + sums.dots[which][1][i];
  };
  const float enter[2] = {q_read.x * dot(0, 0) + beta.x * k_read.x * dot(1, 0),
                          q_read.y * dot(0, 1) + beta.y * k_read.y * dot(1, 1)};
  const float leave[2] = {k_write.x * dot(2, 0), k_write.y * dot(2, 1)};
  // Readers from t on, sources before t.
  float from = enter[0] + enter[1], before = leave[0] + leave[1];
  CUTE_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const float above = __shfl_down_sync(kAll, from, step), below = __shfl_up_sync(kAll, before, step);
    if (lane + step < 32) from += above;
    if (lane >= step) before += below;
  }
  before = __shfl_up_sync(kAll, before, 1);
  if (lane == 0) before = 0.f;
  const float later = __shfl_down_sync(kAll, from, 1);
  float through = 0.f;
  CUTE_UNROLL
  for (int w = 0; w < 8; ++w) through += s.of_warp(w / 4, w % 4).through;
  through *= exp2_fast(s.G[kRows - 1]);

  const float rate = in.A_log != nullptr ? expf(in.A_log[z.head]) : 1.f;
  const float bias = in.dt_bias != nullptr ? in.dt_bias[z.head] : 0.f;
  float d_rate = 0.f, d_bias = 0.f;
  CUTE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i >= z.valid) continue;
    float pairs = 0.f;
    CUTE_UNROLL
    for (int w = 0; w < 8; ++w) pairs += s.of_warp(w / 4, w % 4).pairs[i];
    const float readers = e == 0 ? from : (lane < 31 ? later : 0.f) + enter[1];
    const float sources = e == 0 ? before : before + leave[0];
    const float dg = through + readers + sources + pairs;
    float da = dg;
    if (in.gate != Gate::kLog) {
      const float x = in.g[z.token_head(in, i)] + bias;
      if (in.gate == Gate::kSoftplus) {
        da = -dg * rate * sigmoid(x);
        d_rate += dg * log2_decay(in, x, rate) * (1.f / kLog2e);
      } else {
        const float open = sigmoid(rate * x);
        da = dg * static_cast<float>(in.gate_bound) * open * (1.f - open) * rate;
        d_rate += da * x;
      }
      d_bias += da;
    }
    a.dg[z.first_row + i * z.row] = da;
  }
  if (a.rate_parts == nullptr) return;
  CUTE_UNROLL
  for (int step = 16; step >= 1; step /= 2) {
    d_rate += __shfl_xor_sync(kAll, d_rate, step);
    d_bias += __shfl_xor_sync(kAll, d_bias, step);
  }
  if (lane == 0) {
    a.rate_parts[z.part(in, 1, 0)] = d_rate;
    a.bias_parts[z.part(in, 1, 0)] = d_bias;
  }
}

// The entering state of an odd chunk from that of the chunk before, S <- e^{G_C} S + Kt^T V', rounded once
// more: a warp has 16 values. Warp 1 calls load_y as soon as V' of the chunk before has been read, warp 0
// load_dout after K. Who waits for state_made sees it. Seldom there is a state nevertheless, and what
// load_before asked for has come in vain. All threads.
template <class Traits, class LoadY, class LoadDout>
__device__ __forceinline__ void enter_odd(typename Traits::Storage& s, const ChunkGradientArgs& args,
                                          const GradientPlace& z, const LoadY& load_y,
                                          const LoadDout& load_dout) {
  using Element = typename Traits::Element;
  using cutlass::arch::NamedBarrier;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim;
  const int wg = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0), quad = threadIdx.x % 4;
  // The warp that loads is the only one that waits for the others.
  const auto load_behind = [&](uint32_t barrier, int loader, const auto& load) {
    if (wg != 0 || warp != loader) return;
    NamedBarrier::sync(Traits::kThreads, barrier);
    if (threadIdx.x % 32 == 0) load();
    __syncwarp();
  };
  const auto made = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) Barrier::arrive(&s.state_made);
  };
  const auto has_read = [&](uint32_t barrier, int loader) {
    if (wg != 0 || warp != loader) NamedBarrier::arrive(Traits::kThreads, barrier);
  };
  const ChunkRows& before = args.rows[z.chunk - args.in.value_heads];
  const int value_images = z.value_images;
  float2 k_write[8];
  CUTE_UNROLL
  for (int j = 0; j < 8; ++j)
    k_write[j] = *reinterpret_cast<const float2*>(&before.k_write[8 * j + 2 * quad]);
  const float decay = exp2_fast(before.G[kRows - 1]);
  const bool given = z.first_of_state(args) != kNoState;
  Barrier::wait(&s.state_here, 0);
  asm volatile("" ::: "memory");
  if (given) {
    __syncthreads();  // all have seen the barrier's first phase
    if (threadIdx.x == 0) {
      load_states(s.state, args.states, &s.state_here, z);
      load_dout();
    } else if (threadIdx.x == 32) {
      load_y();
    }
    __syncwarp();
    Barrier::wait(&s.state_here, 1);
    made();
    return;
  }
  if (wg < value_images) {
    typename Traits::MmaToState mma;
    Tensor S = partition_fragment_C(mma, cute::Shape<Int<64>, Int<kKeyDim>>{});  // S^T
    Tensor R = partition_fragment_C(mma, cute::Shape<Int<64>, Int<kRows>>{});    // V'^T, for its layout
    Tensor V16 = make_tensor<Element>(accumulator_as_a(R.layout()));
    auto* v_words = reinterpret_cast<uint32_t*>(V16.data());
    load_transposed(s.y + wg * kImage, warp, v_words);
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) {
      const float2 v = unpack<Element>(v_words[x]);
      v_words[x] = pack<Element>(k_write[x / 2].x * v.x, k_write[x / 2].y * v.y);
    }
    Element* images = s.state + Traits::kImages * wg * kImage;
    CUTE_UNROLL
    for (int j = 0; j < kKeyDim / 8; j += 2) {
      uint32_t words[4];
      SM75_U32x4_LDSM_N::copy(matrices_at<true>(images + j / 8 * kImage, 16 * warp, j % 8), words[0],
                              words[1], words[2], words[3]);
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) {
        const float2 x = unpack<Element>(words[w]);
        S(4 * j + 2 * w) = decay * x.x, S(4 * j + 2 * w + 1) = decay * x.y;
      }
    }
    const auto keys =
        mma.get_slice(threadIdx.x % 128)
            .partition_fragment_B(make_tensor(make_smem_ptr(s.dout), LayoutByFeature<Element, kKeyDim>{}));
    issue_gemm<false>(mma, V16, keys, S);
    // Not before: a barrier does not wait for `ldmatrix`, but the product does, which has V' in registers.
    has_read(kValuesRead, 1);
    load_behind(kValuesRead, 1, load_y);
    warpgroup_wait<0>();
    has_read(kKeysRead, 0);
    load_behind(kKeysRead, 0, load_dout);
    CUTE_UNROLL
    for (int k = 0; k < Traits::kImages; ++k) {
      uint32_t words[16];
      CUTE_UNROLL
      for (int x = 0; x < 16; ++x) words[x] = pack<Element>(S(32 * k + 2 * x), S(32 * k + 2 * x + 1));
      store_rows(images + k * kImage, warp, words);
    }
    cutlass::arch::fence_view_async_shared();
  } else {
    NamedBarrier::arrive(Traits::kThreads, kValuesRead);
    NamedBarrier::arrive(Traits::kThreads, kKeysRead);
  }
  made();
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    chunk_gradient_kernel(const __grid_constant__ ChunkGradientMaps maps,
                          const __grid_constant__ ChunkGradientArgs args,
                          const __grid_constant__ GradientGrid grid) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  using Features = LayoutByFeature<Element, kImageColumns>;
  using ByRow = LayoutByRow<Element, kImageColumns>;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  wait_for_end_of_walk();
  const int wg = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0);
  const int lane = threadIdx.x % 32, quad = lane % 4;

  if (threadIdx.x == 0) {
    Barrier::init(&s.qk_here, 3);
    Barrier::init(&s.state_made, Traits::kThreads / 32);
    for (uint64_t* barrier : {&s.values_here, &s.state_here, &s.d_state_here}) Barrier::init(barrier, 1);
    cutlass::arch::fence_barrier_init();
  }
  GradientPlace here;  // each warp needs some of it
  here.find(args, grid);
  __syncthreads();
  if (!here.inside) {
    if (args.rate_parts != nullptr && threadIdx.x == 0)
      args.rate_parts[here.part(in, 1, 0)] = args.bias_parts[here.part(in, 1, 0)] = 0.f;
    return;
  }
  const int value_images = here.value_images;
  // Each warp that asks for something takes its time.
  const float2 betas = reinterpret_cast<const float2*>(args.rows[here.chunk].beta)[lane];
  bool with_y;
  const auto load_y_or_dv = [&] { with_y ? load_y(s, args, here) : load_dv(s, maps, here); };
  if (threadIdx.x / 32 == 1) {
    wait_for_walk(args, here);
    with_y = gradient_has_y<Traits>(betas);
    if (lane == 0 && !here.odd) load_y_or_dv();
  } else if (lane == 0) {
    switch (threadIdx.x / 32) {
      case 0:
        here.odd ? load_before(s, maps, args, here) : load_dout(s, maps, here);
        break;
      case 2:
        load_keys(s, maps, args, here);
        break;
      case 3:
        load_queries(s, maps, here);
        break;
      case 4:
        load_values(s, args, here);
        break;
      case 5:
        if (!here.odd) load_states(s.state, args.states, &s.state_here, here);
        break;
      case 6:
        s.place = here;
        Barrier::arrive(&s.qk_here);
        break;
    }
  }
  __syncwarp();
  // This thread's rows of every accumulator: 16 warp + lane / 4 and + 8.
  const int row0 = 16 * warp + lane / 4;
  float beta[2], left_norm[2], beta_of_four;  // 1 for beta where dV is in the place of Y
  {
    const ChunkRows& rows = args.rows[here.chunk];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      beta[h] = rows.beta[row0 + 8 * h];
      left_norm[h] = wg == 0 ? rows.k_norm[row0 + 8 * h] : rows.q_norm[row0 + 8 * h];
    }
    beta_of_four = rows.beta[threadIdx.x / 4];
  }
  with_y = gradient_has_y<Traits>(betas);
  if (!with_y) beta[0] = beta[1] = beta_of_four = 1.f;
  if (here.odd) {
    enter_odd<Traits>(s, args, here, load_y_or_dv, [&] { load_dout(s, maps, here); });
  }
  Barrier::wait(&s.qk_here, 0);
  asm volatile("" ::: "memory");
  const GradientPlace& z = s.place;
  clear_tail(s.q, 4, z.valid);

  // 1. First warpgroup: Y V'^T and K K^T. Second: dO V'^T and Q K^T. (rows i, rows j)
  typename Traits::MmaRows mma_rows;
  typename Traits::MmaFeatures mma_features;
  const auto accumulator = [&] {
    return partition_fragment_C(mma_rows, cute::Shape<Int<kRows>, Int<kRows>>{});
  };
  uint32_t weights[16];        // E or F, with kNormsInside
  float dots[2] = {0.f, 0.f};  // of the two rows, what this lane keeps for its quad
  float pairs[2] = {0.f, 0.f};
  {
    Tensor product = accumulator(), decay = accumulator();
    Element *left = wg == 0 ? s.k : s.q, *d_left = wg == 0 ? s.y : s.dout;
    multiply<true, ByRow, ByRow>(mma_rows, left, s.k, product);
    multiply<false, ByRow, ByRow>(mma_rows, left + kImage, s.k + kImage, product);
    warpgroup_wait<0>();
    // For each pair of a row and a column j: f(place in an accumulator, h, j, kept, strict). Written by 8 x 8
    // triangles: of most pairs the warp decides, not the lane.
    const int r = lane / 4, c = 2 * quad;
    const auto for_pairs = [&](const auto& f) {
      CUTE_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        if (pair > warp) continue;  // above the diagonal
        const bool below = pair < warp;
        CUTE_UNROLL
        for (int x = 0; x < 8; ++x) {
          const int n = x / 4, h = x / 2 % 2, e = x % 2;
          const bool strict = n < h || below || (n == h && r > c + e);
          const bool kept = n < h || below || (n == h && r + wg > c + e);
          f(8 * pair + 4 * n + 2 * h + e, h, 16 * pair + 8 * n + c + e, kept, strict);
        }
      }
    };
    float G[2], weight_row[2];
    const float sign = wg == 0 ? -1.f : static_cast<float>(in.scale);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      G[h] = s.G[row0 + 8 * h];
      weight_row[h] = sign * (wg == 0 ? beta[h] : 1.f);
    }
    // While Y is on its way. What is not kept has a decay of 0, and is not in the sums.
    for_pairs([&](int at, int h, int j, bool kept, bool strict) {
      decay(at) = exp2_fast(kept ? G[h] - s.G[j] : -INFINITY);
      (Traits::kNormsInside ? decay : product)(at) *= left_norm[h] * s.k_norm[j];
      if (!strict) product(at) = 0.f;
      settle(decay(at), product(at));
    });
    Barrier::wait(&s.values_here, 0);
    asm volatile("" ::: "memory");
    clear_tail(s.v_new, 6, z.valid);
    Tensor d_product = accumulator();
    multiply<true, ByRow, ByRow>(mma_rows, d_left, s.v_new, d_product);
    if (value_images == 2)
      multiply<false, ByRow, ByRow>(mma_rows, d_left + kImage, s.v_new + kImage, d_product);
    warpgroup_wait<0>();
    float y_vnew[2];
    diagonal_of(d_product, warp, y_vnew);
    if (wg == 0 && has_diagonal()) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h)
        if (fabsf(beta[h]) >= kLeastDivisor) s.y_dot[row0 + 8 * h] = y_vnew[h];
    }
    CUTE_UNROLL
    for (int x = 0; x < 16; ++x) weights[x] = 0;
    for_pairs([&](int at, int h, int, bool, bool) {
      const float d = d_product(at) * decay(at);
      dots[h] -= d * product(at);
      d_product(at) = weight_row[h] * d;
      product(at) *= d_product(at);
      if (at % 2 == 1) weights[at / 2] = pack<Element>(d_product(at - 1), d_product(at));
    });
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      dots[h] += __shfl_xor_sync(0xffffffffu, dots[h], 1);
      dots[h] += __shfl_xor_sync(0xffffffffu, dots[h], 2);
    }
    if (args.dg != nullptr) pair_sums(product, warp, pairs);
    settle(dots[0], dots[1], pairs[0], pairs[1]);
  }

  // 2. This warpgroup's 64 features of dO S^T and Y S^T.
  const bool asks_for_v = !(fabsf(beta_of_four) >= kLeastDivisor);  // a row of four threads
  uint4 v_pieces[4];
  load_v_row(z.value_row<Element>(in, threadIdx.x / 4, beta_of_four), z.values(in), v_pieces);
  float q_norm[2];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) q_norm[h] = args.rows[z.chunk].q_norm[row0 + 8 * h];
  Barrier::wait(z.odd ? &s.state_made : &s.state_here, 0);
  asm volatile("" ::: "memory");
  Tensor dq = accumulator(), dk = accumulator();  // (rows, features)
  const auto through_state = [&](Element* left, Element* state_images, auto& acc) {
    multiply<true, ByRow, Features>(mma_features, left, state_images + wg * kImage, acc);
    if (value_images == 2)
      multiply<false, ByRow, Features>(mma_features, left + kImage, state_images + (2 + wg) * kImage, acc);
  };
  through_state(s.dout, s.state, dq);
  through_state(s.y, s.state, dk);
  if (__any_sync(0xffffffffu, asks_for_v)) {
    const float y_v = dot_with_v(s.y, v_pieces, z.values(in));
    if (threadIdx.x % 4 == 0 && asks_for_v) s.y_dot[threadIdx.x / 4] = y_v;
  }
  warpgroup_wait<0>();
  if (threadIdx.x / 32 == 0) {
    cutlass::arch::NamedBarrier::sync(Traits::kThreads, kDoutAndYRead);
    if (lane == 0) load_states(s.d_state, args.d_states, &s.d_state_here, z);
    __syncwarp();
  } else {
    cutlass::arch::NamedBarrier::arrive(Traits::kThreads, kDoutAndYRead);
  }
  const auto keep_dots = [&](int which, const float (&dot)[2]) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) dots[h] = quad == which ? dot[h] : dots[h];
    settle(dots[0], dots[1]);
  };
  Element *q_image = s.q + wg * kImage, *k_image = s.k + wg * kImage;
  {
    float dot[2];
    if (args.dg != nullptr) {
      row_dots(q_image, warp, dq, dot);
      keep_dots(0, dot);
    }
    row_dots(k_image, warp, dk, dot);
    dot[0] = -dot[0], dot[1] = -dot[1];
    keep_dots(1, dot);
    float to_q[2], to_k[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float decay = exp2_fast(s.G[row0 + 8 * h]);
      to_q[h] = static_cast<float>(in.scale) * decay, to_k[h] = -beta[h] * decay;
      if constexpr (Traits::kNormsInside) to_q[h] *= q_norm[h], to_k[h] *= s.k_norm[row0 + 8 * h];
    }
    scale_rows(dq, to_q[0], to_q[1]);
    scale_rows(dk, to_k[0], to_k[1]);
  }

  // 3. S . dS, then V' dS^T, in halves: both at once, registers would be spilled. E and F for step 4 go to
  // the place of S, where a warp overwrites piece by piece what only it still has to read; images for both
  // ways go under the first half.
  Barrier::wait(&s.d_state_here, 0);
  asm volatile("" ::: "memory");
  float through = 0.f;
  const auto keep_warp_sums = [&] {
    auto& to = s.of_warp(wg, warp);
    CUTE_UNROLL
    for (int e = 0; e < 2; ++e) to.pairs[16 * quad + lane / 4 + 8 * e] = pairs[e];
    if (lane == 0) to.through = through;
  };
  {
    const uint32_t to_weights = rows_at(wg == 0 ? s.e : s.f, warp);
    const auto store_weights = [&](int j) {
      if constexpr (Traits::kNormsInside)
        store_matrices(to_weights ^ j * 16, weights[2 * j], weights[2 * j + 1], weights[2 * j + 2],
                       weights[2 * j + 3]);
    };
    if (args.dg != nullptr && wg < value_images) {
      through = dot_of_states(s.state + 2 * wg * kImage, s.d_state + 2 * wg * kImage, warp, store_weights);
      CUTE_UNROLL
      for (int step = 16; step >= 1; step /= 2) through += __shfl_xor_sync(0xffffffffu, through, step);
      settle(through);
    } else {
      CUTE_UNROLL
      for (int j = 0; j < 8; j += 2) store_weights(j);
    }
    if constexpr (Traits::kNormsInside) {
      cutlass::arch::fence_view_async_shared();
      keep_warp_sums();
    } else if (args.dg != nullptr) {
      __syncthreads();
    }
  }
  {
    Tensor to_end = partition_fragment_C(typename Traits::MmaHalf{}, cute::Shape<Int<kRows>, Int<32>>{});
    float factor[2], dot[2] = {0.f, 0.f};
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      factor[h] = exp2_fast(s.G[kRows - 1] - s.G[row0 + 8 * h]);
      if constexpr (Traits::kNormsInside) factor[h] *= s.k_norm[row0 + 8 * h];
    }
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      multiply_half<Traits, true>(s.v_new, s.d_state + wg * kImage, half, to_end);
      if (value_images == 2)
        multiply_half<Traits, false>(s.v_new + kImage, s.d_state + (2 + wg) * kImage, half, to_end);
      if (!Traits::kNormsInside && half == 0) {
        uint32_t direct[16], transposed[16];
        CUTE_UNROLL
        for (int n = 0; n < 8; ++n) {
          const float2 k_j = *reinterpret_cast<const float2*>(&s.k_norm[8 * n + 2 * quad]);
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            const float2 w = unpack<Element>(weights[2 * n + h]);
            direct[2 * n + h] = pack<Element>(w.x * k_j.x, w.y * k_j.y);
            transposed[2 * n + h] = pack<Element>(w.x * left_norm[h], w.y * left_norm[h]);
          }
        }
        store_both_ways(wg == 0 ? s.e : s.f, wg == 0 ? s.e_t : s.f_t, warp, direct, transposed);
        cutlass::arch::fence_view_async_shared();
      }
      warpgroup_wait<0>();
      if (args.dg != nullptr) {
        float part[2];
        row_dots(k_image, warp, to_end, part, 4 * half);
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) dot[h] += part[h];
      }
      CUTE_UNROLL
      for (int x = 0; x < size(to_end); ++x) dk(16 * half + x) += factor[x % 4 / 2] * to_end(x);
    }
    keep_dots(2, dot);
  }
  __syncthreads();  // dS is free, E and F are there

  // 4. What E and F add. The sums meanwhile, to the place of dS.
  multiply<false, ByRow, Features>(mma_features, s.f, k_image, dq);
  multiply<false, ByRow, Features>(mma_features, s.e, k_image, dk);
  if constexpr (Traits::kNormsInside) {
    typename Traits::MmaColumns mma_columns;
    multiply<false, Features, Features>(mma_columns, s.e, k_image, dk);
    multiply<false, Features, Features>(mma_columns, s.f, q_image, dk);
  } else {
    multiply<false, ByRow, Features>(mma_features, s.e_t, k_image, dk);
    multiply<false, ByRow, Features>(mma_features, s.f_t, q_image, dk);
  }
  float k_norm[2];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    s.sums.dots[quad][wg][row0 + 8 * h] = dots[h];
    q_norm[h] = args.rows[z.chunk].q_norm[row0 + 8 * h];
    k_norm[h] = s.k_norm[row0 + 8 * h];
  }
  if constexpr (!Traits::kNormsInside) keep_warp_sums();
  if (warp == 0) wg == 0 ? finish_beta<Traits>(args, z, s) : finish_gate<Traits>(args, z, s);
  else cutlass::arch::NamedBarrier::arrive(Traits::kThreads, kSumsHere);
  warpgroup_wait<0>();
  if constexpr (!Traits::kNormsInside) {
    scale_rows(dq, q_norm[0], q_norm[1]);
    scale_rows(dk, k_norm[0], k_norm[1]);
  }

  finish_rows(args, z, s.sums, warp, q_image, k_image, s.v_new + wg * kImage, s.d_state + (2 + wg) * kImage,
              dq, dk, q_norm, k_norm);
}

template <class Traits, class Kernel>
cudaError_t launch_chunk_gradient(Kernel kernel, const ChunkGradientArgs& args, bool is_bf16, void* stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(kernel, kShared)) return e;
  const InputsSm90& in = args.in;
  ChunkGradientMaps maps{};
  const auto encode = [&](CUtensorMap* map, const Rows<void>& t, int64_t features, int64_t heads) {
    return encode_tokens(map, t, is_bf16, features, in.tokens, heads, in.batch);
  };
  cudaError_t e = encode(&maps.q, in.q, in.key_dim, in.heads);
  if (e == cudaSuccess) e = encode(&maps.k, in.k, in.key_dim, in.heads);
  if (e == cudaSuccess) e = encode(&maps.dout, args.d_o, in.value_dim, in.value_heads);
  if (e == cudaSuccess) e = encode(&maps.dv, args.dv, in.value_dim, in.value_heads);
  if (e != cudaSuccess) return e;
  const int64_t grid = ChunkSlots(in).total * in.value_heads * value_blocks(in);
  if (grid > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  return launch_dependent(kernel, static_cast<unsigned>(grid), Traits::kThreads, kShared,
                          static_cast<cudaStream_t>(stream), maps, args, GradientGrid(in, args.early));
}

template <class Tag, int kKeyDim>
int chunk_gradient_sm90<Tag, kKeyDim>::run(const ChunkGradientArgs& args, void* stream) {
  using Traits = ChunkGradientTraits<Tag, kKeyDim>;
  return launch_chunk_gradient<Traits>(chunk_gradient_kernel<Traits>, args, std::is_same_v<Tag, bf16>,
                                       stream);
}

}  // namespace nearfield::delta
