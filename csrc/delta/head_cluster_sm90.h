// The contract of the kernel that prepares and walks in one (head_cluster_sm90.cuh); continues sm90.h.
#pragma once

#include "delta/sm90.h"

namespace nearfield::delta {

// For sequences that are not packed, a gate per head, 65 to 128 values, without states on the way, spans and
// transitions. Of the scratch the low halves only and, if states and V' are kept, rows
// and NP.
struct HeadClusterArgs : StatePassArgs {
  static constexpr int kCluster = 4;  // CTAs
  // What a cluster walks over: chunks of a sequence and value head. A part in the middle of one takes its
  // state from the first part of the cluster before.
  struct Part {
    int row, begin, end;  // [sequence][value head]; chunks
    int from, to;         // places of states between parts; -1: none
  };
  static constexpr int kMostParts = 96;
  Part parts[kMostParts];          // of cluster after cluster
  int first_part[kMostParts + 1];  // of a cluster, and behind the last
  int clusters;
  float* handed_states;  // [place][V][K], V and K padded
  int* handed;           // [place][V / 64], zeros: 1 when it is there. Both null if there are none
};

// Prepare and walk in one, by clusters of four CTAs. `begun`, a cudaEvent_t or null, is recorded when all of
// them have their SMs.
template <class Tag, int kKeyDim>
struct head_cluster_sm90 {
  static int run(const HeadClusterArgs& args, void* stream, void* begun);
  static int at_once();  // how many of these clusters the current device runs side by side
};

}  // namespace nearfield::delta
