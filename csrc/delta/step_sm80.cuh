// Decode: one pass over the state. A warp owns 16 value columns of one head's state in registers, all K keys
// of them, from the load to the store; so the two sums over the keys, S'^T k and S'^T q, stay inside the
// warp, and the output comes from the same pass as the error, by o = s (S'^T q + (k.q) beta r) with the
// decayed old state. A block is one to four such warps, which share the token rows: normalised and activated
// once, in shared memory, while the state is on its way.
//
// Eight lanes share the keys of a column and four lanes the columns. An index of the pool that is out of
// range can't be reported without waiting for the device; such a row reads and writes nothing and gives NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "delta/step.h"
#include "nearfield/element.cuh"
#include "nearfield/shared_memory.cuh"

namespace nearfield::delta {

constexpr int kStepWarps = 4;    // at most, per block
constexpr int kWarpValues = 16;  // columns of the state that a warp owns

template <class Tag>
struct PoolElement {
  using type = float;
};
template <>
struct PoolElement<bf16> {
  using type = __nv_bfloat16;
};

__device__ __forceinline__ int64_t index_at(const SlotIndex& index, int64_t b, int t) {
  if (index.data == nullptr) return b;
  const int64_t i = b * index.row + t * index.token;
  return index.is_int64 ? static_cast<const int64_t*>(index.data)[i]
                        : static_cast<const int32_t*>(index.data)[i];
}

__device__ __forceinline__ float at(const Operand& x, int64_t b, int t, int h, int c) {
  return load_element(x.data, x.type, b * x.batch + t * x.token + h * x.head + c * x.channel);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The log decay of README.md, "Preprocessing".
__device__ __forceinline__ float log_decay(const StepArgs& args, float raw, int hv, int c) {
  const float x = args.dt_bias.data ? raw + at(args.dt_bias, 0, 0, hv, c) : raw;
  const float rate = args.A_log.data ? expf(at(args.A_log, 0, 0, hv, 0)) : 1.f;
  if (args.gate == Gate::kSoftplus) return -rate * (fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))));
  return args.gate_bound * sigmoid(rate * x);
}

// What the warps of a block need of one token, float32.
template <int kKeyDim>
struct alignas(16) TokenRow {
  float q[kKeyDim], k[kKeyDim];       // 0 beyond K
  float alpha[kKeyDim];               // e^g, 1 beyond K
  float v[kStepWarps * kWarpValues];  // replay: u
  float beta, kq;                     // write strength, k.q
};

// Which elements of a warp's columns a thread holds, and how they lie in memory: runs of four along V or K.
template <class Pool, bool kVFirst, int kKeyDim>
struct StateTile {
  static constexpr int kKeyLanes = 8, kValueLanes = 4;
  static constexpr int kKeys = kKeyDim / kKeyLanes;  // per thread
  static constexpr int kValues = 4;                  // per thread
  static_assert(kValueLanes * kValues == kWarpValues && kKeyLanes * kValueLanes == 32);

  float S[kKeys][kValues];
  int key_lane, value_lane;

  __device__ __forceinline__ explicit StateTile(int lane)
      : key_lane(kVFirst ? lane % kKeyLanes : lane / kValueLanes),
        value_lane(kVFirst ? lane / kKeyLanes : lane % kValueLanes) {}

  __device__ __forceinline__ int key(int i) const { return i / 4 * 4 * kKeyLanes + 4 * key_lane + i % 4; }
  __device__ __forceinline__ int value(int j) const {
    return kVFirst ? value_lane + kValueLanes * j : kValues * value_lane + j;
  }

  // Visits the runs of four: f(element of the first, its offset in the slot, lies inside). `first` is the
  // warp's first column.
  template <class F>
  __device__ __forceinline__ void for_each_run(int K, int V, int first, F&& f) {
    if constexpr (kVFirst) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
#pragma unroll
        for (int i = 0; i < kKeys; i += 4) {
          f(i, j, (first + value(j)) * K + key(i), first + value(j) < V && key(i) < K);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        f(i, 0, key(i) * V + first + value(0), first + value(0) < V && key(i) < K);
      }
    }
  }

  // Starts bringing the columns to the L2 cache, a line per lane.
  __device__ __forceinline__ static void prefetch(const Pool* slot, int K, int V, int first) {
    const int lane = threadIdx.x % 32;
    if constexpr (kVFirst) {
      const int size = min(kWarpValues, V - first) * K, line = 128 / sizeof(Pool);
#pragma unroll 1
      for (int i = lane * line; i < size; i += 32 * line) nearfield::prefetch(slot + first * K + i);
    } else if (first < V) {
#pragma unroll 1
      for (int key = lane; key < K; key += 32) nearfield::prefetch(slot + key * V + first);
    }
  }

  __device__ __forceinline__ void load(const Pool* slot, int K, int V, int first) {
    for_each_run(K, V, first, [&](int i, int j, int offset, bool inside) {
      const float4 x = inside ? load4(slot + offset) : float4{0.f, 0.f, 0.f, 0.f};
      const float run[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) (kVFirst ? S[i + e * kVFirst][j] : S[i][j + e * !kVFirst]) = run[e];
    });
  }

  __device__ __forceinline__ void store(Pool* slot, int K, int V, int first) {
    for_each_run(K, V, first, [&](int i, int j, int offset, bool inside) {
      if (!inside) return;
      if constexpr (kVFirst) {
        store4(slot + offset, float4{S[i][j], S[i + 1][j], S[i + 2][j], S[i + 3][j]});
      } else {
        store4(slot + offset, float4{S[i][j], S[i][j + 1], S[i][j + 2], S[i][j + 3]});
      }
    });
  }

  // To what the pool can hold.
  __device__ __forceinline__ void round() {
    if constexpr (std::is_same_v<Pool, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) S[i][j] = __bfloat162float(__float2bfloat16_rn(S[i][j]));
      }
    }
  }

  // Calls f(i, row[key(i)] ..) for each run of four keys of the rows.
  template <class F, class... Row>
  __device__ __forceinline__ void for_each_key(F&& f, const Row*... rows) {
#pragma unroll
    for (int i = 0; i < kKeys; i += 4) f(i, *reinterpret_cast<const float4*>(rows + key(i))...);
  }

  // S <- alpha . S, rounded by itself: a replay must not fuse it with the addition that follows.
  __device__ __forceinline__ void decay(int i, float4 alpha) {
    const float a[4] = {alpha.x, alpha.y, alpha.z, alpha.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) S[i + e][j] = __fmul_rn(S[i + e][j], a[e]);
    }
  }

  // sum += S^T row over four keys
  __device__ __forceinline__ void read(int i, float4 row, float (&sum)[kValues]) const {
    const float x[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[j] += x[e] * S[i + e][j];
    }
  }

  // Adds up over the key lanes.
  __device__ __forceinline__ void reduce(float (&sum)[kValues]) const {
    constexpr int kStride = kVFirst ? 1 : kValueLanes;
#pragma unroll
    for (int step = kStride; step < kStride * kKeyLanes; step *= 2) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
    }
  }

  // S <- S + k u^T
  __device__ __forceinline__ void write(int i, float4 k, const float (&u)[kValues]) {
    const float x[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) S[i + e][j] += x[e] * u[j];
    }
  }
};

// One token row, preprocessed by one warp; also what `next` keeps of its k and g.
template <int kKeyDim>
__device__ __forceinline__ void prepare_token(const StepArgs& args, int64_t b, int t, int hv, int first_value,
                                              bool is_first_block, TokenRow<kKeyDim>& row) {
  constexpr int kPerLane = kKeyDim / 32, kValuesPerLane = kStepWarps * kWarpValues / 32;
  const int lane = threadIdx.x % 32, K = args.key_dim;
  const int group = args.value_heads / args.heads, h = hv / group;
  // Loads without branches, channels past the end clamped, so that one wait suffices for all.
  float q[kPerLane], k[kPerLane], g[kPerLane], v[kValuesPerLane];
  const float beta = at(args.beta, b, t, hv, 0);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = min(lane + 32 * i, K - 1);
    q[i] = at(args.q, b, t, h, c);
    k[i] = at(args.k, b, t, h, c);
    g[i] = at(args.g, b, t, hv, c);
  }
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i)
    v[i] = at(args.v, b, t, hv, min(first_value + lane + 32 * i, args.value_dim - 1));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool inside = lane + 32 * i < K;
    q[i] = inside ? q[i] : 0.f, k[i] = inside ? k[i] : 0.f;
    g[i] = inside && args.gate_dim > 0 ? g[i] : 0.f;
  }

  float qq = 0.f, kk = 0.f, kq = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) qq += q[i] * q[i], kk += k[i] * k[i], kq += k[i] * q[i];
  qq = warp_sum(qq), kk = warp_sum(kk), kq = warp_sum(kq);
  const float norm_q = args.qk_l2norm ? rsqrtf(qq + static_cast<float>(kNormEps)) : 1.f;
  const float norm_k = args.qk_l2norm ? rsqrtf(kk + static_cast<float>(kNormEps)) : 1.f;
  if (lane == 0) {
    row.kq = kq * norm_q * norm_k;
    row.beta = args.beta_activation == BetaActivation::kNone
                   ? beta
                   : sigmoid(beta) * (args.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = lane + 32 * i;
    if (c < K && args.gate != Gate::kLog) g[i] = log_decay(args, g[i], hv, c);
    row.q[c] = q[i] * norm_q;
    row.k[c] = k[i] * norm_k;
    row.alpha[c] = expf(g[i]);
    if (args.next.tokens == 0 || !is_first_block) continue;
    const int64_t at_token = b * args.tokens + t;
    if (c < K && hv % group == 0) args.next.k[(at_token * args.heads + h) * K + c] = row.k[c];
    if (c < args.gate_dim) args.next.g[(at_token * args.value_heads + hv) * args.gate_dim + c] = g[i];
  }
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) row.v[lane + 32 * i] = v[i];
}

// Token rows of the first `count` pending tokens.
template <int kKeyDim>
__device__ __forceinline__ void prepare_pending(const StepArgs& args, int64_t b, int hv, int first_value,
                                                int count, TokenRow<kKeyDim>* rows) {
  const Pending<float>& from = args.pending;
  const int K = args.key_dim, V = args.value_dim, h = hv / (args.value_heads / args.heads);
  for (int i = threadIdx.x; i < count * kKeyDim; i += blockDim.x) {
    const int t = i / kKeyDim, c = i % kKeyDim;
    const int64_t row = b * from.tokens + t;
    const int gate_channel = args.gate_dim == 1 ? 0 : c;
    rows[t].k[c] = c < K ? from.k[(row * args.heads + h) * K + c] : 0.f;
    rows[t].alpha[c] = args.gate_dim > 0 && c < K
                           ? expf(from.g[(row * args.value_heads + hv) * args.gate_dim + gate_channel])
                           : 1.f;
  }
  constexpr int kColumns = kStepWarps * kWarpValues;
  for (int i = threadIdx.x; i < count * kColumns; i += blockDim.x) {
    const int t = i / kColumns, j = i % kColumns;
    rows[t].v[j] = first_value + j < V
                       ? from.u[((b * from.tokens + t) * args.value_heads + hv) * V + first_value + j]
                       : 0.f;
  }
}

template <class Pool, bool kVFirst, int kKeyDim>
__global__ void __launch_bounds__(kStepWarps * 32, kKeyDim > 128       ? 2
                                                   : sizeof(Pool) == 4 ? 3
                                                                       : 4)
    step_kernel(const __grid_constant__ StepArgs args) {
  using Tile = StateTile<Pool, kVFirst, kKeyDim>;
  extern __shared__ __align__(16) unsigned char storage[];
  auto* rows = reinterpret_cast<TokenRow<kKeyDim>*>(storage);  // T new tokens, then the pending ones
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int K = args.key_dim, V = args.value_dim, HV = args.value_heads, T = args.tokens;
  const int num_values = blockDim.x / 32 * kWarpValues;
  const int v_blocks = (V + num_values - 1) / num_values;
  const int v_block = blockIdx.x % v_blocks, hv = blockIdx.x / v_blocks % HV;
  const int64_t b = blockIdx.x / v_blocks / HV;
  const int first_value = v_block * num_values, warp_value = first_value + warp * kWarpValues;

  const int64_t from = index_at(args.read, b, 0);
  const int64_t accepted = args.pending.tokens > 0 ? index_at(args.accepted, b, 0) : 0;
  bool valid = from < args.slots && 0 <= accepted && accepted <= args.pending.tokens;
#pragma unroll 1
  for (int t = 0; t < (args.state_per_token ? T : 1); ++t) valid &= index_at(args.write, b, t) < args.slots;
  const bool active = from >= 0;

  Tile tile(lane);
  Pool* head = static_cast<Pool*>(args.state) + static_cast<int64_t>(hv) * K * V;
  if (active && valid) tile.prefetch(head + from * args.slot_stride, K, V, warp_value);

  // The columns that this thread reports: each is known to all key lanes.
  const auto for_each_value = [&](auto&& f) {
#pragma unroll
    for (int j = 0; j < Tile::kValues; ++j) {
      if (tile.key_lane == 0 && warp_value + tile.value(j) < V) f(j, warp_value + tile.value(j));
    }
  };
  const auto row_of = [&](int t) { return ((b * T + t) * HV + hv) * V; };

  if (!active || !valid) {
    const float fill = active ? NAN : 0.f;
    const int h = hv / (HV / args.heads);
    for (int t = 0; t < T; ++t) {
      for_each_value(
          [&](int, int column) { store_element(args.o, args.out_type, row_of(t) + column, fill); });
      if (args.next.tokens == 0) continue;
      for_each_value([&](int, int column) { args.next.u[row_of(t) + column] = fill; });
      if (v_block > 0) continue;
      for (int c = threadIdx.x; c < K; c += blockDim.x) {
        if (hv % (HV / args.heads) == 0) args.next.k[((b * T + t) * args.heads + h) * K + c] = fill;
        if (c < args.gate_dim) args.next.g[((b * T + t) * HV + hv) * args.gate_dim + c] = fill;
      }
    }
    return;
  }

  const auto save = [&](int t) {
    const int64_t to = index_at(args.write, b, t);
    if (to >= 0) tile.store(head + to * args.slot_stride, K, V, warp_value);
  };

  for (int t = warp; t < T; t += blockDim.x / 32)
    prepare_token(args, b, t, hv, first_value, v_block == 0, rows[t]);
  TokenRow<kKeyDim>* replayed = rows + T;
  if (accepted > 0) prepare_pending(args, b, hv, first_value, static_cast<int>(accepted), replayed);
  tile.load(head + from * args.slot_stride, K, V, warp_value);
  __syncthreads();

  for (int t = 0; t < accepted; ++t) {
    float u[Tile::kValues];
#pragma unroll
    for (int j = 0; j < Tile::kValues; ++j) u[j] = replayed[t].v[warp * kWarpValues + tile.value(j)];
    tile.for_each_key(
        [&](int i, float4 alpha, float4 k) {
          tile.decay(i, alpha);
          tile.write(i, k, u);
        },
        replayed[t].alpha, replayed[t].k);
  }
  if (args.write_replayed) {
    save(0);
    tile.round();  // the new tokens will be replayed on the state in the pool
  }
  for (int t = 0; t < T; ++t) {
    const TokenRow<kKeyDim>& row = rows[t];
    float answer[Tile::kValues] = {}, out[Tile::kValues] = {}, u[Tile::kValues];
    tile.for_each_key(
        [&](int i, float4 alpha, float4 k, float4 q) {
          tile.decay(i, alpha);
          tile.read(i, k, answer);
          tile.read(i, q, out);
        },
        row.alpha, row.k, row.q);
    tile.reduce(answer);
    tile.reduce(out);
#pragma unroll
    for (int j = 0; j < Tile::kValues; ++j) {
      u[j] = row.beta * (row.v[warp * kWarpValues + tile.value(j)] - answer[j]);
      out[j] = args.scale * (out[j] + row.kq * u[j]);
    }
    tile.for_each_key([&](int i, float4 k) { tile.write(i, k, u); }, row.k);
    for_each_value([&](int j, int column) {
      store_element(args.o, args.out_type, row_of(t) + column, out[j]);
      if (args.next.tokens > 0) args.next.u[row_of(t) + column] = u[j];
    });
    if (args.write_tokens && (args.state_per_token || t + 1 == T)) save(t);
  }
}

template <class Tag, bool kVFirst, int kKeyDim>
int step_sm80<Tag, kVFirst, kKeyDim>::run(const StepArgs& args, void* stream) {
  using Pool = typename PoolElement<Tag>::type;
  // Small batches: one warp a block, so that they reach as many SMs as they can.
  int warps = kStepWarps;
  const auto blocks = [&] {
    return args.batch * args.value_heads *
           ((args.value_dim + warps * kWarpValues - 1) / (warps * kWarpValues));
  };
  while (warps > 1 && blocks() < 2 * args.num_sms) warps /= 2;
  const auto kernel = step_kernel<Pool, kVFirst, kKeyDim>;
  const int bytes = static_cast<int>((args.tokens + args.pending.tokens) * sizeof(TokenRow<kKeyDim>));
  if (const cudaError_t error = allow_shared_memory(kernel, bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks()), warps * 32, bytes, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::delta
