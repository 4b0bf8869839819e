// The contract between cuda_step.cpp, which knows tensors, and the decode kernels, which do not.
#pragma once

#include "lla/lla.h"
#include "nearfield/dtype.h"

namespace nearfield::lla {

constexpr int kMaxSplits = 32;
// A cluster stays within a GPC of 16 or 18 SMs. With two blocks per SM clusters of eight leave SMs empty
// there and put a third block on others; clusters of seven do not.
constexpr int kMaxCluster = 7;

struct StepArgs {
  int64_t batch, m, n, heads, kv_heads;
  int d, dv;
  View<const void> q;   // [B, m, Hq, d]
  View<const void> k;   // [B, n, Hk, d], rows at multiples of 16 bytes
  View<const void> v;   // [B, n, Hk, dv], likewise
  const void* lengths;  // [B] int32 or int64; null: n for all
  bool lengths_are_int64;
  int64_t lengths_stride;
  Ridge<float> ridge;
  float scale;
  int64_t window;
  void* o;  // [B, m, Hq, dv] contiguous

  int splits;      // of the visible keys of a query, 1 to kMaxSplits
  bool cluster;    // they are a thread-block cluster, at most kMaxCluster, and need no memory
  float* moments;  // splits > 1, no cluster: [B, Hq, m, splits] x Moments::kFloats
};

// What a split knows of its keys, in units of the inputs: sums of w, w k', w v, w k' k'^T, w k' v^T with
// k' = k - c and w = 2^(s log2(e) - top).
template <int kD, int kDv>
struct Moments {
  static constexpr int kTop = 0, kSum = 1, kC = 4, kKey = kC + kD, kValue = kKey + kD, kKeyKey = kValue + kDv,
                       kKeyValue = kKeyKey + kD * kD, kFloats = kKeyValue + kD * kDv;
};

// Element: bf16 or fp16; kD and kDv: the smallest built that hold d and dv. Return a cudaError_t.
template <class Element, int kD, int kDv>
struct step_sm80 {
  static constexpr bool kClusters = false;  // whether args.cluster may be set
  static constexpr int kFloats = Moments<kD, kDv>::kFloats;
  static int run(const StepArgs& args, void* stream);
};

// The same on Hopper, for caches without strides of 0 (a broadcast).
template <class Element, int kD, int kDv>
struct step_sm90 {
  static constexpr bool kClusters = kD < 128;  // there the sums would not fit twice
  static constexpr int kFloats = Moments<kD, kDv>::kFloats;
  static int run(const StepArgs& args, void* stream);
};

}  // namespace nearfield::lla
