// The neighborhood of one dimension: which keys a query sees, and which queries see a key.
// Plain integer arithmetic, for host and device; every CPU kernel, CUDA kernel and the planner use this file.
//
// A dimension of length `length` with dilation d falls into d interleaved groups: position x belongs to group
// x % d and has index x / d there. Everything below works on indices inside one group ("length" is then the
// group's own length, see group_length), so dilation never appears in the formulas.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NEARFIELD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NEARFIELD_HOST_DEVICE inline
#endif

namespace nearfield {

// Half-open range [begin, end).
struct Range {
  int begin;
  int end;
};

// Length of dilation group r of a dimension: groups with r < length % dilation are one longer.
NEARFIELD_HOST_DEVICE int group_length(int length, int dilation, int r) {
  return (length - r + dilation - 1) / dilation;
}

struct Window {
  int length;  // of the dilation group
  int window;  // keys a query sees, 1 <= window <= length
  int stride;  // queries of one stride group share a window
  bool causal;

  // First key that query i sees. Non-decreasing in i.
  NEARFIELD_HOST_DEVICE int start(int i) const {
    const int group = i - i % stride;
    if (causal) {
      const int leader = min_(group + stride - 1, length - 1);
      return max_(leader - (window - 1), 0);
    }
    const int leader = min_(group + stride / 2, length - 1);
    return min_(max_(leader - window / 2, 0), length - window);
  }

  // One past the last key that query i sees. Non-decreasing in i. A causal query never looks right of itself.
  NEARFIELD_HOST_DEVICE int end(int i) const { return causal ? i + 1 : start(i) + window; }

  NEARFIELD_HOST_DEVICE Range keys(int i) const { return {start(i), end(i)}; }

  // Union of the windows of queries [first, last]; an interval, because start and end are monotone.
  NEARFIELD_HOST_DEVICE Range any_sees(int first, int last) const { return {start(first), end(last)}; }

  // Intersection of the windows of queries [first, last]; may be empty (begin >= end).
  NEARFIELD_HOST_DEVICE Range all_see(int first, int last) const { return {start(last), end(first)}; }

  // Queries that see key j. For the gradients of keys and values.
  NEARFIELD_HOST_DEVICE Range queries(int j) const {
    if (causal) {
      // Query i sees j iff i >= j and its stride group's leader is at most j + window - 1 (the last group's
      // leader is clipped to length - 1, which only lets it see more).
      const int last_leader = j + window - 1;
      const int end = last_leader >= length - 1 ? length : (last_leader + 1) / stride * stride;
      return {j, end};
    }
    const int left = window / 2, right = window - 1 - left, offset = stride - stride / 2 - 1;
    const int begin = j < window ? 0 : (j - right + offset) / stride * stride;
    const int end = j >= length - window ? length : (j + left + offset + 1) / stride * stride;
    return {begin, end};
  }

  // Union of queries(j) over keys [first, last].
  NEARFIELD_HOST_DEVICE Range any_seen_by(int first, int last) const {
    return {queries(first).begin, queries(last).end};
  }

 private:
  static NEARFIELD_HOST_DEVICE int min_(int a, int b) { return a < b ? a : b; }
  static NEARFIELD_HOST_DEVICE int max_(int a, int b) { return a > b ? a : b; }
};

}  // namespace nearfield
