// nearfield::gna_fwd on CUDA: picks the kernel instance, plans the tiles, splits what one launch cannot do.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_GNA
#include <cstring>
#include <map>
#include <mutex>

#include "gna/checks.h"
#include "gna/sm90.h"
#include "gna/tiles.h"
#include "nearfield/device.h"
#include "nearfield/tile_plan.h"

namespace nearfield::gna {
namespace {

// ---- Instances: what instances.def lists ----

template <class Args>
struct Instance {
  bool bf16;
  int head_dim;
  int (*run)(const Args&, void*);
};

// The list is read once per kernel; each reading drops the lines of the others.
#define INSTANCE(kernel, ...) USE_##kernel(__VA_ARGS__)
#define ENTRY(kernel, element, dim) {std::is_same_v<element, bf16>, dim, &kernel<element, dim>::run},

const std::vector<Instance<FwdSm90Args>> kForward = {
#ifdef NEARFIELD_GNA_SM90
#define USE_fwd_sm90(element, dim) ENTRY(fwd_sm90, element, dim)
#define USE_bwd_sm90(element, dim)
#define USE_bwd_dq_sm90(element, dim)
#define USE_bwd_ends_sm80(element)
#include "gna/instances.def"
#undef USE_fwd_sm90
#undef USE_bwd_sm90
#endif
};
const std::vector<Instance<BwdSm90Args>> kBackward = {
#ifdef NEARFIELD_GNA_SM90
#define USE_fwd_sm90(element, dim)
#define USE_bwd_sm90(element, dim) ENTRY(bwd_sm90, element, dim)
#include "gna/instances.def"
#undef USE_bwd_sm90
#undef USE_bwd_dq_sm90
#endif
};
const std::vector<Instance<BwdSm90Args>> kQueryGradient = {
#ifdef NEARFIELD_GNA_SM90
#define USE_bwd_sm90(element, dim)
#define USE_bwd_dq_sm90(element, dim) ENTRY(bwd_dq_sm90, element, dim)
#include "gna/instances.def"
#endif
};
#undef INSTANCE
#undef ENTRY

template <class Args>
const Instance<Args>& pick(const char* op, const std::vector<Instance<Args>>& instances, const Tensor& q,
                           const Problem& p) {
  const auto dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": q has dtype ",
                  torch::headeronly::toString(dtype), "; supported on CUDA: bfloat16, float16");
  const int64_t dim = std::max(p.dim, p.dim_v);
  const Instance<Args>* best = nullptr;
  std::ostringstream built;
  for (const auto& i : instances) {
    if (i.bf16 != (dtype == ScalarType::BFloat16)) continue;
    built << (built.tellp() ? ", " : "") << i.head_dim;
    if (i.head_dim >= dim && (best == nullptr || i.head_dim < best->head_dim)) best = &i;
  }
  STD_TORCH_CHECK(best != nullptr && p.dim % 8 == 0 && p.dim_v % 8 == 0, op, ": head dims ", p.dim,
                  " of q and k and ", p.dim_v,
                  " of v; supported on CUDA: multiples of 8 up to the largest built, of ", built.str());
  return *best;
}

void check_capability(const char* op, const Tensor& q) {
  const DeviceInfo device = device_info(q.get_device_index());
  STD_TORCH_CHECK(device.capability == 90, op, ": the GPU has compute capability ", device.capability / 10,
                  ".", device.capability % 10, "; this build (", NEARFIELD_CUDA_ARCHS,
                  ") has kernels for 9.0 (Hopper)");
}

// ---- Tile plan ----

// A partial tile costs this much more than a full one (measured, README.md).
constexpr double kPartialCost = 1.1;

struct Boxes {
  Box q, kv;
};

Boxes plan(const Problem& p, int block_m, int block_n, Direction direction) {
  // The geometry alone decides; it is planned once.
  using Key = std::array<int, 3 * 5 + 3>;
  Key key{block_m, block_n, static_cast<int>(direction)};
  std::vector<Axis> axes;
  for (int d = 0; d < 3; ++d) {
    const int at[5] = {p.size[d], p.window[d], p.stride[d], p.dilation[d], p.causal[d]};
    std::copy(at, at + 5, key.begin() + 3 + 5 * d);
    if (d >= 3 - p.rank) axes.push_back({p.size[d], p.window[d], p.stride[d], p.dilation[d], p.causal[d]});
  }
  static std::mutex mutex;
  static std::map<Key, Boxes> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const TileChoice choice =
      best_tiles(axes, block_m, block_n, Placement::kSpan, kPartialCost, direction, Shapes::kFitting);
  Boxes boxes{{{1, 1, 1}}, {{1, 1, 1}}};
  for (int i = 0; i < p.rank; ++i) {
    boxes.q.side[3 - p.rank + i] = choice.q_tile[i];
    boxes.kv.side[3 - p.rank + i] = choice.kv_tile[i];
  }
  return known[key] = boxes;
}

// ---- Tensors ----

// The tensor itself if the copy engine can read it: contiguous features, 16-byte aligned start and strides.
// Else a copy.
Tensor loadable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) fits &= t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) % 8 == 0);
  if (fits) return t;
  Tensor copy = torch::stable::new_empty(t, shape_of(t));
  return torch::stable::copy_(copy, t);
}

template <class T>
Tokens<const void> untyped(const Tokens<T>& t) {
  return {t.data, t.batch, {t.x[0], t.x[1], t.x[2]}, t.head};
}

// Moves a view to dilation group r of dimension d: every step-th position from r on.
template <class T>
void enter_group(Tokens<T>& t, int d, int r, int64_t step, int element_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  t.data = reinterpret_cast<T*>(reinterpret_cast<Byte*>(t.data) + r * t.x[d] * element_bytes);
  t.x[d] *= step;
}

// The copy engine steps over at most 8 positions and spans at most 256, of which a box on a line holds over
// 100. A dimension with a larger dilation is launched group by group.
constexpr int max_step(int rank) { return rank == 1 ? 2 : 8; }

void enter_group(FwdSm90Args& args, int d, int r, int step) {
  for (Tokens<const void>* t : {&args.q, &args.k, &args.v}) enter_group(*t, d, r, step, 2);
  enter_group(args.out, d, r, step, 2);
  enter_group(args.lse, d, r, step, 4);
}

void enter_group(BwdSm90Args& args, int d, int r, int step) {
  for (Tokens<const void>* t : {&args.q, &args.k, &args.v, &args.dout}) enter_group(*t, d, r, step, 2);
  for (Tokens<void>* t : {&args.dk, &args.dv, &args.dq_out}) enter_group(*t, d, r, step, 2);
  enter_group(args.stats, d, r, step, sizeof(RowStats));
}

// Calls run(args) for every launch that the dilation asks for.
template <class Args, class Run>
void for_each_launch(const Args& args, int d, const Run& run) {
  if (d == 3) return run(args);
  const int step = args.problem.dilation[d];
  if (step <= max_step(args.problem.rank)) return for_each_launch(args, d + 1, run);
  for (int r = 0; r < step; ++r) {
    Args group = args;
    group.problem.size[d] = group_length(args.problem.size[d], step, r);
    group.problem.dilation[d] = 1;
    enter_group(group, d, r, step);
    for_each_launch(group, d + 1, run);
  }
}

// ---- Forward ----

std::tuple<Tensor, Tensor> fwd_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor additional_k,
                                    OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
                                    Ints is_causal, double scale) {
  const char* op = "gna_fwd";
  const Problem p =
      check_problem(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_capability(op, q);
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const Instance<FwdSm90Args>& instance = pick(op, kForward, q, p);

  auto shape = shape_of(q);
  shape.back() = p.dim_v;
  Tensor out = torch::stable::new_empty(q, shape);
  shape.pop_back();
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  q = loadable(q), k = loadable(k), v = loadable(v);
  FwdSm90Args args{};
  args.problem = p;
  args.scale = static_cast<float>(scale);
  args.q = untyped(tokens_of<const char>(q, p.rank));
  args.k = untyped(tokens_of<const char>(k, p.rank));
  args.v = untyped(tokens_of<const char>(v, p.rank));
  if (p.additional > 0) {
    additional_k = loadable(*additional_k), additional_v = loadable(*additional_v);
    args.add_k = untyped(tokens_of<const char>(*additional_k, 1));
    args.add_v = untyped(tokens_of<const char>(*additional_v, 1));
  }
  args.out = tokens_of<void>(out, p.rank);
  args.lse = tokens_of<float>(lse, p.rank, false);
  Tensor next_work = torch::stable::new_empty(q, {1}, ScalarType::Int);
  args.next_work = static_cast<int*>(next_work.data_ptr());
  args.num_sms = device_info(q.get_device_index()).num_sms;
  void* stream = current_stream(q);

  const FwdTile tile = fwd_tile(instance.head_dim);
  for_each_launch(args, 0, [&](FwdSm90Args launch) {
    const Boxes boxes = plan(launch.problem, tile.kBlockM, tile.kBlockN, Direction::kForward);
    launch.q_box = boxes.q;
    launch.kv_box = boxes.kv;
    const int error = instance.run(launch, stream);
    STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  });
  return {out, lse};
}

// ---- Backward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cuda(Tensor dout, OptionalTensor dlse, Tensor q,
                                                            Tensor k, Tensor v, Tensor out, Tensor lse,
                                                            OptionalTensor additional_k,
                                                            OptionalTensor additional_v, Ints kernel_size,
                                                            Ints stride, Ints dilation, Ints is_causal,
                                                            double scale, bool deterministic) {
  const char* op = "gna_bwd";
  const Problem p =
      check_problem(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal);
  check_gradients(op, p, q, dout, dlse, out, lse);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_capability(op, q);
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const Instance<BwdSm90Args>& instance = pick(op, kBackward, q, p);
  const Instance<BwdSm90Args>& query_gradient = pick(op, kQueryGradient, q, p);
  const bool with_additional = p.additional > 0;

  Tensor dq = torch::stable::new_empty(q, shape_of(q)), dk = torch::stable::new_empty(q, shape_of(k));
  Tensor dv = torch::stable::new_empty(q, shape_of(v));
  Tensor add_dk = torch::stable::new_empty(q, with_additional ? shape_of(*additional_k) : Ints{0});
  Tensor add_dv = torch::stable::new_empty(q, with_additional ? shape_of(*additional_v) : Ints{0});
  if (lse.numel() == 0) return {dq, dk, dv, add_dk, add_dv};

  void* stream = current_stream(q);
  const bool is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  const auto check = [&](int error) { STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error)); };

  q = loadable(q), k = loadable(k), v = loadable(v);
  dout = loadable(torch::stable::contiguous(dout));
  lse = torch::stable::contiguous(lse);
  if (defined(dlse)) dlse = torch::stable::contiguous(*dlse);
  std::vector<int64_t> stats_shape = shape_of(lse);
  stats_shape.push_back(2);
  Tensor stats = torch::stable::new_empty(q, stats_shape, ScalarType::Float);
  check((is_bf16 ? bwd_ends_sm80<bf16>::prepare : bwd_ends_sm80<fp16>::prepare)(
      dout.data_ptr(), out.data_ptr(), static_cast<const float*>(lse.data_ptr()),
      defined(dlse) ? static_cast<const float*>(dlse->data_ptr()) : nullptr,
      static_cast<RowStats*>(stats.data_ptr()), lse.numel(), p.dim_v, stream));

  BwdSm90Args args{};
  args.problem = p;
  args.scale = static_cast<float>(scale);
  args.q = untyped(tokens_of<const char>(q, p.rank));
  args.k = untyped(tokens_of<const char>(k, p.rank));
  args.v = untyped(tokens_of<const char>(v, p.rank));
  args.dout = untyped(tokens_of<const char>(dout, p.rank));
  args.stats = tokens_of<const RowStats>(lse, p.rank, false);  // one pair per row of lse
  args.stats.data = static_cast<const RowStats*>(stats.data_ptr());
  args.dk = tokens_of<void>(dk, p.rank);
  args.dv = tokens_of<void>(dv, p.rank);
  args.dq_out = tokens_of<void>(dq, p.rank);
  Tensor next_work = torch::stable::new_empty(q, {1}, ScalarType::Int);
  args.next_work = static_cast<int*>(next_work.data_ptr());
  args.num_sms = device_info(q.get_device_index()).num_sms;
  if (with_additional) {
    additional_k = loadable(*additional_k), additional_v = loadable(*additional_v);
    args.add_k = untyped(tokens_of<const char>(*additional_k, 1));
    args.add_v = untyped(tokens_of<const char>(*additional_v, 1));
  }
  // Launches follow each other on one stream, so that they share the buffer; the first dilation group is the
  // longest.
  Tensor buffer;
  if (!deterministic) {
    buffer = torch::stable::new_empty(q, {DqBuffer(p).elements}, ScalarType::Float);
    args.dq = static_cast<float*>(buffer.data_ptr());
  }
  const auto finish = [&](const BwdSm90Args& launch, bool accumulate) {
    check((is_bf16 ? bwd_ends_sm80<bf16>::finish : bwd_ends_sm80<fp16>::finish)(
        launch.problem, launch.scale, launch.dq, launch.dq_out, accumulate, stream));
  };
  const auto run = [&](const Instance<BwdSm90Args>& kernel, BwdSm90Args launch, int block_m, int block_n,
                       Direction direction) {
    const Boxes boxes = plan(launch.problem, block_m, block_n, direction);
    launch.q_box = boxes.q;
    launch.kv_box = boxes.kv;
    check(kernel.run(launch, stream));
  };

  // The additional tokens as staying keys that the whole grid sees, without dilation.
  BwdSm90Args extra = args;
  extra.to_additional = true;
  for (int d = 0; d < 3; ++d) {
    extra.problem.window[d] = p.size[d];
    extra.problem.stride[d] = extra.problem.dilation[d] = 1;
    extra.problem.causal[d] = false;
  }
  if (with_additional) {
    extra.dk = tokens_of<void>(add_dk, 1);
    extra.dv = tokens_of<void>(add_dv, 1);
  }
  const BwdTile tile = bwd_tile(instance.head_dim);
  const FwdTile query_tile = dq_tile(query_gradient.head_dim);
  // One buffer takes both shares of dQ if its order, by dilation group, is the same for both.
  const bool undilated = p.groups() == 1;
  for_each_launch(args, 0, [&](const BwdSm90Args& launch) {
    if (!deterministic) torch::stable::zero_(buffer);
    run(instance, launch, tile.kBlockM, tile.kBlockN, Direction::kBackward);
    if (deterministic) {
      run(query_gradient, launch, query_tile.kBlockM, query_tile.kBlockN, Direction::kForward);
      return;
    }
    if (with_additional && undilated) run(instance, extra, tile.kBlockM, tile.kBlockN, Direction::kBackward);
    finish(launch, false);
  });
  if (with_additional && (deterministic || !undilated)) {
    if (!deterministic) torch::stable::zero_(buffer);
    run(instance, extra, tile.kBlockM, tile.kBlockN, Direction::kBackward);
    if (!deterministic) finish(extra, true);
  }
  return {dq, dk, dv, add_dk, add_dv};
}

}  // namespace
}  // namespace nearfield::gna

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("gna_fwd", TORCH_BOX(&nearfield::gna::fwd_cuda));
  m.impl("gna_bwd", TORCH_BOX(&nearfield::gna::bwd_cuda));
}
#endif
