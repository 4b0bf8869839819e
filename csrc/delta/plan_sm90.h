// How the forward on Hopper divides its work: which kernels run and where sequences are cut, from shapes
// alone. Plain C++, also tested on the host.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "delta/head_cluster_sm90.h"

namespace nearfield::delta {

// How long the walks take, in microseconds on an H100: each launch, and each chunk of a chain, unless the L2
// cache cannot bring the tiles of all chains in that time.
constexpr double kLaunchUs = 7, kBytesPerUs = 4.2e6;
constexpr double kChunkUs = 1.07, kTransitionUs = 0.87;  // with and without output
constexpr double kComposeUs = 5.5, kSpanUs = 1.5;        // a launch, and a span of it
// Clusters: the launch, those that begin where others have ended, going on with another part, and each chunk.
constexpr double kClusterLaunchUs = 5, kClusterUs = 30, kGoOnUs = 30, kClusterChunkUs = 1.1;
// A few heads too many: what each chunk takes more where heads are cut, as clusters are at different tokens
// then, and what it takes more to split sequences beside the clusters.
constexpr double kOutOfStepUs = 0.1, kBesideClustersUs = 50;
// With what the backward keeps all of it takes longer, most of all beside clusters, which then have the
// memory, and two kernels at least what memory needs.
constexpr double kKeep = 1.3, kKeepInClusters = 1.25, kKeepBesideClusters = 1.5, kKeptChunkUs = 0.07;
// To prepare a chunk, times the SMs that do: before the walk, and beside it, where also the walk is slower.
constexpr double kPrepareUs = 2.4, kPrepareWithoutPUs = 1.9, kPrepareBesideUs = 3.3, kChunkBesideUs = 1.55;
constexpr double kPrepareChannelUs = 7.2, kPrepareChannelBesideUs = 9.5;  // with a gate per channel

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Clusters = std::vector<std::vector<HeadClusterArgs::Part>>;  // the parts of each

struct Plan {
  int64_t span_chunks = 0;    // 0: sequences are not split
  bool prepare_P = true;      // else the state pass computes P
  int64_t preparing_sms = 0;  // beside the state pass; 0: all of them, before it
  Clusters clusters = {};     // which do both; empty: not so
  // So many heads, the last of the last sequence, are not for clusters. They take the SMs that these leave,
  // which first prepare (preparing_sms), then walk.
  int64_t rest = 0;
};

// So many rows of so many chunks for so many clusters: all chunks in a line, cut into pieces at least as long
// as a row, one for each cluster. It first takes what its piece has of a row that goes on in the next one, so
// that the rest of that, which the next cluster takes last, need not wait.
inline Clusters cut_heads(int64_t rows, int64_t chunks, int64_t clusters) {
  const int64_t all = rows * chunks, piece = std::max(chunks, ceil_div(all, clusters));
  Clusters result;
  int places = 0;
  for (int64_t begin = 0; begin < all; begin += piece) {
    const int64_t end = std::min(begin + piece, all);
    std::vector<HeadClusterArgs::Part> parts;
    const int from = begin % chunks != 0 ? places - 1 : -1;
    for (int64_t row = (end - 1) / chunks; row >= begin / chunks; --row) {
      const int64_t first = std::max(begin - row * chunks, int64_t{0}),
                    last = std::min(end - row * chunks, chunks);
      parts.push_back({static_cast<int>(row), static_cast<int>(first), static_cast<int>(last),
                       first > 0 ? from : -1, last < chunks ? places++ : -1});
    }
    result.push_back(std::move(parts));
  }
  return result;
}

// The same parts, a cluster for each, where clusters do not go on: more than there are at once. Who is done
// makes room for the next, so the order is that in which they are to begin. The beginnings of rows come
// first, as a part must stand behind that from which it has its state, the longest of them first: by
// measurement, as the hardware does not always give the place that is free to the next. Clusters are free in
// the order of the lengths of these beginnings, so the longest of the rest come first, too.
inline Clusters one_by_one(const Clusters& clusters) {
  Clusters beginnings, rest;
  for (const auto& parts : clusters)
    for (const HeadClusterArgs::Part& part : parts) (part.to >= 0 ? beginnings : rest).push_back({part});
  for (Clusters* some : {&beginnings, &rest}) {
    std::stable_sort(some->begin(), some->end(), [](const auto& a, const auto& b) {
      return a[0].end - a[0].begin > b[0].end - b[0].begin;
    });
  }
  beginnings.insert(beginnings.end(), rest.begin(), rest.end());
  return beginnings;
}

inline int64_t count_parts(const Clusters& clusters) {
  int64_t count = 0;
  for (const auto& parts : clusters) count += static_cast<int64_t>(parts.size());
  return count;
}

// A walk is a chain, so few heads leave SMs idle. Split, every span is walked twice, for its transition and,
// from its true state, for the output. That wins where the SMs would be idle otherwise. Packed sequences are
// taken as equally long. Or the walk takes the SMs that it needs, and the others prepare chunks beside it:
// without split sequences, which need all transitions first. Or clusters do both, where heads have two value
// tiles; `clusters` run at once. A few heads more are cut, or their sequences are split on the SMs that the
// clusters leave.
inline Plan make_plan(const InputsSm90& in, int64_t key_dim, int64_t sms, int64_t clusters, bool keep,
                      bool states_on_the_way) {
  const int64_t value_tiles = ceil_div(in.value_dim, kImageColumns), key_tiles = key_dim / kImageColumns;
  const int64_t rows = in.sequences * in.value_heads, walks = rows * value_tiles;
  const int64_t chunks = ceil_div(in.cu_seqlens ? ceil_div(in.tokens, in.sequences) : in.tokens, kChunk);
  const auto walk_us = [&](int64_t ctas, int64_t length, bool output, int64_t on) {
    const int64_t key_images = key_tiles * (1 + in.channel_gate + output), images = key_images + 2 + output;
    const double bytes = static_cast<double>(images * kImage * 2 * std::min(ctas, on));
    const double chunk_us = std::max(output ? kChunkUs : kTransitionUs, bytes / kBytesPerUs);
    return kLaunchUs + static_cast<double>(ceil_div(ctas, on) * length) * chunk_us;
  };
  // Both passes over some rows, split for so many SMs; and the chunks of a span, or 0.
  const auto split = [&](int64_t of, int64_t on) -> std::pair<double, int64_t> {
    std::pair<double, int64_t> best{walk_us(of * value_tiles, chunks, true, on), 0};
    for (int64_t spans = 2; spans <= std::min<int64_t>(chunks, 2 * on); ++spans) {
      const int64_t length = ceil_div(chunks, spans);
      if (ceil_div(chunks, length) != spans) continue;
      const int64_t transitions = of * ((spans - 1) * value_tiles + (spans - 2) * key_tiles);
      const double compositions = static_cast<double>((spans - 2) * ceil_div(of * value_tiles * 8, on));
      const double us = walk_us(transitions, length, false, on) + kComposeUs + kSpanUs * compositions +
                        walk_us(of * spans * value_tiles, length, true, on);
      if (us < best.first) best = {us, length};
    }
    return best;
  };
  Plan plan;
  double best;
  std::tie(best, plan.span_chunks) = split(rows, sms);
  const auto prepare_us = [&](double us, int64_t of, int64_t on) {
    return us * static_cast<double>(of * chunks) / static_cast<double>(on);
  };
  // P costs a second read of Q, a write and a read. On a full GPU memory is the limit; on others the chain,
  // which a second warpgroup on the SM slows down.
  plan.prepare_P = in.channel_gate || plan.span_chunks > 0 || keep || walks < sms * 3 / 4;
  const double before_us = plan.prepare_P ? kPrepareUs : kPrepareWithoutPUs;
  best += prepare_us(in.channel_gate ? kPrepareChannelUs : before_us, rows, sms);
  if (keep) best = std::max(best * kKeep, kKeptChunkUs * static_cast<double>(rows * chunks));
  const bool plain = !in.cu_seqlens && !states_on_the_way;
  if (plain && !keep && walks < sms) {
    const double walk = kLaunchUs + kChunkBesideUs * static_cast<double>(chunks);
    const double beside_us = in.channel_gate ? kPrepareChannelBesideUs : kPrepareBesideUs;
    const double us = std::max(walk, prepare_us(beside_us, rows, sms - walks));
    if (us < best) best = us, plan = {0, true, sms - walks};
  }
  if (plain && !in.channel_gate && value_tiles == 2 && clusters > 0 && rows <= HeadClusterArgs::kMostParts) {
    Clusters cut = cut_heads(rows, chunks, clusters);
    const int64_t piece = std::max(chunks, ceil_div(rows * chunks, clusters));
    const int64_t count = count_parts(cut);
    if (!keep) cut = one_by_one(cut);
    const double turns = static_cast<double>(count) / static_cast<double>(clusters);
    const double pauses = keep ? (count > clusters ? kGoOnUs : 0) : std::max(turns - 1, 0.) * kClusterUs;
    const double us = kClusterLaunchUs + pauses + static_cast<double>(piece) * kClusterChunkUs;
    const double keeping = keep ? kKeepInClusters : 1;
    if (us * keeping < best && count <= HeadClusterArgs::kMostParts)
      best = us * keeping + static_cast<double>(piece) * kOutOfStepUs, plan = {0, true, 0, std::move(cut)};
    // All clusters must be there before the rest takes an SM. Key heads are not divided.
    const int64_t group = in.value_heads / in.heads;
    for (int64_t rest = ceil_div(rows - clusters, group) * group; rest > 0 && rest < rows; rest += group) {
      const int64_t left = sms - HeadClusterArgs::kCluster * (rows - rest);
      if (rest > in.value_heads || rest * value_tiles > left) break;
      const auto [walks_us, span_chunks] = split(rest, left);
      const double rest_us =
          (prepare_us(kPrepareUs, rest, left) + walks_us) * (keep ? kKeepBesideClusters : 1) +
          kBesideClustersUs;
      const double us =
          std::max(static_cast<double>(chunks) * kClusterChunkUs * keeping, rest_us) + kClusterLaunchUs;
      if (us < best)
        best = us, plan = {span_chunks, true, left, cut_heads(rows - rest, chunks, clusters), rest};
    }
  }
  return plan;
}

}  // namespace nearfield::delta
