// nearfield::lla_* on CUDA: allocation of the operands, pick of the kernel instance, dispatch.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_LLA
#include "lla/checks.h"
#include "lla/grid_sm90.h"
#include "lla/plan.h"
#include "lla/sm80.h"
#include "nearfield/device.h"

namespace nearfield::lla {
namespace {

// ---- Instances: what instances.def lists ----

template <class... Args>
struct Instance {
  int head_dim;
  int (*run)(const Args&..., void*);
};

struct Portable {
  bool is_half;  // operands
  int head_dim;
  int (*operands)(const OperandsArgs&, void*);
  int (*fwd)(const FwdSm80Args&, void*);
  int (*bwd_queries)(const BwdSm80Args&, void*);
  int (*bwd_dq)(const BwdSm80Args&, void*);
  int (*bwd_dkv)(const BwdSm80Args&, void*);
};

template <class Tag, int kHeadDim>
Portable portable() {
  using Kernels = portable_sm80<Tag, kHeadDim>;
  return {std::is_same_v<Tag, fp16>, kHeadDim,         &Kernels::operands, &Kernels::fwd,
          &Kernels::bwd_queries,     &Kernels::bwd_dq, &Kernels::bwd_dkv};
}

// The list is read once per kernel; each reading drops the lines of the others.
#define INSTANCE(kernel, ...) USE_##kernel(__VA_ARGS__)
#define USE_operands_sm80(element)
#define USE_step_sm80(element, d, dv)
#define USE_step_sm90(element, d, dv)

const std::vector<Portable> kPortable = {
#define USE_portable_sm80(tag, dim) portable<tag, dim>(),
#define USE_fwd_sm90(dim)
#define USE_fwd_grid_sm90(dim)
#define USE_bwd_query_sm90(dim)
#define USE_bwd_query_grid_sm90(dim)
#define USE_bwd_key_sm90(dim)
#define USE_bwd_key_grid_sm90(dim)
#include "lla/instances.def"
#undef USE_portable_sm80
#undef USE_fwd_sm90
};
#define USE_portable_sm80(tag, dim)
const std::vector<Instance<FwdSm90Args>> kForward = {
#ifdef NEARFIELD_LLA_SM90
#define USE_fwd_sm90(dim) {dim, &fwd_sm90<dim>::run},
#include "lla/instances.def"
#undef USE_fwd_sm90
#undef USE_fwd_grid_sm90
#endif
};
const std::vector<Instance<FwdSm90Args, Grid>> kForwardOnGrid = {
#ifdef NEARFIELD_LLA_SM90
#define USE_fwd_sm90(dim)
#define USE_fwd_grid_sm90(dim) {dim, &fwd_grid_sm90<dim>::run},
#include "lla/instances.def"
#undef USE_fwd_grid_sm90
#undef USE_bwd_query_sm90
#endif
};
const std::vector<Instance<BwdSm90Args>> kBackwardOfQueries = {
#ifdef NEARFIELD_LLA_SM90
#define USE_fwd_grid_sm90(dim)
#define USE_bwd_query_sm90(dim) {dim, &bwd_query_sm90<dim>::run},
#include "lla/instances.def"
#undef USE_bwd_query_sm90
#undef USE_bwd_query_grid_sm90
#endif
};
const std::vector<Instance<BwdSm90Args, Grid>> kBackwardOfQueriesOnGrid = {
#ifdef NEARFIELD_LLA_SM90
#define USE_bwd_query_sm90(dim)
#define USE_bwd_query_grid_sm90(dim) {dim, &bwd_query_grid_sm90<dim>::run},
#include "lla/instances.def"
#undef USE_bwd_query_grid_sm90
#undef USE_bwd_key_sm90
#endif
};
const std::vector<Instance<BwdSm90Args>> kBackwardOfKeys = {
#ifdef NEARFIELD_LLA_SM90
#define USE_bwd_query_grid_sm90(dim)
#define USE_bwd_key_sm90(dim) {dim, &bwd_key_sm90<dim>::run},
#include "lla/instances.def"
#undef USE_bwd_key_sm90
#undef USE_bwd_key_grid_sm90
#endif
};
const std::vector<Instance<BwdSm90Args, Grid>> kBackwardOfKeysOnGrid = {
#ifdef NEARFIELD_LLA_SM90
#define USE_bwd_key_sm90(dim)
#define USE_bwd_key_grid_sm90(dim) {dim, &bwd_key_grid_sm90<dim>::run},
#include "lla/instances.def"
#endif
};
#undef INSTANCE

using Backend = std::optional<std::string>;

Plan plan_of(const char* op, const Tensor& q, const Tensor& v, const Backend& backend) {
  return choose_plan(op, q.scalar_type(), q.sizes()[3], v.sizes()[3],
                     device_info(q.get_device_index()).capability, backend);
}

// The plan has checked that the instance is built.
template <class Instances>
const auto& instance_of(const Instances& instances, const Plan& plan) {
  return *std::find_if(instances.begin(), instances.end(),
                       [&](const auto& i) { return i.head_dim == plan.head_dim; });
}
const Portable& portable_of(const Plan& plan, ScalarType dtype) {
  return *std::find_if(kPortable.begin(), kPortable.end(), [&](const Portable& i) {
    return i.head_dim == plan.head_dim && i.is_half == (dtype != ScalarType::Float);
  });
}

Element element_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Element::kBf16
         : dtype == ScalarType::Half   ? Element::kFp16
                                       : Element::kFp32;
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
}

// ---- Operands ----

// Tensors of the caller on their way to fp16 tiles, or to rows of float for float32 tensors; the memory lives
// as long as this object.
class Operands {
  static constexpr int kMost = 6;

 public:
  Operands(const char* op, const Tensor& like, const Plan& plan, const Packing& packing, const Grid& grid)
      : op_(op),
        like_(like),
        grid_(grid),
        end_(packing ? bounds_of(packing) + packing->sizes()[0] - 1 : nullptr) {
    args_.batch = static_cast<int>(like.sizes()[0]);
    args_.head_dim = plan.head_dim;
    heads_ = like.sizes()[2];
    largest_ = allocate(like, {kMost, args_.batch * heads_}, ScalarType::Float);
    args_.clear = data_of<float>(largest_);  // all at once
    args_.clear_count = static_cast<int>(kMost * args_.batch * heads_);
    if (like.scalar_type() == ScalarType::Float) float_rows_ = portable_of(plan, ScalarType::Float).operands;
  }

  // Memory of an operand. Rows are padded to a multiple of `rows_of_block`. The largest values are zero
  // behind the first write().
  Operand reserve(const Tensor& t, int64_t rows_of_block = kTileRows, float least_unit = 0.f) {
    const auto size = t.sizes();
    const int64_t tiles = (size[1] + rows_of_block - 1) / rows_of_block * (rows_of_block / kTileRows);
    float* largest = data_of<float>(largest_) + memory_.size() * args_.batch * heads_;
    memory_.push_back(allocate(like_, {size[0], size[2], tiles * kTileRows, args_.head_dim},
                               float_rows_ ? ScalarType::Float : ScalarType::Half));
    return {memory_.back().mutable_data_ptr(), largest, static_cast<int>(tiles), least_unit};
  }

  // What write() fills from `t`; rows of queries that `fitted` lets see one key are blanked.
  Operand add(const Tensor& t, int64_t rows_of_block = kTileRows, float least_unit = 0.f,
              const Visibility* fitted = nullptr) {
    const Operand out = reserve(t, rows_of_block, least_unit);
    add(t, out, fitted);
    return out;
  }
  void add(const Tensor& t, const Operand& out, const Visibility* fitted = nullptr) {
    const auto size = t.sizes(), stride = t.strides();
    args_.source[args_.count++] = {t.const_data_ptr(),
                                   stride[0],
                                   stride[1],
                                   stride[2],
                                   static_cast<int>(size[1]),
                                   static_cast<int>(size[2]),
                                   static_cast<int>(size[3]),
                                   out,
                                   fitted != nullptr,
                                   fitted ? *fitted : Visibility{},
                                   grid_,
                                   end_};
  }

  // Writes what was added since the last call; all of one dtype.
  void write(ScalarType dtype, void* stream) {
    const auto run = float_rows_                     ? float_rows_
                     : dtype == ScalarType::BFloat16 ? operands_sm80<bf16>::run
                     : dtype == ScalarType::Half     ? operands_sm80<fp16>::run
                                                     : operands_sm80<float>::run;
    check_launch(op_, run(args_, stream));
    args_.count = 0;
    args_.clear = nullptr;
  }

 private:
  const char* op_;
  const Tensor& like_;
  Grid grid_;
  const int64_t* end_;  // behind the last packed sequence
  int (*float_rows_)(const OperandsArgs&, void*) = nullptr;
  OperandsArgs args_{};
  int64_t heads_;   // of queries, no fewer than those of keys
  Tensor largest_;  // [kMost, B * heads]
  std::vector<Tensor> memory_;
};

QueryProblem make_query_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Packing& packing, double scale, bool is_causal,
                                const std::optional<int64_t>& window, bool backward, Operands& operands) {
  const auto s = q.sizes();
  QueryProblem p{};
  p.batch = static_cast<int>(s[0]), p.m = static_cast<int>(s[1]), p.heads = static_cast<int>(s[2]);
  p.n = static_cast<int>(k.sizes()[1]), p.kv_heads = static_cast<int>(k.sizes()[2]);
  p.d = static_cast<int>(s[3]), p.dv = static_cast<int>(v.sizes()[3]);
  const int64_t all = window_or_all(window, p.n);
  p.visible = packing
                  ? Visibility::make(s[1], p.n, all, is_causal, bounds_of(packing), packing->sizes()[0] - 1)
                  : Visibility::make(s[1], p.n, all, is_causal);
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(s[0] * s[2] <= 65535 && int64_t{p.query_blocks()} * s[0] * s[2] <= INT32_MAX, op,
                  ": batch times heads is ", s[0] * s[2], "; supported on CUDA: up to 65535");
  const int sms = device_info(q.get_device_index()).num_sms;
  const bool uneven = is_causal && !packing && p.visible.window >= p.n;
  p.mix_lengths = uneven && p.query_blocks() * p.batch * p.heads <= sms;
  p.mix_key_lengths = uneven && p.key_blocks() * p.batch * p.kv_heads <= sms;
  p.q = operands.add(q, 2 * kTileRows, 0.f, backward ? &p.visible : nullptr);
  p.k = operands.add(k);
  p.v = operands.add(v);
  return p;
}

// No pairs of queries and keys: every output is a constant.
bool nothing_to_do(const Tensor& q, const Tensor& k) { return q.numel() == 0 || k.numel() == 0; }

// ---- Forward ----

void run_forward(const char* op, FwdSm80Args& args, const Plan& plan, const Tensor& q, void* stream) {
  if (!plan.portable && args.grid.given())
    return check_launch(op, instance_of(kForwardOnGrid, plan).run(args, args.grid, stream));
  if (!plan.portable) return check_launch(op, instance_of(kForward, plan).run(args, stream));
  const Tensor scratch = allocate(q, {solver_scratch(args.problem, plan.head_dim)}, ScalarType::Float);
  args.scratch = data_of<float>(scratch);
  args.type = element_of(q.scalar_type());
  check_launch(op, portable_of(plan, q.scalar_type()).fwd(args, stream));
}

using Fwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Fwd fwd_cuda(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lam, Packing cu_seqlens,
             double scale, bool is_causal, std::optional<int64_t> window, bool absolute, double tol,
             int64_t max_iters, Backend backend, std::vector<int64_t> grid_) {
  const char* op = "lla_fwd";
  check_inputs(op, q_, k_, v_, window);
  check_lam(op, lam, q_);
  torch::stable::accelerator::DeviceGuard guard(q_.get_device_index());
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  const Plan plan = plan_of(op, q_, v_, backend);
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const auto s = q.sizes();
  Fwd out{allocate(q, {s[0], s[1], s[2], v.sizes()[3]}),
          allocate(q, {s[0], s[1], s[2], s[3]}, ScalarType::Float),
          allocate(q, {s[0], s[1], s[2], s[3]}, ScalarType::Float),
          allocate(q, {s[0], s[1], s[2]}, ScalarType::Float),
          allocate(q, {s[0], s[1], s[2]}, ScalarType::Int),
          allocate(q, {s[0], s[1], s[2]}, ScalarType::Float)};
  auto& [o, x, kbar, lse, iterations, ratio] = out;
  if (nothing_to_do(q, k)) {
    for (Tensor* t : {&o, &x, &kbar, &iterations, &ratio}) torch::stable::zero_(*t);
    torch::stable::fill_(lse, -INFINITY);
    return out;
  }
  void* stream = current_stream(q);
  Operands operands(op, q, plan, packing, grid);
  FwdSm80Args args{};
  args.grid = grid;
  args.problem = make_query_problem(op, q, k, v, packing, scale, is_causal, window, false, operands);
  operands.write(q.scalar_type(), stream);
  args.problem.resident = keeps_weights(plan, args.problem.visible, packing.has_value(), grid);
  args.solve = true;
  args.ridge = make_ridge<float>(lam, absolute);
  args.tol = static_cast<float>(tol);
  args.max_iters = static_cast<int>(std::min<int64_t>(max_iters, INT32_MAX));
  args.is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  args.o = o.mutable_data_ptr();
  args.x = data_of<float>(x);
  args.kbar = data_of<float>(kbar);
  args.lse = data_of<float>(lse);
  args.iterations = data_of<int>(iterations);
  args.ratio = data_of<float>(ratio);
  run_forward(op, args, plan, q, stream);
  return out;
}

using ProbeFwd = std::tuple<Tensor, Tensor, Tensor>;
ProbeFwd probe_fwd_cuda(const Tensor& q_, const Tensor& x_, const Tensor& k_, const Tensor& v_,
                        Packing cu_seqlens, double scale, bool is_causal, std::optional<int64_t> window,
                        Backend backend, std::vector<int64_t> grid_) {
  const char* op = "lla_probe_fwd";
  check_inputs(op, q_, k_, v_, window);
  torch::stable::accelerator::DeviceGuard guard(q_.get_device_index());
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  const Plan plan = plan_of(op, q_, v_, backend);
  const Tensor q = dense_rows(q_), x = dense_rows(x_), k = dense_rows(k_), v = dense_rows(v_);
  const auto s = q.sizes();
  check_slope(op, x, q);
  ProbeFwd out{allocate(q, {s[0], s[1], s[2], v.sizes()[3]}),
               allocate(q, {s[0], s[1], s[2], s[3]}, ScalarType::Float),
               allocate(q, {s[0], s[1], s[2]}, ScalarType::Float)};
  auto& [o, kbar, lse] = out;
  if (nothing_to_do(q, k)) {
    for (Tensor* t : {&o, &kbar}) torch::stable::zero_(*t);
    torch::stable::fill_(lse, -INFINITY);
    return out;
  }
  void* stream = current_stream(q);
  Operands operands(op, q, plan, packing, grid);
  FwdSm80Args args{};
  args.grid = grid;
  args.problem = make_query_problem(op, q, k, v, packing, scale, is_causal, window, false, operands);
  operands.write(q.scalar_type(), stream);
  const bool as_is = x.scalar_type() != ScalarType::Float && !plan.portable;
  const Tensor wide = as_is ? x : widened(x);
  if (as_is) {
    args.given_16bit = view_of<uint16_t>(wide);
  } else {
    args.given = view_of<float>(wide);
  }
  args.is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  args.o = o.mutable_data_ptr();
  args.kbar = data_of<float>(kbar);
  args.lse = data_of<float>(lse);
  run_forward(op, args, plan, q, stream);
  return out;
}

// ---- Backward ----

// Both backwards; lam is null for the readout alone. Returns dq, dx (if not solve), dk, dv, dlam (if solve).
std::array<Tensor, 5> backward(const char* op, const Tensor& d_o_, const Tensor& q_, const Tensor& k_,
                               const Tensor& v_, const Tensor* lam, const Tensor& x_, const Tensor& kbar_,
                               const Tensor& lse_, const Packing& cu_seqlens, double scale, bool is_causal,
                               std::optional<int64_t> window, bool absolute, double tol, int64_t max_iters,
                               const Backend& backend, const std::vector<int64_t>& grid_) {
  check_inputs(op, q_, k_, v_, window);
  check_saved(op, q_, v_, d_o_, x_, kbar_, lse_);
  if (lam) check_lam(op, *lam, q_);
  torch::stable::accelerator::DeviceGuard guard(q_.get_device_index());
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  const Plan plan = plan_of(op, q_, v_, backend);
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_), d_o = dense_rows(d_o_),
               x = dense_rows(widened(x_));
  const Tensor kbar = torch::stable::contiguous(kbar_), lse = torch::stable::contiguous(lse_);
  const auto s = q.sizes();
  const auto dtype = q.scalar_type();
  std::array<Tensor, 5> out{allocate(q, shape_of(q)),
                            allocate(q, lam ? std::vector<int64_t>{0} : shape_of(q), ScalarType::Float),
                            allocate(q, shape_of(k)), allocate(q, shape_of(v)),
                            allocate(q, lam ? shape_of(*lam) : std::vector<int64_t>{0}, ScalarType::Float)};
  auto& [dq, dx, dk, dv, dlam] = out;
  if (nothing_to_do(q, k)) {
    for (Tensor& t : out) torch::stable::zero_(t);
    return out;
  }
  void* stream = current_stream(q);
  Operands operands(op, q, plan, packing, grid);
  BwdSm80Args args{};
  args.grid = grid;
  args.problem = make_query_problem(op, q, k, v, packing, scale, is_causal, window, true, operands);
  args.d_o = operands.add(d_o, 2 * kTileRows);
  operands.write(dtype, stream);
  args.problem.resident = lam && keeps_weights(plan, args.problem.visible, packing.has_value(), grid);
  args.solve = lam != nullptr;
  if (lam) args.ridge = make_ridge<float>(*lam, absolute);
  args.tol = static_cast<float>(tol);
  args.max_iters = static_cast<int>(std::min<int64_t>(max_iters, INT32_MAX));
  args.is_bf16 = dtype == ScalarType::BFloat16;
  args.x = view_of<float>(x);
  args.kbar = static_cast<const float*>(kbar.const_data_ptr());
  args.lse = static_cast<const float*>(lse.const_data_ptr());
  const Tensor minus_y = allocate(q, shape_of(q), ScalarType::Float);
  const Tensor row_sums = allocate(q, {s[0], s[1], s[2], 3}, ScalarType::Float);
  args.minus_y = data_of<float>(minus_y);
  args.row_sums = reinterpret_cast<RowSums*>(data_of<float>(row_sums));
  args.dq = dq.mutable_data_ptr();
  args.dx = lam ? nullptr : data_of<float>(dx);
  args.dlam = lam ? data_of<float>(dlam) : nullptr;
  const Tensor scratch =
      allocate(q, {plan.portable ? solver_scratch(args.problem, plan.head_dim) : 0}, ScalarType::Float);
  const Tensor d_lse = allocate(q, {plan.portable ? s[0] * s[1] * s[2] : 0}, ScalarType::Float);
  args.x_tiles = operands.reserve(x, 2 * kTileRows);
  args.minus_y_tiles = operands.reserve(minus_y, 2 * kTileRows, 1.f);
  if (plan.portable) {
    args.type = element_of(dtype);
    args.scratch = data_of<float>(scratch);
    args.d_lse = data_of<float>(d_lse);
    check_launch(op, portable_of(plan, dtype).bwd_queries(args, stream));
    check_launch(op, portable_of(plan, dtype).bwd_dq(args, stream));
    operands.add(x, args.x_tiles, &args.problem.visible);
    operands.add(minus_y, args.minus_y_tiles);
    operands.write(ScalarType::Float, stream);
  } else {
    check_launch(op, grid.given() ? instance_of(kBackwardOfQueriesOnGrid, plan).run(args, grid, stream)
                                  : instance_of(kBackwardOfQueries, plan).run(args, stream));
  }

  const Tensor pair_rows = allocate(
      q, {s[0], s[2], int64_t{args.problem.q.tiles_per_head} * kTileRows, sizeof(PairRow) / sizeof(float)},
      ScalarType::Float);
  args.pair_rows = reinterpret_cast<PairRow*>(data_of<float>(pair_rows));
  args.dk = dk.mutable_data_ptr();
  args.dv = dv.mutable_data_ptr();
  check_launch(op, plan.portable  ? portable_of(plan, dtype).bwd_dkv(args, stream)
                   : grid.given() ? instance_of(kBackwardOfKeysOnGrid, plan).run(args, grid, stream)
                                  : instance_of(kBackwardOfKeys, plan).run(args, stream));
  return out;
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Grads bwd_cuda(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lam,
               const Tensor& x, const Tensor& kbar, const Tensor& lse, Packing cu_seqlens, double scale,
               bool is_causal, std::optional<int64_t> window, bool absolute, double tol, int64_t max_iters,
               Backend backend, std::vector<int64_t> grid) {
  auto [dq, none, dk, dv, dlam] = backward("lla_bwd", d_o, q, k, v, &lam, x, kbar, lse, cu_seqlens, scale,
                                           is_causal, window, absolute, tol, max_iters, backend, grid);
  return {dq, dk, dv, dlam};
}

Grads probe_bwd_cuda(const Tensor& d_o, const Tensor& q, const Tensor& x, const Tensor& k, const Tensor& v,
                     const Tensor& kbar, const Tensor& lse, Packing cu_seqlens, double scale, bool is_causal,
                     std::optional<int64_t> window, Backend backend, std::vector<int64_t> grid) {
  auto [dq, dx, dk, dv, none] = backward("lla_probe_bwd", d_o, q, k, v, nullptr, x, kbar, lse, cu_seqlens,
                                         scale, is_causal, window, false, 0, 0, backend, grid);
  return {dq, as_dtype(dx, x.scalar_type()), dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("lla_fwd", TORCH_BOX(&fwd_cuda));
  m.impl("lla_bwd", TORCH_BOX(&bwd_cuda));
  m.impl("lla_probe_fwd", TORCH_BOX(&probe_fwd_cuda));
  m.impl("lla_probe_bwd", TORCH_BOX(&probe_bwd_cuda));
}

}  // namespace nearfield::lla
#endif
