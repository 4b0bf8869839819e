#include "lla/plan.h"

#include <algorithm>
#include <sstream>
#include <vector>

#include "architectures.h"
#include "lla/checks.h"
#include "lla/tiles.h"
#include "nearfield/tile_plan.h"

namespace nearfield::lla {
namespace {

// ---- What instances.def lists ----

struct Built {
  std::string kernel, arguments;
};

const std::vector<Built> kBuilt = {
#define INSTANCE(kernel, ...) {#kernel, #__VA_ARGS__},
#include "lla/instances.def"
#undef INSTANCE
};

// Head dims of a kernel: the last of its arguments, where the others are `prefix`.
std::vector<int> head_dims(const std::string& kernel, const std::string& prefix = "") {
  std::vector<int> dims;
  for (const Built& b : kBuilt) {
    if (b.kernel == kernel && b.arguments.compare(0, prefix.size(), prefix) == 0)
      dims.push_back(std::stoi(b.arguments.substr(prefix.size())));
  }
  return dims;
}

// The smallest that holds `dim`; 0: none.
int smallest(const std::vector<int>& dims, int64_t dim) {
  int best = 0;
  for (int d : dims)
    if (d >= dim && (best == 0 || d < best)) best = d;
  return best;
}

int largest(const std::vector<int>& dims) {
  return dims.empty() ? 0 : *std::max_element(dims.begin(), dims.end());
}

// Forward and backward run on the same operands, so both must be built.
std::vector<int> hopper_head_dims() {
  std::vector<int> dims;
  for (int d : head_dims("fwd_sm90")) {
    const auto backward = head_dims("bwd_key_sm90");
    if (std::find(backward.begin(), backward.end(), d) != backward.end()) dims.push_back(d);
  }
  return dims;
}

#ifdef NEARFIELD_LLA
constexpr const char* kBuiltFor = kArchitectures;
#else
constexpr const char* kBuiltFor = "";  // this family's kernels are not in the build
#endif
#ifdef NEARFIELD_LLA_SM90
constexpr bool kBuiltForHopper = true;
#else
constexpr bool kBuiltForHopper = false;
#endif

bool is_16bit(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

}  // namespace

std::string hopper_refuses(int capability, ScalarType dtype, int64_t d, int64_t dv) {
  std::ostringstream why;
  const int most = largest(hopper_head_dims());
  if (capability != 90 || !kBuiltForHopper) {
    why << "the GPU has compute capability " << capability_text(capability)
        << ", Hopper's kernels need 9.0 and a build for 90a (this one is for " << kBuiltFor << ")";
  } else if (!is_16bit(dtype)) {
    why << "q has dtype " << torch::headeronly::toString(dtype)
        << ", Hopper's kernels take bfloat16, float16";
  } else if (d % 8 != 0 || dv % 8 != 0 || std::max(d, dv) > most) {
    why << "the head dims are " << d << " of q and k and " << dv
        << " of v, Hopper's kernels take multiples of 8 up to " << most;
  }
  return why.str();
}

namespace {

// The most tiles of keys that any tile of queries sees, or more.
int64_t most_tiles_seen(const Visibility& visible, bool packed) {
  const auto tile_of = [](int64_t key) {  // of a key that may lie before the first
    return key >= 0 ? key / kBoxRows : -((-key + kBoxRows - 1) / kBoxRows);
  };
  const int64_t window = visible.window, shift = packed ? 0 : int64_t{visible.n} - visible.m;
  // A tile of queries away from all ends: how far before its first and behind its last query it sees. At the
  // ends of a packed sequence windows reach to either side.
  const int64_t rows = std::min<int64_t>(visible.m, kBoxRows);
  const int64_t before = visible.causal || packed ? window - 1 : window / 2;
  const int64_t behind = visible.causal ? 0 : packed ? window - 1 : window - 1 - window / 2;
  const int64_t first = shift - tile_of(shift) * kBoxRows;
  int64_t most = tile_of(first + rows - 1 + behind) - tile_of(first - before) + 1;
  // The last window of all begins where it must to end with the keys.
  if (!visible.causal) most = std::max(most, tile_of(visible.n - 1) - tile_of(visible.n - window) + 1);
  return std::min(most, tile_of(visible.n - 1) + 1);
}

int64_t most_tiles_seen(const Grid& grid) {
  int64_t product = 1;
  for (int d = 0; d < 3; ++d) {
    int most = 0;
    const Axis axis{grid.size[d], grid.window[d], grid.stride[d], grid.dilation[d], grid.causal[d] != 0};
    for_each_group(axis, [&](const Window& window, int) {
      for (int first = 0; first < window.length; first += grid.side[d]) {
        const int last = std::min(first + grid.side[d], window.length) - 1;
        most = std::max(most, key_tiles(window, first, last, grid.side[d], Placement::kGrid).count);
      }
    });
    product *= most;
  }
  return product;
}

}  // namespace

bool keeps_weights(const Plan& plan, const Visibility& visible, bool packed, const Grid& grid) {
  if (plan.portable) return false;
  return (grid.given() ? most_tiles_seen(grid) : most_tiles_seen(visible, packed)) <=
         resident_tiles(plan.head_dim);
}

Plan choose_plan(const char* op, ScalarType dtype, int64_t d, int64_t dv, int capability,
                 const std::optional<std::string>& backend) {
  Plan plan;
  STD_TORCH_CHECK(!backend || *backend == "hopper" || *backend == "portable", op, ": backend is \"", *backend,
                  "\"; known: \"hopper\", \"portable\"");
  STD_TORCH_CHECK(*kBuiltFor != '\0', op, ": this build has no kernel for compute capability ",
                  capability_text(capability), "; it was built without CUDA kernels");
  STD_TORCH_CHECK(is_built_for(kBuiltFor, capability), op, ": the GPU has compute capability ",
                  capability_text(capability), "; this build is for ", kBuiltFor);
  if (!backend || *backend == "hopper") {
    plan.because = hopper_refuses(capability, dtype, d, dv);
    if (plan.because.empty()) {
      plan.head_dim = smallest(hopper_head_dims(), std::max(d, dv));
      return plan;
    }
    STD_TORCH_CHECK(!backend, op, ": backend \"hopper\" was asked for, but ", plan.because);
  }
  plan.portable = true;
  STD_TORCH_CHECK(is_16bit(dtype) || dtype == ScalarType::Float, op, ": q has dtype ",
                  torch::headeronly::toString(dtype), "; supported on CUDA: bfloat16, float16, float32");
  const auto dims = head_dims("portable_sm80", is_16bit(dtype) ? "fp16, " : "fp32, ");
  plan.head_dim = smallest(dims, std::max(d, dv));
  STD_TORCH_CHECK(plan.head_dim != 0, op, ": head dims ", d, " of q and k and ", dv,
                  " of v; supported on CUDA: up to ", largest(dims));
  return plan;
}

namespace {

// For explain: "hopper 64 kept" or "hopper 64 recomputed", which the weights are; or "portable 64 <why>".
std::string lla_plan(Tensor q, Tensor k, Tensor v, int64_t capability, bool packed, bool is_causal,
                     std::optional<int64_t> window, std::vector<int64_t> grid,
                     std::optional<std::string> backend) {
  const Plan plan =
      choose_plan("lla", q.scalar_type(), q.sizes()[3], v.sizes()[3], static_cast<int>(capability), backend);
  const std::string dim = std::to_string(plan.head_dim);
  if (plan.portable) return "portable " + dim + (plan.because.empty() ? "" : " " + plan.because);
  const int64_t m = q.sizes()[1], n = k.sizes()[1];
  const auto visible = Visibility::make(m, n, window_or_all(window, n), is_causal);
  const bool kept = keeps_weights(plan, visible, packed, grid_of("lla", grid));
  return "hopper " + dim + (kept ? " kept" : " recomputed");
}

// The box of a grid whose tiles of queries see the fewest tiles of keys.
std::vector<int64_t> lla_box(std::vector<int64_t> size, std::vector<int64_t> window,
                             std::vector<int64_t> stride, std::vector<int64_t> dilation,
                             std::vector<int64_t> causal) {
  const size_t rank = size.size();
  for (const auto* given : {&window, &stride, &dilation, &causal})
    STD_TORCH_CHECK(given->size() == rank, "lla_box: the lists have ", rank, " and ", given->size(),
                    " entries");
  std::vector<Axis> axes;
  for (size_t d = 0; d < rank; ++d)
    axes.push_back({static_cast<int>(size[d]), static_cast<int>(window[d]), static_cast<int>(stride[d]),
                    static_cast<int>(dilation[d]), causal[d] != 0});
  int64_t least = 0;
  TileShape best;
  for (const TileShape& box : tile_shapes(static_cast<int>(rank), kBoxRows, Shapes::kPowersOfTwo)) {
    const int64_t visited = plan_tiles(axes, box, box, Placement::kGrid).visited;
    if (best.empty() || visited < least) best = box, least = visited;
  }
  return {best.begin(), best.end()};
}

std::string slower_because(int64_t capability, ScalarType dtype, int64_t d, int64_t dv) {
  return capability == 90 ? hopper_refuses(90, dtype, d, dv) : "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  m.def(
      "lla_plan(Tensor q, Tensor k, Tensor v, int capability, bool packed, bool is_causal, int? window, "
      "int[] grid, str? backend=None) -> str");
  m.def("lla_box(int[] size, int[] window, int[] stride, int[] dilation, int[] causal) -> int[]");
  m.def("lla_slower_because(int capability, ScalarType dtype, int d, int dv) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(nearfield, Meta, m) { m.impl("lla_plan", TORCH_BOX(&lla_plan)); }
STABLE_TORCH_LIBRARY_IMPL(nearfield, CompositeExplicitAutograd, m) {
  m.impl("lla_slower_because", TORCH_BOX(&slower_because));
  m.impl("lla_box", TORCH_BOX(&lla_box));
}

}  // namespace nearfield::lla
