// The bias of a pair of tiles on Hopper. Between a box of queries and a box of keys there are q + k - 1
// relative positions per dimension: this slice of the table, a few hundred numbers, is brought to shared
// memory by a producer warp for every visited tile, with zeros beyond the table. Where a pair finds its bias
// in the slice is a term of its row plus a term of its column, and both depend on the boxes alone.
// The storage lies behind the kernel's own. Kernels with a bias are instances of their own (Traits::kBiased):
// a choice at run time made the backward without one up to 13 % slower.
#pragma once

#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

// What a kernel is told.
struct BiasParams {
  BiasTable<const float> table;
  float per_scale;  // 1 / scale, so that bias times this can be added to a product
};

// A place of a slice: a relative position.
struct SlicePlace {
  int offset;           // in the table, from the corner of the slice
  uint32_t coordinate;  // 10 bits a dimension
};

// The top bit of a field is free: it stays set where a coordinate is within the limits.
constexpr uint32_t kPlaceGuard = 1u << 9 | 1u << 19 | 1u << 29;

__device__ __forceinline__ int places_of_slice(const Box& q_box, const Box& kv_box) {
  return bias_side(q_box, kv_box, 0) * bias_side(q_box, kv_box, 1) * bias_side(q_box, kv_box, 2);
}

// Where the slice of two boxes lies in the table, if their first tokens are `distance` apart.
struct SliceOfTable {
  uint32_t low = kPlaceGuard, high = kPlaceGuard;
  int first = 0;

  __device__ __forceinline__ SliceOfTable(const BiasTable<const float>& table, const Problem& p,
                                          const Box& q_box, const int (&distance)[3]) {
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int corner = distance[d] + p.window[d] - q_box.side[d], room = 2 * p.window[d] - 1 - corner;
      low -= static_cast<uint32_t>(min(max(-corner, 0), 511)) << 10 * (2 - d);
      high += static_cast<uint32_t>(min(max(room, 0), 511) - 1) << 10 * (2 - d);
      first += corner * table.step[d];
    }
  }
  // Whether the table has the place.
  __device__ __forceinline__ bool holds(const SlicePlace& place) const {
    return ((low + place.coordinate) & (high - place.coordinate) & kPlaceGuard) == kPlaceGuard;
  }
};

// Rows stay, columns are visited. kDirection says which of them are the queries: forward, the rows.
template <int kRows, int kColumns, int kStages, int kPlaces, Direction kDirection>
struct BiasSlices {
  static constexpr bool kForward = kDirection == Direction::kForward;
  int row[kRows];  // bytes
  // A thread's columns in its own order: column 8 j + 2 quad + {0, 1} is at [quad][2 j + {0, 1}].
  alignas(16) int column[4][kColumns / 4 + 4];
  SlicePlace place[kPlaces];
  alignas(16) float slice[kStages][kPlaces];
  Ring<kStages> ring;  // of the kernels that hold queries; in the others a slice comes with the statistics

  // By all threads of a CTA, before the roles part.
  __device__ void build(const Box& q_box, const Box& kv_box, const BiasTable<const float>& table,
                        int num_threads) {
    const Box& rows = kForward ? q_box : kv_box;
    const Box& columns = kForward ? kv_box : q_box;
    int side[3];
    for (int d = 0; d < 3; ++d) side[d] = bias_side(q_box, kv_box, d);
    // Rows and columns that their box does not fill may have the bias of any others.
    const auto term = [&](const Box& box, int n, bool is_query) {
      const int outer = n / box.side[2];
      const int c[3] = {min(outer / box.side[1], box.side[0] - 1), outer % box.side[1], n % box.side[2]};
      int at[3];
      for (int d = 0; d < 3; ++d) at[d] = is_query ? q_box.side[d] - 1 - c[d] : c[d];
      return ((at[0] * side[1] + at[1]) * side[2] + at[2]) * static_cast<int>(sizeof(float));
    };
    for (int n = threadIdx.x; n < kRows; n += num_threads) row[n] = term(rows, n, kForward);
    for (int n = threadIdx.x; n < kColumns; n += num_threads) {
      column[n / 2 % 4][n / 8 * 2 + n % 2] = term(columns, n, !kForward);
    }
    for (int n = threadIdx.x; n < side[0] * side[1] * side[2]; n += num_threads) {
      const int outer = n / side[2], c[3] = {outer / side[1], outer % side[1], n % side[2]};
      place[n] = {c[0] * table.step[0] + c[1] * table.step[1] + c[2] * table.step[2],
                  static_cast<uint32_t>(c[0]) << 20 | static_cast<uint32_t>(c[1]) << 10 |
                      static_cast<uint32_t>(c[2])};
    }
  }

  // Starts the copies of a slice; for one warp. `query`, `key`: first tokens of the two boxes; no_key: all
  // zeros.
  __device__ __forceinline__ void fill(int stage, const BiasTable<const float>& table, int head,
                                       const Problem& p, const Box& q_box, const Box& kv_box,
                                       const int (&query)[3], const int (&key)[3], bool no_key) {
    const SliceOfTable within(table, p, q_box, {key[0] - query[0], key[1] - query[1], key[2] - query[2]});
    const float* from = table.data + head * table.head;
    const int count = places_of_slice(q_box, kv_box);
    for (int n = threadIdx.x % 32; n < count; n += 32) {
      const SlicePlace at = place[n];
      const bool exists = !no_key && within.holds(at);
      // Addresses of what does not exist are not read.
      cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>::copy(
          reinterpret_cast<const uint32_t&>(from[exists ? within.first + at.offset : 0]),
          reinterpret_cast<uint32_t&>(slice[stage][n]), exists);
    }
  }

  // Adds the bias to a thread's two rows, row_index and row_index + 8, and all columns from first_column on.
  template <class Tensor>
  __device__ __forceinline__ void add(Tensor& scores, int stage, int row_index, int quad, float per_scale,
                                      int first_column = 0) const {
    const char* base = reinterpret_cast<const char*>(slice[stage]);
    const char* of_row[2] = {base + row[row_index], base + row[row_index + 8]};
    const int* columns = &column[quad][first_column / 4];
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); j += 4) {
      const int4 at = *reinterpret_cast<const int4*>(columns + j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const auto bias = [&](int bytes) { return *reinterpret_cast<const float*>(of_row[i] + bytes); };
        scores(i, j) = fmaf(bias(at.x), per_scale, scores(i, j));
        scores(i, j + 1) = fmaf(bias(at.y), per_scale, scores(i, j + 1));
        scores(i, j + 2) = fmaf(bias(at.z), per_scale, scores(i, j + 2));
        scores(i, j + 3) = fmaf(bias(at.w), per_scale, scores(i, j + 3));
      }
    }
  }
};

// The slices of a kernel with this storage, behind it.
template <class Traits>
__device__ __forceinline__ typename Traits::Bias& bias_slices() {
  return *reinterpret_cast<typename Traits::Bias*>(dynamic_shared + sizeof(typename Traits::Storage));
}

// Bytes of shared memory of a launch.
template <class Traits>
constexpr int shared_bytes() {
  constexpr int kBytes =
      sizeof(typename Traits::Storage) + (Traits::kBiased ? sizeof(typename Traits::Bias) : 0);
  static_assert(kBytes <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
  return kBytes;
}

}  // namespace nearfield::gna
