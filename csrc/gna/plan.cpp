#include "gna/plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

#include "architectures.h"
#include "gna/dbias_sm90.h"
#include "nearfield/tile_plan.h"

namespace nearfield::gna {
namespace {

// ---- What instances.def lists ----

struct Built {
  std::string kernel;
  ScalarType dtype;
  int head_dim;
};

template <class Element, int kHeadDim = 0>
Built built(const char* kernel) {
  return {kernel, dtype_of<Element>, kHeadDim};
}

const std::vector<Built> kBuilt = {
#define INSTANCE(kernel, ...) built<__VA_ARGS__>(#kernel),
#include "gna/instances.def"
#undef INSTANCE
};

// The smallest head dim built that holds `dim`; 0: none.
int head_dim_of(const char* kernel, ScalarType dtype, int64_t dim) {
  int best = 0;
  for (const Built& b : kBuilt) {
    if (b.kernel == kernel && b.dtype == dtype && b.head_dim >= dim && (best == 0 || b.head_dim < best)) {
      best = b.head_dim;
    }
  }
  return best;
}

int largest_head_dim(const char* kernel, ScalarType dtype) {
  int largest = 0;
  for (const Built& b : kBuilt) {
    if (b.kernel == kernel && b.dtype == dtype) largest = std::max(largest, b.head_dim);
  }
  return largest;
}

#ifdef NEARFIELD_GNA
constexpr const char* kBuiltFor = kArchitectures;
#else
constexpr const char* kBuiltFor = "";  // this family's kernels are not in the build
#endif

// ---- Backends ----

// The plan without steps: which backend. Throws where there is none.
Plan choose_backend(const Request& r, const Call& call) {
  const Problem& p = call.whole;
  Plan plan;
  STD_TORCH_CHECK(!r.backend || *r.backend == "hopper" || *r.backend == "portable", r.op, ": backend is \"",
                  *r.backend, "\"; known: \"hopper\", \"portable\"");
  STD_TORCH_CHECK(*kBuiltFor != '\0', r.op, ": this build has no kernel for compute capability ",
                  capability_text(r.capability), "; it was built without CUDA kernels");
  STD_TORCH_CHECK(is_built_for(kBuiltFor, r.capability), r.op, ": the GPU has compute capability ",
                  capability_text(r.capability), "; this build is for ", kBuiltFor);
  if (!r.backend || *r.backend == "hopper") {
    plan.because = hopper_refuses(r.capability, r.dtype, p.dim, p.dim_v);
    if (plan.because.empty()) return plan;
    STD_TORCH_CHECK(!r.backend, r.op, ": backend \"hopper\" was asked for, but ", plan.because);
  }
  plan.portable = true;
  STD_TORCH_CHECK(r.dtype != ScalarType::Float8_e4m3fn, r.op, ": q has dtype Float8_e4m3fn, and ",
                  plan.because, "; supported with this dtype: Hopper's kernels and the CPU");
  const int largest = largest_head_dim("portable_sm80", r.dtype);
  STD_TORCH_CHECK(largest > 0, r.op, ": q has dtype ", torch::headeronly::toString(r.dtype),
                  "; supported on CUDA: bfloat16, float16, float32");
  STD_TORCH_CHECK(std::max(p.dim, p.dim_v) <= largest, r.op, ": head dims ", p.dim, " of q and k and ",
                  p.dim_v, " of v; supported on CUDA: up to ", largest);
  return plan;
}

int compiled_head_dim(const Plan& plan, const char* hopper, const Request& r, const Problem& p) {
  return head_dim_of(plan.portable ? "portable_sm80" : hopper, r.dtype, std::max(p.dim, p.dim_v));
}

// ---- Tiles ----

// A partial tile costs this much more than a full one (measured, README.md).
constexpr double kPartialCost = 1.1;

std::vector<Axis> axes_of(const Problem& p) {
  std::vector<Axis> axes;
  for (int d = 3 - p.rank; d < 3; ++d) {
    axes.push_back({p.size[d], p.window[d], p.stride[d], p.dilation[d], p.causal[d]});
  }
  return axes;
}

constexpr int kAnyPlaces = std::numeric_limits<int>::max();

// `places`: for how many relative positions of two boxes there is room.
Tiles choose_tiles(const Problem& p, int block_m, int block_n, Direction direction, int places = kAnyPlaces) {
  // The geometry alone decides; it is planned once.
  using Key = std::array<int, 3 * 5 + 4>;
  Key key{block_m, block_n, static_cast<int>(direction), places};
  for (int d = 0; d < 3; ++d) {
    const int at[5] = {p.size[d], p.window[d], p.stride[d], p.dilation[d], p.causal[d]};
    std::copy(at, at + 5, key.begin() + 4 + 5 * d);
  }
  static std::mutex mutex;
  static std::map<Key, Tiles> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const TileChoice choice = best_tiles(axes_of(p), block_m, block_n, Placement::kSpan, kPartialCost,
                                       direction, Shapes::kFitting, places);
  // A box that does not fill its block is masked everywhere.
  const bool fills = volume(direction == Direction::kForward ? choice.kv_tile : choice.q_tile) ==
                     (direction == Direction::kForward ? block_n : block_m);
  Tiles tiles{{{1, 1, 1}}, {{1, 1, 1}}, choice.plan.visited, fills ? choice.plan.full : 0};
  for (int i = 0; i < p.rank; ++i) {
    tiles.q.side[3 - p.rank + i] = choice.q_tile[i];
    tiles.kv.side[3 - p.rank + i] = choice.kv_tile[i];
  }
  return known[key] = tiles;
}

// Portable kernels place every row by itself, so dilation limits no box: all groups use the boxes of the
// longest.
Tiles choose_portable_tiles(const Problem& p, int block_m, int block_n, Direction direction) {
  Problem group = p;
  for (int d = 0; d < 3; ++d) {
    group.size[d] = group_length(p.size[d], p.dilation[d], 0);
    group.dilation[d] = 1;
  }
  Tiles tiles = choose_tiles(group, block_m, block_n, direction);
  if (p.groups() == 1) return tiles;
  const auto sides = [&](const Box& box) { return TileShape(box.side + 3 - p.rank, box.side + 3); };
  const TilePlan counted =
      plan_tiles(axes_of(p), sides(tiles.q), sides(tiles.kv), Placement::kSpan, direction);
  const bool forward = direction == Direction::kForward;
  const bool fills = (forward ? tiles.kv : tiles.q).volume() == (forward ? block_n : block_m);
  tiles.visited = counted.visited;
  tiles.full = fills ? counted.full : 0;
  return tiles;
}

Tiles choose_tiles(const Step& step, bool biased, int block_m, int block_n, Direction direction) {
  if (step.portable) return choose_portable_tiles(step.problem, block_m, block_n, direction);
  const int places = biased ? bias_places(step.head_dim) : kAnyPlaces;
  return choose_tiles(step.problem, block_m, block_n, direction, places);
}

int64_t count_boxes(const Problem& p, const Box& box) {
  int64_t count = 1;
  for (int d = 0; d < 3; ++d) {
    int64_t along = 0;
    for (int r = 0; r < p.dilation[d]; ++r)
      along += (group_length(p.size[d], p.dilation[d], r) + box.side[d] - 1) / box.side[d];
    count *= along;
  }
  return count;
}

// Whether a launch rounds and clears dQ beside its products (dq_beside_sm90.cuh): tokens of a head must be
// evenly spaced, and tiles long enough for a warp that also plans them. Where they are very long there is
// little to clear, and all wait for it at once.
void work_beside(Step& step) {
  constexpr int64_t kVisits = 12, kClearingVisits = 96;
  const Problem& p = step.problem;
  const int64_t boxes = count_boxes(p, step.tiles.kv);
  const bool spaced =
      p.rank == 1 || (step.distance[0] == 1 && step.distance[1] == 1 && step.distance[2] == 1);
  step.beside = p.dim == step.head_dim && p.additional == 0 && p.groups() == 1 && spaced &&
                step.launches() == 1 && p.batch * p.heads_kv > 1 && step.tiles.visited >= kVisits * boxes;
  step.clears = step.beside && step.tiles.visited < kClearingVisits * boxes;
}

// Queries that stay: the additional tokens are further tiles of the same loop.
Tiles query_stationary_tiles(const Step& step, bool biased, int block_m, int block_n) {
  const Problem& p = step.problem;
  Tiles tiles = choose_tiles(step, biased, block_m, block_n, Direction::kForward);
  const int64_t staying = count_boxes(p, tiles.q);
  tiles.visited += staying * ((p.additional + block_n - 1) / block_n);
  tiles.full += staying * (p.additional / block_n);
  return tiles;
}

// Takes the forward's wide tile where it is cheaper. Long boxes do not reach over a dilation.
void widen(Step& step) {
  if (!has_wide_fwd_tile(step.head_dim) || step.problem.groups() > 1) return;
  const auto cost = [](const Tiles& t, const FwdTile& tile) {
    return (t.full + kPartialCost * (t.visited - t.full)) * fwd_visit_cost(tile);
  };
  const FwdTile tile = fwd_tile(step.head_dim, false, true);
  const Tiles tiles = query_stationary_tiles(step, false, tile.kBlockM, tile.kBlockN);
  step.wide = cost(tiles, tile) < cost(step.tiles, fwd_tile(step.head_dim));
  if (step.wide) step.tiles = tiles;
}

// ---- Steps ----

// The gradient of the bias is summed by as many CTAs, of all heads together, as run at once on so many
// multiprocessors: an H100's. The number is the same on every GPU, so that the order of the sums is as well.
constexpr int64_t kBiasSms = 132;

// The copy engine steps over at most 8 positions and spans at most 256, of which a box on a line holds over
// 100. A dimension with a larger dilation is launched group by group.
constexpr int max_step(int rank) { return rank == 1 ? 2 : 8; }

// Calls add(step) for every launch that the dilation asks for, from dimension d on.
template <class Add>
void for_each_launch(const Step& step, int d, const Add& add) {
  if (d == 3 || step.portable) return add(step);
  const int dilation = step.problem.dilation[d];
  if (dilation <= max_step(step.problem.rank)) return for_each_launch(step, d + 1, add);
  for (int r = 0; r < dilation; ++r) {
    Step group = step;
    group.problem.size[d] = group_length(step.problem.size[d], dilation, r);
    group.problem.dilation[d] = 1;
    group.first[d] = r;
    group.distance[d] = dilation;
    for_each_launch(group, d + 1, add);
  }
}

// On Hopper a CTA has the same share of one head after the other: as many heads at once as the L2 cache
// holds, where rows are long. With rows of at most 128 bytes copies are hidden either way (measured,
// README.md).
int64_t heads_at_once(const Problem& p, int head_dim, int element_bytes) {
  if (head_dim * element_bytes <= 128) return std::clamp<int64_t>(p.heads, 1, kBiasSms);
  constexpr int64_t kCached = int64_t{36} << 20;
  const int64_t head_bytes =
      std::max<int64_t>(1, p.batch * p.tokens() * 2 * (p.dim + p.dim_v) * element_bytes);
  const int64_t heads = std::max<int64_t>(1, p.heads);
  const int64_t fit = std::clamp<int64_t>(kCached / head_bytes, 1, std::min(heads, kBiasSms));
  const int64_t rounds = (heads + fit - 1) / fit;
  return (heads + rounds - 1) / rounds;
}

// Hopper's kernel where it has room for the cells of these windows.
std::vector<Step> bias_gradient_steps(Step all, int portable_head_dim, int element_bytes) {
  all.kernel = Kernel::kBias;
  std::vector<Step> steps;
  bool fits = !all.portable;
  if (fits) {
    for_each_launch(all, 0, [&](Step group) {
      const DbiasTile tile = dbias_tile(group.head_dim);
      group.tiles = choose_tiles(group, true, tile.kBlockM, tile.kBlockN, Direction::kForward);
      fits &= Cells(group.problem, group.tiles.q, group.tiles.kv).total() <= kMostCells;
      steps.push_back(group);
    });
  }
  if (fits) return steps;
  // The portable kernel needs of the forward only lse.
  all.portable = true;
  all.head_dim = portable_head_dim;
  const PortableTile tile = portable_dbias_tile(portable_head_dim, element_bytes);
  all.tiles = choose_tiles(all, true, tile.kStaying, tile.kMoving, Direction::kForward);
  return {all};
}

}  // namespace

Plan plan_forward(const Request& request, const Call& call) {
  const Problem& whole = call.whole;
  Plan plan = choose_backend(request, call);
  const int head_dim = compiled_head_dim(plan, "fwd_sm90", request, whole);
  const PortableTile portable = portable_fwd_tile(head_dim, element_bytes(request.dtype));
  const FwdTile hopper = fwd_tile(head_dim, call.biased);
  for (const HeadGroup& heads : call.groups) {
    for_each_launch({Kernel::kForward, head_dim, plan.portable, heads, heads.problem}, 0, [&](Step step) {
      step.tiles = plan.portable
                       ? query_stationary_tiles(step, call.biased, portable.kStaying, portable.kMoving)
                       : query_stationary_tiles(step, call.biased, hopper.kBlockM, hopper.kBlockN);
      if (!plan.portable && !call.biased && element_bytes(request.dtype) == 2) widen(step);
      plan.steps.push_back(step);
    });
  }
  return plan;
}

int64_t units_cleared_before(const Step& step, int num_sms) {
  return step.clears ? units_of_first_tiles(step, num_sms) : step.problem.batch * step.problem.heads_kv;
}

int64_t units_of_first_tiles(const Step& step, int num_sms) {
  const int64_t tiles = count_boxes(step.problem, step.tiles.kv);
  return std::min(step.problem.batch * step.problem.heads_kv, (num_sms + tiles - 1) / tiles);
}

Plan plan_backward(const Request& request, const Call& call, bool deterministic, bool bias_gradient) {
  const Problem& whole = call.whole;
  STD_TORCH_CHECK(request.dtype != ScalarType::Float8_e4m3fn, request.op,
                  ": q has dtype Float8_e4m3fn; supported with this dtype: the forward alone");
  Plan plan = choose_backend(request, call);
  deterministic |= plan.portable;
  const int head_dim = compiled_head_dim(plan, "bwd_sm90", request, whole);
  const int portable_head_dim = head_dim_of("portable_sm80", request.dtype, std::max(whole.dim, whole.dim_v));
  // Hopper's kernel for dQ alone takes no bias.
  const bool portable_dq = plan.portable || call.biased;
  const int dq_head_dim =
      portable_dq ? portable_head_dim : compiled_head_dim(plan, "bwd_dq_sm90", request, whole);
  const int64_t additional = whole.additional;
  // Keys that stay and queries that they visit; queries that stay and keys that they visit.
  BwdTile tile = bwd_tile(head_dim);
  FwdTile query_tile = dq_tile(dq_head_dim);
  const int bytes = element_bytes(request.dtype);
  if (plan.portable) {
    const PortableTile keys = portable_dkv_tile(head_dim, bytes);
    tile.kBlockM = keys.kMoving, tile.kBlockN = keys.kStaying;
  }
  if (portable_dq) {
    const PortableTile queries = portable_dq_tile(dq_head_dim, bytes);
    query_tile.kBlockM = queries.kStaying, query_tile.kBlockN = queries.kMoving;
  }
  plan.stats_rows = whole.batch * whole.tokens() * whole.heads;
  const auto tiles_of = [&](const Step& keys) {
    const bool biased = call.biased && !keys.additional;
    return choose_tiles(keys, biased, tile.kBlockM, tile.kBlockN, Direction::kBackward);
  };
  const auto add = [&](Step step, Kernel kernel) {
    step.kernel = kernel;
    if (kernel == Kernel::kKeys && step.additional) {
      step.tiles = tiles_of(step);
      step.tiles.kv = Box{{1, 1, tile.kBlockN}};
      const int64_t staying = (additional + tile.kBlockN - 1) / tile.kBlockN;
      int64_t full = staying;
      for (int d = 0; d < 3; ++d) full *= step.problem.size[d] / step.tiles.q.side[d];
      step.tiles.visited = staying * count_boxes(step.problem, step.tiles.q);
      step.tiles.full = step.tiles.q.volume() == tile.kBlockM ? full : 0;
    }
    // Launches follow each other on one stream and share the buffer.
    if (kernel == Kernel::kClearDq)
      plan.dq_elements = std::max(plan.dq_elements, DqBuffer(step.problem).elements);
    if (kernel == Kernel::kQueries) {
      step.portable = portable_dq;
      step.head_dim = dq_head_dim;
      step.tiles = query_stationary_tiles(step, call.biased, query_tile.kBlockM, query_tile.kBlockN);
    }
    plan.steps.push_back(step);
  };
  const bool with_bias_gradient = call.biased && bias_gradient;
  if (with_bias_gradient) {
    plan.bias_elements = whole.heads * call.bias<float>().size;
    const int64_t wanted = plan.portable ? kBiasSms * portable_dbias_tile(head_dim, bytes).kCtas /
                                               std::max<int64_t>(1, whole.heads)
                                         : kBiasSms / heads_at_once(whole, head_dim, bytes);
    plan.bias_parts = bias_parts(plan.bias_elements, wanted);
  }

  add({Kernel::kStats, head_dim, plan.portable, {whole}, whole}, Kernel::kStats);
  for (const HeadGroup& heads : call.groups) {
    const Problem& p = heads.problem;
    const Step all{Kernel::kKeys, head_dim, plan.portable, heads, p};
    // The additional tokens as staying keys that the whole grid sees, without dilation.
    Step extra = all;
    extra.additional = true;
    for (int d = 0; d < 3; ++d) {
      extra.problem.window[d] = p.size[d];
      extra.problem.stride[d] = extra.problem.dilation[d] = 1;
      extra.problem.causal[d] = false;
    }
    // One buffer takes both shares of dQ if its order, by dilation group, is the same for both.
    const bool undilated = p.groups() == 1;
    if (with_bias_gradient) {
      for (const Step& step : bias_gradient_steps(all, portable_head_dim, bytes)) plan.steps.push_back(step);
    }
    for_each_launch(all, 0, [&](Step group) {
      group.tiles = tiles_of(group);
      if (!deterministic && !call.biased) work_beside(group);
      plan.counters = std::max(plan.counters, 1 + DqCounters(group.problem, group.beside).total());
      if (!deterministic) add(group, Kernel::kClearDq);
      add(group, Kernel::kKeys);
      if (deterministic) return add(group, Kernel::kQueries);
      if (additional > 0 && undilated) add(extra, Kernel::kKeys);
      add(group, Kernel::kRoundDq);
    });
    if (additional > 0 && (deterministic || !undilated)) {
      if (!deterministic) add(extra, Kernel::kClearDq);
      add(extra, Kernel::kKeys);
      extra.accumulate = true;
      if (!deterministic) add(extra, Kernel::kRoundDq);
    }
  }
  int64_t launches = 0;
  bool beside = true;
  for (const Step& step : plan.steps) {
    if (step.kernel == Kernel::kKeys) ++launches, beside &= step.beside;
  }
  plan.stats_beside = launches == 1 && beside && plan.stats_rows < int64_t{1} << 31;
  if (plan.stats_beside) plan.stats_rows = whole.batch * whole.heads * stats_of_head(whole.tokens());
  return plan;
}

std::string hopper_refuses(int capability, ScalarType dtype, int64_t dim, int64_t dim_v) {
  std::ostringstream why;
  // Forward and backward, where there is one, are built for the same head dims.
  const int largest = largest_head_dim("fwd_sm90", dtype), multiple = 16 / element_bytes(dtype);
#ifdef NEARFIELD_GNA_SM90
  const bool built = true;
#else
  const bool built = false;
#endif
  if (capability != 90 || !built) {
    why << "the GPU has compute capability " << capability_text(capability)
        << ", Hopper's kernels need 9.0 and a build for 90a (this one is for " << kBuiltFor << ")";
  } else if (largest == 0) {
    why << "q has dtype " << torch::headeronly::toString(dtype)
        << ", Hopper's kernels take bfloat16, float16 and, in the forward, float8_e4m3fn";
  } else if (dim % multiple != 0 || dim_v % multiple != 0 || std::max(dim, dim_v) > largest) {
    why << "the head dims are " << dim << " of q and k and " << dim_v
        << " of v, Hopper's kernels take multiples of " << multiple << " up to " << largest;
  }
  return why.str();
}

bool is_loadable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(last) == 1;
  const int bytes = element_bytes(t.scalar_type());
  for (int64_t i = 0; i < last; ++i)
    fits &= t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) * bytes % 16 == 0);
  return fits;
}

}  // namespace nearfield::gna
