// nearfield::lla_step on CUDA: checks, the choice of the kernel instance, and into how many splits the keys
// go.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_LLA
#include "lla/checks.h"
#include "lla/step.h"
#include "nearfield/device.h"

namespace nearfield::lla {
namespace {

struct Instance {
  bool hopper, clusters;
  ScalarType type;
  int d, dv;
  int floats;  // of the moments of one split
  int (*run)(const StepArgs&, void*);
};

template <class Tag>
constexpr ScalarType kScalarType = std::is_same_v<Tag, bf16> ? ScalarType::BFloat16 : ScalarType::Half;

// instances.def also lists the kernels of cuda.cpp, whose lines are dropped here.
const std::vector<Instance> kSteps = {
#define INSTANCE(kernel, ...) USE_##kernel(__VA_ARGS__)
#define USE_operands_sm80(element)
#define USE_portable_sm80(tag, dim)
#define USE_fwd_sm90(dim)
#define USE_fwd_grid_sm90(dim)
#define USE_bwd_query_sm90(dim)
#define USE_bwd_query_grid_sm90(dim)
#define USE_bwd_key_sm90(dim)
#define USE_bwd_key_grid_sm90(dim)
#define USE_STEP(kernel, hopper, element, d, dv)                              \
  {hopper, kernel<element, d, dv>::kClusters, kScalarType<element>,        d, \
   dv,     kernel<element, d, dv>::kFloats,   &kernel<element, d, dv>::run},
#define USE_step_sm80(element, d, dv) USE_STEP(step_sm80, false, element, d, dv)
#ifdef NEARFIELD_LLA_SM90
#define USE_step_sm90(element, d, dv) USE_STEP(step_sm90, true, element, d, dv)
#else
#define USE_step_sm90(element, d, dv)
#endif
#include "lla/instances.def"
#undef INSTANCE
#undef USE_step_sm80
#undef USE_step_sm90
#undef USE_STEP
};

// The smallest that holds the head dims, Hopper's own before the others.
const Instance& pick(const char* op, const Tensor& q, int64_t d, int64_t dv, bool hopper) {
  const auto type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": q has dtype ",
                  torch::headeronly::toString(type), "; supported on CUDA: bfloat16, float16");
  const Instance* best = nullptr;
  std::ostringstream built;
  for (const auto& i : kSteps) {
    if (i.type != type || (i.hopper && !hopper)) continue;
    if (!i.hopper) built << (built.tellp() ? ", " : "") << i.d << "/" << i.dv;
    const auto before = [](const Instance& x, const Instance& y) {
      return x.floats != y.floats ? x.floats < y.floats : x.hopper > y.hopper;
    };
    if (i.d >= d && i.dv >= dv && (best == nullptr || before(i, *best))) best = &i;
  }
  STD_TORCH_CHECK(best != nullptr && d % 8 == 0 && dv % 8 == 0, op, ": head dims ", d,
                  " of q and k_cache and ", dv,
                  " of v_cache; supported on CUDA: multiples of 8 up to one of ", built.str());
  return *best;
}

// A cache is read 16 bytes at a time; a copy of it would be a slow surprise.
void check_alignment(const char* op, const char* name, const Tensor& t) {
  bool fits =
      reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (t.sizes()[3] <= 1 || t.strides()[3] == 1);
  for (int d = 0; d < 3; ++d) fits &= t.sizes()[d] <= 1 || t.strides()[d] % 8 == 0;
  STD_TORCH_CHECK(fits, op, ": ", name, " has strides ", shape_text(t.strides().data(), 4),
                  "; supported on CUDA: a dense last dimension, rows at multiples of 16 bytes");
}

// The copy engine steps through memory; a broadcast dimension has nothing to step through.
bool has_steps(const Tensor& t) {
  for (int d = 0; d < 3; ++d)
    if (t.sizes()[d] > 1 && t.strides()[d] <= 0) return false;
  return true;
}

View<const void> untyped(const Tensor& t) {
  const auto stride = t.strides();
  return {t.const_data_ptr(), stride[0], stride[1], stride[2]};
}

// Enough blocks to fill the GPU a few times over, but no split shorter than what its sums cost to merge.
constexpr int64_t kBlocksPerSm = 3, kKeysPerSplit = 256;
// Clusters want fewer: all of a cluster share a GPC, so a third block per SM is there for some of them only.
// A cluster is worth SMs without work up to so many keys per block; a second kernel costs as much as reading
// them.
constexpr int64_t kClusterBlocksPer4Sms = 7, kKeysPerClusterBlock = 2048;

// Into how many splits the keys of a query go, and whether they are a cluster.
void choose_splits(StepArgs& args, const Instance& instance, int num_sms) {
  const int64_t queries = args.batch * args.heads * args.m, keys = std::min(args.n, args.window);
  const int64_t wanted = std::min(kBlocksPerSm * num_sms / queries, keys / kKeysPerSplit);
  int64_t splits = std::clamp<int64_t>(wanted, 1, kMaxSplits);
  if (instance.clusters && (splits <= kMaxCluster || queries * kMaxCluster >= num_sms ||
                            keys <= kMaxCluster * kKeysPerClusterBlock)) {
    splits = std::min({splits, kClusterBlocksPer4Sms * num_sms / (4 * queries), int64_t{kMaxCluster}});
    args.cluster = splits > 1;
  }
  args.splits = static_cast<int>(std::max<int64_t>(splits, 1));
}

Tensor step_cuda(const Tensor& q_, const Tensor& k, const Tensor& v, std::optional<Tensor> cache_seqlens,
                 const Tensor& lam, double scale, std::optional<int64_t> window, bool absolute) {
  const char* op = "lla_step";
  check_inputs(op, q_, k, v, window);
  check_lam(op, lam, q_);
  check_lengths(op, cache_seqlens, q_);
  torch::stable::accelerator::DeviceGuard guard(q_.get_device_index());
  const int64_t d = k.sizes()[3], dv = v.sizes()[3];
  const DeviceInfo device = device_info(q_.get_device_index());
  const Instance& instance = pick(op, q_, d, dv, device.capability == 90 && has_steps(k) && has_steps(v));
  const Tensor q = dense_rows(q_);
  const auto s = q.sizes();
  const Tensor o = allocate(q, {s[0], s[1], s[2], dv});
  if (o.numel() == 0) return o;
  check_alignment(op, "k_cache", k), check_alignment(op, "v_cache", v);

  StepArgs args{};
  args.batch = s[0], args.m = s[1], args.n = k.sizes()[1], args.heads = s[2], args.kv_heads = k.sizes()[2];
  args.d = static_cast<int>(d), args.dv = static_cast<int>(dv);
  args.q = untyped(q), args.k = untyped(k), args.v = untyped(v);
  if (defined(cache_seqlens)) {
    args.lengths = cache_seqlens->const_data_ptr();
    args.lengths_are_int64 = cache_seqlens->scalar_type() == ScalarType::Long;
    args.lengths_stride = cache_seqlens->strides()[0];
  }
  args.ridge = make_ridge<float>(lam, absolute);
  args.scale = static_cast<float>(scale);
  args.window = window_or_all(window, args.n);
  args.o = o.mutable_data_ptr();

  choose_splits(args, instance, device.num_sms);
  Tensor moments;
  if (args.splits > 1 && !args.cluster) {
    moments = allocate(q, {s[0], s[1], s[2], args.splits, instance.floats}, ScalarType::Float);
    args.moments = data_of<float>(moments);
  }
  const int error = instance.run(args, current_stream(q));
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) { m.impl("lla_step", TORCH_BOX(&step_cuda)); }

}  // namespace nearfield::lla
#endif
