// nearfield._planner: the host-only tile planner, for Python. No tensors, no Torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <variant>
#include <vector>

#include "delta/plan_sm90.h"
#include "gna/tiles.h"
#include "nearfield/tile_plan.h"

namespace py = pybind11;
using namespace nearfield;

namespace {

template <class T>
using OneOrMany = std::variant<T, std::vector<T>>;

template <class T>
std::vector<T> per_axis(const char* name, const OneOrMany<T>& given, size_t rank) {
  if (const T* one = std::get_if<T>(&given)) return std::vector<T>(rank, *one);
  const auto& many = std::get<std::vector<T>>(given);
  if (many.size() != rank) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(many.size()) +
                                " values, the grid has " + std::to_string(rank) + " dimensions");
  }
  return many;
}

using Ints = OneOrMany<int>;
using Bools = OneOrMany<bool>;

std::vector<Axis> make_axes(const std::vector<int>& grid, const Ints& window, const Ints& stride,
                            const Ints& dilation, const Bools& is_causal) {
  const size_t rank = grid.size();
  const auto windows = per_axis("window", window, rank), strides = per_axis("stride", stride, rank),
             dilations = per_axis("dilation", dilation, rank);
  const std::vector<bool> causal = per_axis("is_causal", is_causal, rank);
  std::vector<Axis> axes;
  for (size_t i = 0; i < rank; ++i)
    axes.push_back({grid[i], windows[i], strides[i], dilations[i], causal[i]});
  return axes;
}

template <class E>
E pick(const char* name, const std::string& given, const std::vector<std::pair<const char*, E>>& options) {
  std::string known;
  for (const auto& [text, value] : options) {
    if (given == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw std::invalid_argument(std::string(name) + " is '" + given + "'; supported: " + known);
}

Placement placement_of(const std::string& name) {
  return pick<Placement>("placement", name, {{"grid", Placement::kGrid}, {"span", Placement::kSpan}});
}

Direction direction_of(const std::string& name) {
  return pick<Direction>("direction", name,
                         {{"forward", Direction::kForward}, {"backward", Direction::kBackward}});
}

Window window_of(int length, int window, int stride, bool is_causal) {
  check_axes({{length, window, stride, 1, is_causal}});
  return {length, window, stride, is_causal};
}

// [first, last] are indices of the dimension, and tile is a side.
void check_run(int length, int first, int last, int tile) {
  if (first < 0 || first > last || last >= length) {
    throw std::invalid_argument("first " + std::to_string(first) + " and last " + std::to_string(last) +
                                " are not a range inside a dimension of " + std::to_string(length));
  }
  check_tile("tile", {tile}, 1);
}

py::tuple as_tuple(const TileShape& shape) { return py::tuple(py::cast(shape)); }

py::tuple as_tuple(const TileRun& run) {
  return py::make_tuple(run.origin, run.count, run.full_begin, run.full_end);
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Window arithmetic and tile planning of nearfield, as the kernels do it.";

  py::class_<TilePlan>(m, "TilePlan", "What a choice of tiles costs for a whole problem.")
      .def_readonly("tokens", &TilePlan::tokens)
      .def_readonly("pairs", &TilePlan::pairs)
      .def_readonly("q_tiles", &TilePlan::q_tiles)
      .def_readonly("kv_tiles", &TilePlan::kv_tiles)
      .def_readonly("visited", &TilePlan::visited)
      .def_readonly("full", &TilePlan::full)
      .def_readonly("dense_tiles", &TilePlan::dense_tiles)
      .def_property_readonly("partial", &TilePlan::partial)
      .def_property_readonly("mask_free", &TilePlan::mask_free)
      .def_property_readonly("flop_bound", &TilePlan::flop_bound)
      .def_property_readonly("tile_bound", &TilePlan::tile_bound)
      .def_property_readonly("full_share", &TilePlan::full_share)
      .def_property_readonly("utilization", &TilePlan::utilization)
      .def_property_readonly("q_padding", &TilePlan::q_padding)
      .def_property_readonly("kv_padding", &TilePlan::kv_padding)
      .def("cost", &TilePlan::cost, py::arg("partial_cost") = 1.1,
           "Predicted time in units of one full tile: full + partial_cost * partial.")
      .def("__repr__", [](const TilePlan& plan) {
        return "TilePlan(visited=" + std::to_string(plan.visited) + ", full=" + std::to_string(plan.full) +
               ", tile_bound=" + std::to_string(plan.tile_bound()) + ")";
      });

  m.def(
      "delta_plan",
      [](int64_t sequences, int64_t tokens, int64_t value_heads, int64_t key_dim, int64_t value_dim,
         int64_t sms, int64_t clusters, int64_t heads, bool packed, bool channel_gate, bool keep,
         bool states_on_the_way) {
        const int64_t somewhere = 0;  // never read: the plan follows from shapes
        delta::InputsSm90 in{};
        in.sequences = sequences, in.tokens = tokens, in.value_heads = value_heads;
        in.heads = heads > 0 ? heads : value_heads;
        in.key_dim = key_dim, in.value_dim = value_dim, in.channel_gate = channel_gate;
        if (packed) in.cu_seqlens = &somewhere;
        const delta::Plan plan = delta::make_plan(in, key_dim, sms, clusters, keep, states_on_the_way);
        py::list parts_of_clusters;
        for (const auto& of_cluster : plan.clusters) {
          py::list parts;
          for (const auto& part : of_cluster)
            parts.append(py::make_tuple(part.row, part.begin, part.end, part.from, part.to));
          parts_of_clusters.append(parts);
        }
        return py::make_tuple(plan.span_chunks, plan.prepare_P, plan.preparing_sms, parts_of_clusters,
                              plan.rest);
      },
      py::kw_only(), py::arg("sequences"), py::arg("tokens"), py::arg("value_heads"), py::arg("key_dim"),
      py::arg("value_dim"), py::arg("sms"), py::arg("clusters"), py::arg("heads") = 0,
      py::arg("packed") = false, py::arg("channel_gate") = false, py::arg("keep") = false,
      py::arg("states_on_the_way") = false,
      "(span_chunks, prepare_P, preparing_sms, clusters, rest) of the delta rule's forward on Hopper: the "
      "chunks of a span or 0, whether P is prepared, the SMs that prepare beside the walk or the clusters or "
      "0, for each cluster the parts of heads as (row, begin, end, from, to), heads that are not for "
      "clusters. key_dim is the padded one; heads are those of queries and keys, by default as many.");
  m.def(
      "kernel_blocks",
      [](int head_dim, const std::string& direction) {
        py::list blocks;
        if (direction_of(direction) == Direction::kForward) {
          for (const bool wide : {false, true}) {
            if (wide && !gna::has_wide_fwd_tile(head_dim)) continue;
            const gna::FwdTile tile = gna::fwd_tile(head_dim, false, wide);
            blocks.append(py::make_tuple(tile.kBlockM, tile.kBlockN, gna::fwd_visit_cost(tile)));
          }
        } else {
          const gna::BwdTile tile = gna::bwd_tile(head_dim);
          blocks.append(py::make_tuple(tile.kBlockM, tile.kBlockN, 1.0));
        }
        return blocks;
      },
      py::arg("head_dim"), py::kw_only(), py::arg("direction") = "forward",
      "(queries, keys, cost of a visit) of the tiles among which the Hopper kernels of neighborhood "
      "attention choose; the first one alone with dilation.");
  m.def(
      "key_range",
      [](int index, int length, int window, int stride, bool is_causal) {
        check_run(length, index, index, 1);
        const Range range = window_of(length, window, stride, is_causal).keys(index);
        return py::make_tuple(range.begin, range.end);
      },
      py::arg("index"), py::arg("length"), py::arg("window"), py::kw_only(), py::arg("stride") = 1,
      py::arg("is_causal") = false,
      "Half-open range of the keys that query `index` sees in one dilation group.");
  m.def(
      "query_range",
      [](int index, int length, int window, int stride, bool is_causal) {
        check_run(length, index, index, 1);
        const Range range = window_of(length, window, stride, is_causal).queries(index);
        return py::make_tuple(range.begin, range.end);
      },
      py::arg("index"), py::arg("length"), py::arg("window"), py::kw_only(), py::arg("stride") = 1,
      py::arg("is_causal") = false,
      "Half-open range of the queries that see key `index` in one dilation group.");
  m.def(
      "key_tiles",
      [](int first, int last, int tile, int length, int window, int stride, bool is_causal,
         const std::string& placement) {
        check_run(length, first, last, tile);
        return as_tuple(key_tiles(window_of(length, window, stride, is_causal), first, last, tile,
                                  placement_of(placement)));
      },
      py::arg("first"), py::arg("last"), py::arg("tile"), py::arg("length"), py::arg("window"), py::kw_only(),
      py::arg("stride") = 1, py::arg("is_causal") = false, py::arg("placement") = "span",
      "(origin, count, full_begin, full_end) of the key tiles that queries first..last visit in one "
      "dimension.");
  m.def(
      "query_tiles",
      [](int first, int last, int tile, int length, int window, int stride, bool is_causal,
         const std::string& placement) {
        check_run(length, first, last, tile);
        return as_tuple(query_tiles(window_of(length, window, stride, is_causal), first, last, tile,
                                    placement_of(placement)));
      },
      py::arg("first"), py::arg("last"), py::arg("tile"), py::arg("length"), py::arg("window"), py::kw_only(),
      py::arg("stride") = 1, py::arg("is_causal") = false, py::arg("placement") = "span",
      "(origin, count, full_begin, full_end) of the query tiles that keys first..last visit in one "
      "dimension.");
  m.def(
      "plan_tiles",
      [](const std::vector<int>& grid, const Ints& window, const TileShape& q_tile, const TileShape& kv_tile,
         const Ints& stride, const Ints& dilation, const Bools& is_causal, const std::string& placement,
         const std::string& direction) {
        return plan_tiles(make_axes(grid, window, stride, dilation, is_causal), q_tile, kv_tile,
                          placement_of(placement), direction_of(direction));
      },
      py::arg("grid"), py::arg("window"), py::arg("q_tile"), py::arg("kv_tile"), py::kw_only(),
      py::arg("stride") = 1, py::arg("dilation") = 1, py::arg("is_causal") = false,
      py::arg("placement") = "span", py::arg("direction") = "forward",
      "Counts the tiles of a whole problem.");
  m.def(
      "best_tiles",
      [](const std::vector<int>& grid, const Ints& window, const Ints& stride, const Ints& dilation,
         const Bools& is_causal, int block_m, int block_n, const std::string& placement,
         const std::string& direction, double partial_cost, const std::string& shapes) {
        const TileChoice choice =
            best_tiles(make_axes(grid, window, stride, dilation, is_causal), block_m, block_n,
                       placement_of(placement), partial_cost, direction_of(direction),
                       pick<Shapes>("shapes", shapes,
                                    {{"powers_of_two", Shapes::kPowersOfTwo},
                                     {"exact", Shapes::kExact},
                                     {"fitting", Shapes::kFitting}}));
        return py::make_tuple(as_tuple(choice.q_tile), as_tuple(choice.kv_tile), choice.plan);
      },
      py::arg("grid"), py::arg("window"), py::kw_only(), py::arg("stride") = 1, py::arg("dilation") = 1,
      py::arg("is_causal") = false, py::arg("block_m") = 128, py::arg("block_n") = 128,
      py::arg("placement") = "span", py::arg("direction") = "forward", py::arg("partial_cost") = 1.1,
      py::arg("shapes") = "powers_of_two",
      "(q_tile, kv_tile, plan) of the boxes of block_m queries and block_n keys with the least predicted "
      "cost.");
}
