#include "gna/plan.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "gna/tiles.h"
#include "nearfield/tile_plan.h"
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif

namespace nearfield::gna {
namespace {

// ---- What instances.def lists ----

struct Built {
  std::string kernel;
  bool bf16;
  int head_dim;
};

template <class Element, int kHeadDim = 0>
Built built(const char* kernel) {
  return {kernel, std::is_same_v<Element, bf16>, kHeadDim};
}

const std::vector<Built> kBuilt = {
#define INSTANCE(kernel, ...) built<__VA_ARGS__>(#kernel),
#include "gna/instances.def"
#undef INSTANCE
};

// The smallest head dim built that holds the problem's.
int head_dim_of(const char* op, const char* kernel, const Problem& p, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": q has dtype ",
                  torch::headeronly::toString(dtype), "; supported on CUDA: bfloat16, float16");
  const int64_t dim = std::max(p.dim, p.dim_v);
  int best = 0;
  std::ostringstream known;
  for (const Built& b : kBuilt) {
    if (b.kernel != kernel || b.bf16 != (dtype == ScalarType::BFloat16)) continue;
    known << (known.tellp() ? ", " : "") << b.head_dim;
    if (b.head_dim >= dim && (best == 0 || b.head_dim < best)) best = b.head_dim;
  }
  STD_TORCH_CHECK(best > 0 && p.dim % 8 == 0 && p.dim_v % 8 == 0, op, ": head dims ", p.dim,
                  " of q and k and ", p.dim_v,
                  " of v; supported on CUDA: multiples of 8 up to the largest built, of ", known.str());
  return best;
}

// ---- Tiles ----

// A partial tile costs this much more than a full one (measured, README.md).
constexpr double kPartialCost = 1.1;

Tiles choose_tiles(const Problem& p, int block_m, int block_n, Direction direction) {
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
  static std::map<Key, Tiles> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const TileChoice choice =
      best_tiles(axes, block_m, block_n, Placement::kSpan, kPartialCost, direction, Shapes::kFitting);
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

// Queries that stay: the additional tokens are further tiles of the same loop.
Tiles query_stationary_tiles(const Problem& p, const FwdTile& tile) {
  Tiles tiles = choose_tiles(p, tile.kBlockM, tile.kBlockN, Direction::kForward);
  const int64_t staying = count_boxes(p, tiles.q);
  tiles.visited += staying * ((p.additional + tile.kBlockN - 1) / tile.kBlockN);
  tiles.full += staying * (p.additional / tile.kBlockN);
  return tiles;
}

// ---- Steps ----

// The copy engine steps over at most 8 positions and spans at most 256, of which a box on a line holds over
// 100. A dimension with a larger dilation is launched group by group.
constexpr int max_step(int rank) { return rank == 1 ? 2 : 8; }

// Calls add(step) for every launch that the dilation asks for, from dimension d on.
template <class Add>
void for_each_launch(const Step& step, int d, const Add& add) {
  if (d == 3) return add(step);
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

}  // namespace

Plan plan_forward(const char* op, const Call& call, ScalarType dtype) {
  const int head_dim = head_dim_of(op, "fwd_sm90", call.whole, dtype);
  Plan plan;
  for (const HeadGroup& heads : call.groups) {
    for_each_launch({Kernel::kForward, head_dim, heads, heads.problem}, 0, [&](Step step) {
      step.tiles = query_stationary_tiles(step.problem, fwd_tile(head_dim));
      plan.steps.push_back(step);
    });
  }
  return plan;
}

Plan plan_backward(const char* op, const Call& call, ScalarType dtype, bool deterministic) {
  const int head_dim = head_dim_of(op, "bwd_sm90", call.whole, dtype);
  const int dq_head_dim = deterministic ? head_dim_of(op, "bwd_dq_sm90", call.whole, dtype) : 0;
  const BwdTile tile = bwd_tile(head_dim);
  const int64_t additional = call.whole.additional;
  Plan plan;
  plan.stats_rows = call.whole.batch * call.whole.tokens() * call.whole.heads;
  const auto add = [&](Step step, Kernel kernel) {
    step.kernel = kernel;
    if (kernel == Kernel::kKeys) {
      step.tiles = choose_tiles(step.problem, tile.kBlockM, tile.kBlockN, Direction::kBackward);
      if (step.additional) {
        step.tiles.kv = Box{{1, 1, tile.kBlockN}};
        const int64_t staying = (additional + tile.kBlockN - 1) / tile.kBlockN;
        int64_t full = staying;
        for (int d = 0; d < 3; ++d) full *= step.problem.size[d] / step.tiles.q.side[d];
        step.tiles.visited = staying * count_boxes(step.problem, step.tiles.q);
        step.tiles.full = step.tiles.q.volume() == tile.kBlockM ? full : 0;
      }
    }
    // Launches follow each other on one stream and share the buffer.
    if (kernel == Kernel::kClearDq)
      plan.dq_elements = std::max(plan.dq_elements, DqBuffer(step.problem).elements);
    if (kernel == Kernel::kQueries) {
      step.head_dim = dq_head_dim;
      step.tiles = query_stationary_tiles(step.problem, dq_tile(dq_head_dim));
    }
    plan.steps.push_back(step);
  };

  add({Kernel::kStats, head_dim, {call.whole}, call.whole}, Kernel::kStats);
  for (const HeadGroup& heads : call.groups) {
    const Problem& p = heads.problem;
    const Step whole{Kernel::kKeys, head_dim, heads, p};
    // The additional tokens as staying keys that the whole grid sees, without dilation.
    Step extra = whole;
    extra.additional = true;
    for (int d = 0; d < 3; ++d) {
      extra.problem.window[d] = p.size[d];
      extra.problem.stride[d] = extra.problem.dilation[d] = 1;
      extra.problem.causal[d] = false;
    }
    // One buffer takes both shares of dQ if its order, by dilation group, is the same for both.
    const bool undilated = p.groups() == 1;
    for_each_launch(whole, 0, [&](const Step& group) {
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
  return plan;
}

void check_capability(const char* op, int capability) {
#ifdef NEARFIELD_GNA_SM90
  STD_TORCH_CHECK(capability == 90, op, ": the GPU has compute capability ", capability / 10, ".",
                  capability % 10, "; this build (", NEARFIELD_CUDA_ARCHS, ") has kernels for 9.0 (Hopper)");
#else
  STD_TORCH_CHECK(false, op, ": this build has no kernel for compute capability ", capability / 10, ".",
                  capability % 10, "; it was built without CUDA kernels for Hopper (9.0)");
#endif
}

bool is_loadable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) fits &= t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) % 8 == 0);
  return fits;
}

}  // namespace nearfield::gna
