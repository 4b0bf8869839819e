// nearfield::gna_fwd and gna_bwd on CUDA: chooses the backend and its kernel instance, plans the tiles,
// splits what one launch cannot do.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_GNA
#include <cstring>
#include <map>
#include <mutex>

#include "gna/checks.h"
#include "gna/sm80.h"
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
#define USE_portable_sm80(element, dim)
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
#undef ENTRY

// The portable kernels, for every architecture of the build.
struct PortableInstance {
  ScalarType dtype;
  int head_dim;
  int (*fwd)(const FwdSm90Args&, void*);
  int (*bwd_dq)(const BwdSm90Args&, void*);
  int (*bwd_dkv)(const BwdSm90Args&, void*);
};
template <class Element>
constexpr ScalarType kDtype = std::is_same_v<Element, bf16>   ? ScalarType::BFloat16
                              : std::is_same_v<Element, fp16> ? ScalarType::Half
                                                              : ScalarType::Float;
const std::vector<PortableInstance> kPortable = {
#undef USE_fwd_sm90
#undef USE_bwd_sm90
#undef USE_bwd_dq_sm90
#undef USE_bwd_ends_sm80
#undef USE_portable_sm80
#define USE_fwd_sm90(element, dim)
#define USE_bwd_sm90(element, dim)
#define USE_bwd_dq_sm90(element, dim)
#define USE_bwd_ends_sm80(element)
#define USE_portable_sm80(element, dim)                                                           \
  {kDtype<element>, dim, &portable_sm80<element, dim>::fwd, &portable_sm80<element, dim>::bwd_dq, \
   &portable_sm80<element, dim>::bwd_dkv},
#include "gna/instances.def"
};
#undef INSTANCE

int64_t largest_head_dim(const Problem& p) { return std::max(p.dim, p.dim_v); }

template <class Args>
const Instance<Args>* find(const std::vector<Instance<Args>>& instances, ScalarType dtype, int64_t dim) {
  const Instance<Args>* best = nullptr;
  for (const auto& i : instances) {
    if (i.bf16 == (dtype == ScalarType::BFloat16) && i.head_dim >= dim &&
        (best == nullptr || i.head_dim < best->head_dim)) {
      best = &i;
    }
  }
  return best;
}

// ---- Backends ----

// Why the Hopper kernels of an operator do not serve a problem; empty if they do.
template <class Args>
std::string hopper_refuses(const std::vector<Instance<Args>>& instances, int capability, ScalarType dtype,
                           int64_t dim, int64_t dim_v) {
  std::ostringstream why;
  if (capability != 90 || instances.empty()) {
    why << "the GPU has compute capability " << capability / 10 << "." << capability % 10
        << ", the Hopper kernels need 9.0 and a build for 90a (this one is for " << NEARFIELD_CUDA_ARCHS
        << ")";
  } else if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    why << "q has dtype " << torch::headeronly::toString(dtype)
        << ", the Hopper kernels take bfloat16 and float16";
  } else if (dim % 8 != 0 || dim_v % 8 != 0 || find(instances, dtype, std::max(dim, dim_v)) == nullptr) {
    int largest = 0;
    for (const auto& i : instances) largest = std::max(largest, i.head_dim);
    why << "the head dims are " << dim << " of q and k and " << dim_v
        << " of v, the Hopper kernels take multiples of 8 up to " << largest;
  }
  return why.str();
}

// True where code for one of the build's architectures runs: "80" on 8.0 to 8.9, "90a" on 9.0 only.
bool is_built_for(int capability) {
  std::istringstream archs(NEARFIELD_CUDA_ARCHS);
  for (std::string arch; std::getline(archs, arch, ';');) {
    const int number = std::stoi(arch);
    const bool only = arch.back() < '0' || arch.back() > '9';
    if (only ? number == capability : number / 10 == capability / 10 && number <= capability) return true;
  }
  return false;
}

const PortableInstance& pick_portable(const char* op, const Tensor& q, const Problem& p) {
  const int capability = device_info(q.get_device_index()).capability;
  STD_TORCH_CHECK(is_built_for(capability), op, ": the GPU has compute capability ", capability / 10, ".",
                  capability % 10, "; this build is for ", NEARFIELD_CUDA_ARCHS);
  const auto dtype = q.scalar_type();
  const PortableInstance* best = nullptr;
  int largest = 0;
  for (const auto& i : kPortable) {
    if (i.dtype != dtype) continue;
    largest = std::max(largest, i.head_dim);
    if (i.head_dim >= largest_head_dim(p) && (best == nullptr || i.head_dim < best->head_dim)) best = &i;
  }
  STD_TORCH_CHECK(largest > 0, op, ": q has dtype ", torch::headeronly::toString(dtype),
                  "; supported on CUDA: bfloat16, float16, float32");
  STD_TORCH_CHECK(best != nullptr, op, ": head dims ", p.dim, " of q and k and ", p.dim_v,
                  " of v; supported on CUDA: up to ", largest);
  return *best;
}

using Backend = std::optional<std::string>;

// True: the Hopper kernels run. False: the portable ones.
template <class Args>
bool choose_hopper(const char* op, const Backend& backend, const std::vector<Instance<Args>>& instances,
                   const Tensor& q, const Problem& p) {
  if (backend && *backend == "portable") return false;
  STD_TORCH_CHECK(!backend || *backend == "hopper", op, ": backend is \"", *backend,
                  "\"; known: \"hopper\", \"portable\"");
  const std::string why = hopper_refuses(instances, device_info(q.get_device_index()).capability,
                                         q.scalar_type(), p.dim, p.dim_v);
  STD_TORCH_CHECK(!backend || why.empty(), op, ": backend \"hopper\" was asked for, but ", why);
  return why.empty();
}

// For Python, which tells the user once: why a Hopper GPU leaves its own kernels aside, in the forward or in
// the backward. Empty if it does not, or if the GPU is another.
std::string slower_because(int64_t device, ScalarType dtype, int64_t dim, int64_t dim_v) {
  const int capability = device_info(static_cast<int>(device)).capability;
  if (capability != 90) return "";
  const std::string why = hopper_refuses(kForward, capability, dtype, dim, dim_v);
  return why.empty() ? hopper_refuses(kBackward, capability, dtype, dim, dim_v) : why;
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

// Portable kernels place every row by itself, so dilation limits no box; all groups use the boxes of the
// longest.
Boxes plan_portable(Problem p, const PortableTile& tile, Direction direction) {
  for (int d = 0; d < 3; ++d) {
    p.size[d] = group_length(p.size[d], p.dilation[d], 0);
    p.dilation[d] = 1;
  }
  return direction == Direction::kForward ? plan(p, tile.kStaying, tile.kMoving, direction)
                                          : plan(p, tile.kMoving, tile.kStaying, direction);
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

int element_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

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
                                    Ints is_causal, double scale, Backend backend) {
  const char* op = "gna_fwd";
  const Problem p =
      check_problem(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const bool hopper = choose_hopper(op, backend, kForward, q, p);
  const PortableInstance* portable = hopper ? nullptr : &pick_portable(op, q, p);

  auto shape = shape_of(q);
  shape.back() = p.dim_v;
  Tensor out = torch::stable::new_empty(q, shape);
  shape.pop_back();
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  const auto input = hopper ? loadable : readable;
  q = input(q), k = input(k), v = input(v);
  FwdSm90Args args{};
  args.problem = p;
  args.scale = static_cast<float>(scale);
  args.q = untyped(tokens_of<const char>(q, p.rank));
  args.k = untyped(tokens_of<const char>(k, p.rank));
  args.v = untyped(tokens_of<const char>(v, p.rank));
  if (p.additional > 0) {
    additional_k = input(*additional_k), additional_v = input(*additional_v);
    args.add_k = untyped(tokens_of<const char>(*additional_k, 1));
    args.add_v = untyped(tokens_of<const char>(*additional_v, 1));
  }
  args.out = tokens_of<void>(out, p.rank);
  args.lse = tokens_of<float>(lse, p.rank, false);
  Tensor next_work = torch::stable::new_empty(q, {1}, ScalarType::Int);
  args.next_work = static_cast<int*>(next_work.data_ptr());
  args.num_sms = device_info(q.get_device_index()).num_sms;
  void* stream = current_stream(q);

  const auto run = [&](FwdSm90Args launch, const Boxes& boxes, auto* kernel) {
    launch.q_box = boxes.q;
    launch.kv_box = boxes.kv;
    const int error = kernel(launch, stream);
    STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  };
  if (!hopper) {
    const PortableTile tile = portable_fwd_tile(portable->head_dim, element_bytes(q));
    run(args, plan_portable(p, tile, Direction::kForward), portable->fwd);
    return {out, lse};
  }
  const Instance<FwdSm90Args>& instance = *find(kForward, q.scalar_type(), largest_head_dim(p));
  const FwdTile tile = fwd_tile(instance.head_dim);
  for_each_launch(args, 0, [&](const FwdSm90Args& launch) {
    run(launch, plan(launch.problem, tile.kBlockM, tile.kBlockN, Direction::kForward), instance.run);
  });
  return {out, lse};
}

// ---- Backward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cuda(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor additional_k, OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
    Ints is_causal, double scale, bool deterministic, Backend backend) {
  const char* op = "gna_bwd";
  const Problem p =
      check_problem(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal);
  check_gradients(op, p, q, dout, dlse, out, lse);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const bool hopper = choose_hopper(op, backend, kBackward, q, p);
  const PortableInstance* portable = hopper ? nullptr : &pick_portable(op, q, p);
  deterministic |= !hopper;  // the portable kernels always are
  const bool with_additional = p.additional > 0;

  Tensor dq = torch::stable::new_empty(q, shape_of(q)), dk = torch::stable::new_empty(q, shape_of(k));
  Tensor dv = torch::stable::new_empty(q, shape_of(v));
  Tensor add_dk = torch::stable::new_empty(q, with_additional ? shape_of(*additional_k) : Ints{0});
  Tensor add_dv = torch::stable::new_empty(q, with_additional ? shape_of(*additional_v) : Ints{0});
  if (lse.numel() == 0) return {dq, dk, dv, add_dk, add_dv};

  void* stream = current_stream(q);
  const bool is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  const bool is_fp32 = q.scalar_type() == ScalarType::Float;
  const auto check = [&](int error) { STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error)); };

  const auto input = hopper ? loadable : readable;
  q = input(q), k = input(k), v = input(v);
  dout = input(torch::stable::contiguous(dout));
  lse = torch::stable::contiguous(lse);
  if (defined(dlse)) dlse = torch::stable::contiguous(*dlse);
  std::vector<int64_t> stats_shape = shape_of(lse);
  stats_shape.push_back(2);
  Tensor stats = torch::stable::new_empty(q, stats_shape, ScalarType::Float);
  check((is_bf16   ? bwd_ends_sm80<bf16>::prepare
         : is_fp32 ? bwd_ends_sm80<fp32>::prepare
                   : bwd_ends_sm80<fp16>::prepare)(
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
    additional_k = input(*additional_k), additional_v = input(*additional_v);
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
  const auto run_in = [&](BwdSm90Args launch, const Boxes& boxes, int (*kernel)(const BwdSm90Args&, void*)) {
    launch.q_box = boxes.q;
    launch.kv_box = boxes.kv;
    check(kernel(launch, stream));
  };
  const auto run = [&](const Instance<BwdSm90Args>& kernel, const BwdSm90Args& launch, int block_m,
                       int block_n, Direction direction) {
    run_in(launch, plan(launch.problem, block_m, block_n, direction), kernel.run);
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
  if (!hopper) {
    const PortableTile tile = portable_bwd_tile(portable->head_dim, element_bytes(q));
    run_in(args, plan_portable(p, tile, Direction::kForward), portable->bwd_dq);
    run_in(args, plan_portable(p, tile, Direction::kBackward), portable->bwd_dkv);
    if (with_additional) {
      run_in(extra, plan_portable(extra.problem, tile, Direction::kBackward), portable->bwd_dkv);
    }
    return {dq, dk, dv, add_dk, add_dv};
  }
  const Instance<BwdSm90Args>& instance = *find(kBackward, q.scalar_type(), largest_head_dim(p));
  const Instance<BwdSm90Args>& query_gradient = *find(kQueryGradient, q.scalar_type(), largest_head_dim(p));
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
STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  m.def("gna_slower_because(int device, ScalarType dtype, int dim, int dim_v) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(nearfield, CompositeExplicitAutograd, m) {
  m.impl("gna_slower_because", TORCH_BOX(&nearfield::gna::slower_because));
}
#endif
