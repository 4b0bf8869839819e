// nearfield::gna_plan: what a call would run, as JSON. Tensors are on the meta device: only their shapes,
// strides and types count.
#include "gna/cpu_tiles.h"
#include "gna/plan.h"
#include "nearfield/tile_plan.h"

namespace nearfield::gna {
namespace {

const char* name_of(const Step& step) {
  switch (step.kernel) {
    case Kernel::kForward:
      return step.portable ? "fwd_sm80" : "fwd_sm90";
    case Kernel::kStats:
      return "bwd_ends_sm80::prepare";
    case Kernel::kClearDq:
      return "memset";
    case Kernel::kKeys:
      return step.portable ? "bwd_dkv_sm80" : "bwd_sm90";
    case Kernel::kQueries:
      return step.portable ? "bwd_dq_sm80" : "bwd_dq_sm90";
    case Kernel::kBias:
      return step.portable ? "bwd_dbias_sm80" : "bwd_dbias_sm90";
    case Kernel::kRoundDq:
      return "bwd_ends_sm80::finish";
  }
  return "";
}

struct Json {
  std::ostringstream text;
  const char* separator = "";

  template <class T>
  Json& item(const T& value) {
    text << separator << value;
    separator = ", ";
    return *this;
  }
  template <class T>
  Json& field(const char* key, const T& value) {
    text << separator << '"' << key << "\": " << value;
    separator = ", ";
    return *this;
  }
};

std::string quoted(const std::string& text) { return '"' + text + '"'; }

std::string sides(const int (&side)[3], int rank) {
  Json json;
  for (int d = 3 - rank; d < 3; ++d) json.item(side[d]);
  return "[" + json.text.str() + "]";
}

std::string described(const Call& call, const std::vector<std::string>& steps, int64_t workspace_bytes,
                      const std::vector<std::string>& copies, const std::string& because) {
  // Pairs of a query and a key that it sees, in all heads of a batch entry.
  int64_t pairs = 0;
  for (const HeadGroup& group : call.groups) {
    const Problem& p = group.problem;
    int64_t of_head = 1;
    for (int d = 0; d < 3; ++d)
      of_head *= count_pairs({p.size[d], p.window[d], p.stride[d], p.dilation[d], p.causal[d]});
    pairs += p.heads * of_head;
  }
  Json list, names, all;
  for (const std::string& step : steps) list.item("{" + step + "}");
  for (const std::string& name : copies) names.item(quoted(name));
  all.field("steps", "[" + list.text.str() + "]").field("workspace_bytes", workspace_bytes);
  all.field("copies", "[" + names.text.str() + "]").field("pairs", pairs);
  all.field("because", quoted(because));
  return "{" + all.text.str() + "}";
}

std::string describe_gpu(const Plan& plan, const Call& call, const std::vector<std::string>& copies) {
  const int rank = call.whole.rank;
  std::vector<std::string> steps;
  for (auto at = plan.steps.begin(); at != plan.steps.end(); ++at) {
    // The launches of dilation groups are told as one step, with the tiles of the first, longest group.
    const Step& step = *at;
    const auto alike = [&](const Step& other) {
      return other.kernel == step.kernel && other.additional == step.additional &&
             other.heads.first == step.heads.first;
    };
    if (std::any_of(plan.steps.begin(), at, alike)) continue;
    int64_t launches = 0, visited = 0, full = 0;
    for (const Step& other : plan.steps) {
      if (!alike(other)) continue;
      launches += other.launches();
      visited += other.tiles.visited;
      full += other.tiles.full;
    }
    Json json;
    json.field("kernel", quoted(name_of(step))).field("launches", launches);
    json.field("heads", step.problem.heads);
    if (step.is_tiled()) {
      json.field("head_dim", step.head_dim).field("q_tile", sides(step.tiles.q.side, rank));
      if (step.additional) {
        json.field("kv_tile", "[" + std::to_string(step.tiles.kv.volume()) + "]");
      } else {
        json.field("kv_tile", sides(step.tiles.kv.side, rank));
      }
      json.field("visited", visited).field("full", full);
      json.field("additional", step.additional ? "true" : "false");
    }
    steps.push_back(json.text.str());
  }
  return described(call, steps, plan.workspace_bytes(), copies, plan.portable ? plan.because : "");
}

std::string describe_cpu(const Call& call, ScalarType dtype, bool backward,
                         const std::vector<std::string>& copies) {
  const bool wide = dtype == ScalarType::Double;
  const int lanes = wide ? kLanes<double> : kLanes<float>;
  std::vector<std::string> steps;
  const auto add = [&](const Problem& p, const char* kernel, Lanes side, const char* tile) {
    Json json;
    json.field("kernel", quoted(kernel)).field("launches", 0).field("heads", p.heads);
    json.field(tile, sides(make_tiling(p, side, lanes, kMacroTiles).tile, p.rank));
    steps.push_back(json.text.str());
  };
  for (const HeadGroup& group : call.groups) {
    if (!backward) {
      add(group.problem, "cpu_fwd", Lanes::queries, "q_tile");
    } else {
      add(group.problem, "cpu_bwd, dQ", Lanes::queries, "q_tile");
      add(group.problem, "cpu_bwd, dK and dV", Lanes::keys, "kv_tile");
    }
  }
  const BwdWorkspace workspace = bwd_cpu_workspace(call.whole, call.groups);
  const int64_t elements = backward ? workspace.delta + workspace.partial : 0;
  return described(call, steps, elements * (wide ? 8 : 4), copies, "");
}

std::string gna_plan(Tensor q, Tensor k, Tensor v, OptionalTensor additional_k, OptionalTensor additional_v,
                     Ints kernel_size, Ints stride, Ints dilation, Ints is_causal, int64_t capability,
                     bool backward, bool deterministic, std::optional<std::string> backend,
                     OptionalTensor bias) {
  const char* op = backward ? "gna_bwd" : "gna_fwd";
  const Call call =
      check_call(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal, bias);
  const bool gpu = capability != 0;
  Plan plan;
  if (gpu) {
    const Request request{op, q.scalar_type(), static_cast<int>(capability), backend};
    plan = backward ? plan_backward(request, call, deterministic) : plan_forward(request, call);
  } else {
    // 8-bit inputs are widened before the forward.
    if (backward || q.scalar_type() != ScalarType::Float8_e4m3fn)
      dispatch_cpu_dtype(op, "q", q.scalar_type(), [](auto) {});
  }
  std::vector<std::string> copies;
  const auto note = [&](const char* name, const OptionalTensor& t) {
    if (!defined(t)) return;
    const bool in_place = gpu && !plan.portable ? is_loadable(*t) : is_readable(*t);
    if (t->numel() > 0 && !in_place) copies.push_back(name);
  };
  note("q", q), note("k", k), note("v", v);
  note("additional_keys", additional_k), note("additional_values", additional_v);
  return gpu ? describe_gpu(plan, call, copies) : describe_cpu(call, q.scalar_type(), backward, copies);
}

std::string slower_because(int64_t capability, ScalarType dtype, int64_t dim, int64_t dim_v) {
  return capability == 90 ? hopper_refuses(90, dtype, dim, dim_v) : "";
}

}  // namespace
}  // namespace nearfield::gna

STABLE_TORCH_LIBRARY_IMPL(nearfield, Meta, m) { m.impl("gna_plan", TORCH_BOX(&nearfield::gna::gna_plan)); }
STABLE_TORCH_LIBRARY_IMPL(nearfield, CompositeExplicitAutograd, m) {
  m.impl("gna_slower_because", TORCH_BOX(&nearfield::gna::slower_because));
}
