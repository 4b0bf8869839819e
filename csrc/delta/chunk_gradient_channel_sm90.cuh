// As chunk_gradient_sm90.cuh, with a gate per channel. e^{G_i - G_j} then stands inside the sums over
// channels:
//   dq_i += sum_j dP_ij k_j e^{G_i - G_j}
//   dk_i += beta_i sum_j dA_ij k_j e^{G_i - G_j}
//   dk_j += sum_i (..) e^{..}
// Rows are taken in four blocks of 16, channels in four groups of 32, one of the 16 warps for each block and
// group. Blocks are anchored at their first rows, so that no exponent is positive:
//   * blocks I > J: products of k_j e^{G_(first of J + 1) - G_j} with k_i, q_i e^{G_i - G_(first of I)};
//     what lies between the two anchors is multiplied to the accumulators block after block (Horner).
//   * within a block: pair by pair in float32, a lane per channel, decays multiplied up from row to row.
// dg is the sum over pairs of README.md, grouped by these blocks. A warp keeps what belongs to its rows and
// channels to itself; accumulators turn into a column per lane through its own piece of shared memory.
// Memory: dO, Y -> scaled K -> dk; S -> scaled Q -> dq; dS -> dg.
#pragma once

#include "delta/channel_gradient_steps_sm90.cuh"
#include "delta/chunk_gradient_sm90.cuh"

namespace nearfield::delta {

// ---- Layouts and storage ----

template <class Tag, int kKeyDim_>
struct ChunkGradientChannelTraits : ChunkGradientTraits<Tag, kKeyDim_> {
  using Base = ChunkGradientTraits<Tag, kKeyDim_>;
  using typename Base::Element;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr int kTile = Base::kTile, kImages = Base::kImages;
  static constexpr int kGroups = kKeyDim / kGroupColumns, kWarps = kBlocks * kGroups;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kWarps == rate_parts_of(true) && kBlocks == bias_parts_of(true));
  static constexpr int kParked = kBlockRows * kGroupColumns;  // floats of a warp's rows and channels
  // Floats in a row of G: rows that follow each other begin 8 banks apart, so that the channels of a quad of
  // eight rows are in different banks.
  static constexpr int kGateRow = kKeyDim + 8;

  struct Sums {
    // Per channel: of q dq + k dk through the entering state over blocks 1, 2, 3; of k dk through the leaving
    // state over blocks 0, 1, 2; over pairs of blocks 0 and (2, 3), 0 and 3, 1 and 3; e^{G_C} S . dS.
    float enter[3][kKeyDim], leave[3][kKeyDim], pairs[3][kKeyDim], through[kKeyDim];
    // k . dk as a reader, without beta, from other blocks and the own one: in rows that do not divide by
    // beta.
    float k_row[kGroups][kRows], k_diagonal[kGroups][kRows];
    float y_vnew[kRows], y_v[kRows];
    float q_dq[kGroups][kRows], k_dk[kGroups][kRows];
  };
  struct Storage {                   // q to y: ten images in a row
    alignas(1024) Element q[kTile];  // in the end dq on the way out, as dk in K
    alignas(1024) Element k[kTile];
    alignas(1024) Element v_new[kTile];
    union {
      struct {
        alignas(1024) Element dout[kTile];
        alignas(1024) Element y[kTile];
      };
      struct {
        alignas(1024) Element k_source[kTile];  // to the first row of the next block
        alignas(1024) Element k_reader[kTile];  // from the first row of the block, times beta
      };
      float parked_dk[kWarps][kParked];
    };
    union {
      alignas(1024) Element state[kImages * kTile];
      alignas(1024) Element q_reader[kTile];
      float parked_dq[kWarps][kParked];
    };
    union {
      alignas(1024) Element d_state[kImages * kTile];
      float dg[kWarps][kParked];
    };
    alignas(1024) Element dA[kImage];  // below the diagonal blocks
    alignas(1024) Element dP[kImage];
    alignas(128) float2 diagonal[kBlocks][kBlockRows][kBlockRows];  // (dA, dP)
    alignas(128) float G[kRows * kGateRow];
    alignas(8) float steps[2][kKeyDim];  // e^{G_32 - G_16}, e^{G_48 - G_32}
    Sums sums;
    alignas(16) float beta[kRows], k_norm[kRows], q_norm[kRows];
    GradientPlace place;
    uint64_t qk_here, values_here, state_here, d_state_here;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    chunk_gradient_channel_kernel(const __grid_constant__ ChunkGradientMaps maps,
                                  const __grid_constant__ ChunkGradientArgs args,
                                  const __grid_constant__ GradientGrid grid) {
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int kKeyDim = Traits::kKeyDim, kGateRow = Traits::kGateRow;
  auto& s = shared_storage<typename Traits::Storage>();
  const InputsSm90& in = args.in;
  wait_for_end_of_walk();
  const OwnPart part;
  const int lane = threadIdx.x % 32, quad = lane % 4;

  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&s.qk_here, &s.values_here, &s.state_here, &s.d_state_here})
      Barrier::init(barrier, 1);
    cutlass::arch::fence_barrier_init();
    s.place.find(args, grid);
  }
  __syncthreads();
  const GradientPlace& z = s.place;
  if (!z.inside) {
    if (args.rate_parts == nullptr) return;
    if (lane == 0) args.rate_parts[z.part(in, Traits::kWarps, part.index())] = 0.f;
    const int channel = part.first_channel() + lane;
    if (channel < in.key_dim) args.bias_parts[z.part(in, kBlocks, part.block) * in.key_dim + channel] = 0.f;
    return;
  }
  const int value_images = z.value_images;
  const ChunkRows& rows = args.rows[z.chunk];

  // Each warp that loads waits for something else.
  const int warp = threadIdx.x / 32;
  constexpr int kLoaders = Traits::kWarps / 2;  // of G
  if (threadIdx.x == 0) {
    const int head_k = static_cast<int>(z.head_k);
    Barrier::arrive_and_expect_tx(&s.qk_here, 2 * Traits::kTile * 2 + Traits::kTile * 4 + 3 * kRows * 4);
    load_tokens<kKeyDim>(maps.k, &s.qk_here, s.k, 0, z.token, head_k, z.sequence.batch);
    load_tokens<kKeyDim>(maps.q, &s.qk_here, s.q, 0, z.token, head_k, z.sequence.batch);
    copy_in(s.beta, rows.beta, kRows * 4, &s.qk_here);
    copy_in(s.k_norm, rows.k_norm, kRows * 4, &s.qk_here);
    copy_in(s.q_norm, rows.q_norm, kRows * 4, &s.qk_here);
  } else if (warp == 1) {
    if (lane == 0) {
      load_values(s, args, z);
      load_dout(s, maps, z);
      load_states(s.state, args.states, &s.state_here, z);
    }
  } else if (warp == 2) {
    wait_for_walk(args, z);
    if (lane == 0) {
      load_y(s, args, z);
      load_states(s.d_state, args.d_states, &s.d_state_here, z);
    }
  } else if (warp >= kLoaders && lane == 0) {  // a warp issues copies one by one, and slowly
    CUTE_UNROLL
    for (int i = 0; i < kRows / kLoaders; ++i) {
      const int row = warp % kLoaders + kLoaders * i;
      copy_in(s.G + row * kGateRow, args.G + (z.chunk * kRows + row) * kKeyDim, kKeyDim * 4, &s.qk_here);
    }
  }
  __syncwarp();
  Barrier::wait(&s.qk_here, 0);
  Barrier::wait(&s.values_here, 0);
  asm volatile("" ::: "memory");
  clear_tail(s.q, 10, z.valid);

  // This thread's rows of every accumulator, its columns of a piece of 8 channels, and their gates.
  const int row0 = part.first_row() + lane / 4;
  float beta[2], q_norm[2], k_norm[2];
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    beta[h] = s.beta[row0 + 8 * h];
    q_norm[h] = s.q_norm[row0 + 8 * h];
    k_norm[h] = s.k_norm[row0 + 8 * h];
  }
  const auto gate = [&](int row, int n) {
    return *reinterpret_cast<const float2*>(&s.G[row * kGateRow + part.first_channel() + 8 * n + 2 * quad]);
  };
  const bool dbeta_needs_k =  // in some row of the block
      __any_sync(0xffffffffu, fabsf(s.beta[part.first_row() + lane % kBlockRows]) < kLeastDivisor);
  const float scale = static_cast<float>(in.scale);

  // 1. dA and dP.
  score_gradients(s, part, value_images, scale);
  if (threadIdx.x < 4 * kRows) {
    const int row = threadIdx.x / 4;
    const bool asked = fabsf(s.beta[row]) < kLeastDivisor;
    if (__any_sync(0xffffffffu, asked)) {
      uint4 v[4];
      load_v_row(asked ? z.value_row<Element>(in, row, rows.beta[row]) : nullptr, z.values(in), v);
      const float y_v = dot_with_v(s.y, v, z.values(in));
      if (threadIdx.x % 4 == 0) s.sums.y_v[row] = y_v;
    }
  }

  // 2. Through the entering state: dq = s e^G dO S^T, dk = -e^G Y S^T (without beta).
  Tensor dq = part_accumulator(), dk_row = part_accumulator(), dk_column = part_accumulator();
  Barrier::wait(&s.state_here, 0);
  asm volatile("" ::: "memory");
  through_state<2>(part, value_images, s.state, {s.dout, s.y}, {&dq, &dk_row});
  const int sum_channel = part.first_channel() + column_after_sum<2 * kGroupPieces>();
  {
    CUTE_UNROLL
    for (int x = 0; x < 2 * kGroupPieces; ++x) {
      const float2 g = gate(row0 + 8 * (x % 2), x / 2);
      const float first = exp2_fast(g.x), second = exp2_fast(g.y);
      dq(2 * x) *= scale * first, dq(2 * x + 1) *= scale * second;
      dk_row(2 * x) *= -first, dk_row(2 * x + 1) *= -second;
    }
    float column[2 * kGroupPieces] = {};
    for_elements(s.q, part, [&](int at, int h, float2 q) {
      column[at / 4 * 2] += q_norm[h] * q.x * dq(at);
      column[at / 4 * 2 + 1] += q_norm[h] * q.y * dq(at + 1);
    });
    for_elements(s.k, part, [&](int at, int h, float2 k) {
      column[at / 4 * 2] += beta[h] * k_norm[h] * k.x * dk_row(at);
      column[at / 4 * 2 + 1] += beta[h] * k_norm[h] * k.y * dk_row(at + 1);
    });
    const float2 enter = sum_over_rows(column);
    if (part.block > 0) *reinterpret_cast<float2*>(&s.sums.enter[part.block - 1][sum_channel]) = enter;
  }

  // 3. Through the leaving state: dk = e^{G_C - G} V' dS^T.
  Barrier::wait(&s.d_state_here, 0);
  asm volatile("" ::: "memory");
  through_state<1>(part, value_images, s.d_state, {s.v_new}, {&dk_column});
  state_dots(s.state, s.d_state, value_images, s.G + (kRows - 1) * kGateRow, s.sums.through);
  {
    CUTE_UNROLL
    for (int x = 0; x < 2 * kGroupPieces; ++x) {
      const float2 g = gate(row0 + 8 * (x % 2), x / 2), end = gate(kRows - 1, x / 2);
      dk_column(2 * x) *= exp2_fast(end.x - g.x), dk_column(2 * x + 1) *= exp2_fast(end.y - g.y);
    }
    float column[2 * kGroupPieces] = {};
    for_elements(s.k, part, [&](int at, int h, float2 k) {
      column[at / 4 * 2] += k_norm[h] * k.x * dk_column(at);
      column[at / 4 * 2 + 1] += k_norm[h] * k.y * dk_column(at + 1);
    });
    const float2 leave = sum_over_rows(column);
    if (part.block < kBlocks - 1) *reinterpret_cast<float2*>(&s.sums.leave[part.block][sum_channel]) = leave;
  }
  __syncthreads();  // dO, Y, S and dS are free

  // 4. Pairs of different blocks.
  scale_blocks<Traits>(s);
  __syncthreads();
  cross_blocks<Traits>(s, part, dq, dk_row, dk_column);
  if (dbeta_needs_k) {
    float dot[2];
    row_dots(part.image(s.k), part.block, dk_row, dot, part.first_piece());
    if (quad == 0) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) s.sums.k_row[part.group][row0 + 8 * h] = k_norm[h] * dot[h];
    }
  }
  __syncthreads();  // the operands are free, the sums complete

  // 5. A lane per channel from here. What dg_t has from other blocks: readers from t on, sources before t,
  // and what passes the whole block.
  float *parked_q = s.parked_dq[part.index()], *parked_k = s.parked_dk[part.index()];
  for_elements(s.q, part, [&](int at, int h, float2 q) {
    float2& reader =
        *reinterpret_cast<float2*>(&parked_at(parked_q, 8 * h + lane / 4, 8 * (at / 4) + 2 * quad));
    reader = float2{q_norm[h] * q.x * dq(at), q_norm[h] * q.y * dq(at + 1)};
  });
  for_elements(s.k, part, [&](int at, int h, float2 k) {
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
  {
    const int channel = part.first_channel() + lane;
    float whole = s.sums.through[channel];
    CUTE_UNROLL
    for (int b = 0; b < kBlocks - 1; ++b) {
      if (b + 1 > part.block) whole += s.sums.enter[b][channel];
      if (b < part.block) whole += s.sums.leave[b][channel];
    }
    if (part.block == 1) whole += s.sums.pairs[0][channel];
    if (part.block == 2) whole += s.sums.pairs[1][channel] + s.sums.pairs[2][channel];
    float others[kBlockRows], sum = 0.f;
    CUTE_UNROLL
    for (int t = 0; t < kBlockRows; ++t) {
      others[t] = sum;
      sum += parked_at(parked_k, t, lane);
    }
    sum = 0.f;
    CUTE_UNROLL
    for (int t = kBlockRows - 1; t >= 0; --t) {
      sum += parked_at(parked_q, t, lane);
      parked_at(s.dg[part.index()], t, lane) = others[t] + sum + whole;
    }
  }
  __syncwarp();
  for_parked(parked_q, [&](int at, float2& x) { x = float2{dq(at), dq(at + 1)}; });
  for_parked(parked_k, [&](int at, float2& x) { x = float2{dk_row(at), dk_row(at + 1)}; });
  __syncwarp();

  // 6. Pairs within the block; the gate's gradient through its activation.
  pairs_in_block<Traits>(s, part, dbeta_needs_k);
  finish_gates<Traits>(s, part, args, z);
  __syncwarp();
  for_parked(parked_q, [&](int at, float2& x) { dq(at) = x.x, dq(at + 1) = x.y; });
  for_parked(parked_k, [&](int at, float2& x) { dk_row(at) = x.x, dk_row(at + 1) = x.y; });
  __syncthreads();  // the sums are complete
  if (threadIdx.x < z.valid) {
    const int i = threadIdx.x;
    const float beta_i = s.beta[i];
    float dbeta;
    if (fabsf(beta_i) >= kLeastDivisor) {
      dbeta = s.sums.y_vnew[i] / beta_i;
    } else {
      dbeta = s.sums.y_v[i];
      CUTE_UNROLL
      for (int g = 0; g < Traits::kGroups; ++g) dbeta += s.sums.k_row[g][i] + s.sums.k_diagonal[g][i];
    }
    if (in.beta_activation != BetaActivation::kNone)
      dbeta *= beta_i * (1.f - beta_i / (in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f));
    args.dbeta[z.first_row + i * z.row] = dbeta;
  }
  scale_rows(dq, q_norm[0], q_norm[1]);
  scale_rows(dk_row, k_norm[0], k_norm[1]);
  finish_rows(args, z, s.sums, part.block, part.image(s.q), part.image(s.k), part.image(s.q), part.image(s.k),
              dq, dk_row, q_norm, k_norm);  // in place: a warp's own
}

template <class Tag, int kKeyDim>
int chunk_gradient_channel_sm90<Tag, kKeyDim>::run(const ChunkGradientArgs& args, void* stream) {
  using Traits = ChunkGradientChannelTraits<Tag, kKeyDim>;
  return launch_chunk_gradient<Traits>(chunk_gradient_channel_kernel<Traits>, args, std::is_same_v<Tag, bf16>,
                                       stream);
}

}  // namespace nearfield::delta
