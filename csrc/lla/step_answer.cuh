// From the sums over the keys to the output.
#pragma once

#include "lla/step_solve.cuh"

namespace nearfield::lla {

// What the answer needs of the query.
template <int kD>
struct StepQuery {
  float q[kD], lam[kD];  // lam without the factor of the absolute ridge, one in features that are not there
};

// A thread's feature of the query and its ridge, read before the tiles are asked for: behind tens of KB of
// tiles per block this little would arrive last, and everything waits for it.
template <class Tag>
struct QueryFeature {
  using E = StepElement<Tag>;
  typename E::type q;
  float lam;

  __device__ __forceinline__ QueryFeature(const StepArgs& args, int64_t b, int64_t i, int64_t h) {
    const Ridge<float>& r = args.ridge;
    const int c = min(static_cast<int>(threadIdx.x), args.d - 1);
    q = static_cast<const typename E::type*>(
        args.q.data)[b * args.q.batch_stride + i * args.q.row_stride + h * args.q.head_stride + c];
    lam =
        r.data[b * r.stride[0] + i * r.stride[1] + h * r.stride[2] + (r.channels == 1 ? 0 : c * r.stride[3])];
    if (static_cast<int>(threadIdx.x) >= args.d) q = E::round(0.f), lam = 1.f;
  }
  template <int kD>
  __device__ __forceinline__ void put(StepQuery<kD>& query) const {
    if (threadIdx.x < kD) query.q[threadIdx.x] = E::widen(q), query.lam[threadIdx.x] = lam;
  }
};

// From the sums, in units of the inputs and with w relative to 2^top, to the output. key_sum and value_sum
// (shared memory) are sum w k' and sum w v; `scratch` is shared memory that the block may overwrite.
template <class Tag, int kD, int kDv>
__device__ __forceinline__ void answer(const StepArgs& args, uint32_t output_row, const StepQuery<kD>& query,
                                       float top, float l, const float* c, const float* key_sum,
                                       const float* value_sum, Sums<kD, kDv>& sums, unsigned char* scratch) {
  using S = Sums<kD, kDv>;
  using E = StepElement<Tag>;
  constexpr int kWarps = kStepWarps<kD>, kThreads = kStepThreads<kD>;
  static_assert(kDv <= kThreads && kD <= kThreads);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  auto& system = *reinterpret_cast<System<kD>*>(scratch);
  const float r = 1.f / l;
  // The factor of the absolute ridge: e^-lse = 2^-(top + log2 l).
  const float unit = args.ridge.absolute ? exp2f(fminf(-top - log2f(l), 126.f)) : 1.f;
  // A = C + lam I, b = q - c - kbar'
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = S::row(2 * h);
    const float mean = key_sum[row] * r, ridge = query.lam[row] * (row < args.d ? unit : 1.f);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const float2 sum = *reinterpret_cast<const float2*>(key_sum + S::column(n, 0));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = sums.key_key(n)[2 * h + e];
        x = x * r - mean * ((e ? sum.y : sum.x) * r);  // symmetric, rounding included
        if (row == S::column(n, e)) x += ridge;
      }
    }
  }
  if (thread < kD)
    system.x[thread] = thread < args.d ? query.q[thread] - c[thread] - key_sum[thread] * r : 0.f;
  solve(sums, system);

  // o = vbar (1 - kbar'.x) + sum_r x_r (sum w k'_r v) / l
  float slope = 0.f;
#pragma unroll
  for (int at = 0; at < kD; at += 32) slope += system.x[at + lane] * key_sum[at + lane] * r;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) slope += __shfl_xor_sync(0xffffffffu, slope, step);
  float* parts = system.panel;  // [kWarps, kDv]
  static_assert(kWarps * kDv <= kD * System<kD>::kRow);
  const float x[2] = {system.x[S::row(0)], system.x[S::row(2)]};
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n) {
    float sum[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[e] = x[0] * sums.key_value(n)[e] + x[1] * sums.key_value(n)[e + 2];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(parts + warp * kDv + S::column(n, 0)) = {sum[0], sum[1]};
  }
  __syncthreads();
  if (thread >= args.dv) return;
  float sum = value_sum[thread] * (1.f - slope);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w * kDv + thread];
  static_cast<typename E::type*>(args.o)[static_cast<int64_t>(output_row) * args.dv + thread] =
      E::round(sum * r);
}

}  // namespace nearfield::lla
