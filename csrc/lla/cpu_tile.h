// One tile of queries and the key tiles it sees, the way every query-stationary pass walks over them.
//
// Keys are used relative to a reference c near the weighted means of the tile: C_i, T - Xbar and kbar_i
// differences do not depend on c, but rounding does, and a common offset of all keys then costs nothing.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/linalg.h"
#include "lla/cpu_solve.h"
#include "lla/lla.h"

namespace nearfield::lla {

constexpr int64_t kQueries = 64;  // rows of a query tile
constexpr int64_t kKeys = 64;     // rows of a key tile
static_assert(kQueries == kBoxRows && kKeys == kBoxRows);
constexpr int64_t kKeptProbabilities = 1 << 20;  // a tile of P rows up to this size is kept, else recomputed

using cpu::gemm;
using cpu::MatrixView;
using cpu::row_major;

// out[i] = a_i . b_i, with the rounding of gemm(A, B^T): where all visible keys of a row are one key, T -
// Xbar must vanish exactly, not up to rounding divided by lam.
template <class F>
void row_dots(int64_t rows, int64_t d, const F* a, const F* b, F* out) {
  constexpr int64_t kBlock = 16;
  F block[kBlock * kBlock];
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t count = std::min(kBlock, rows - i);
    gemm(count, count, d, F(1), row_major(a + i * d, d), row_major(b + i * d, d).transposed(), F(0), block,
         kBlock);
    for (int64_t r = 0; r < count; ++r) out[i + r] = block[r * kBlock + r];
  }
}

// Rows [begin, begin + rows) of one (batch, head), widened and minus `shift` (may be null), dense [rows, d].
template <class F, class T>
void load_rows(const View<const T>& view, int64_t b, int64_t begin, int64_t rows, int64_t h, int64_t d,
               const F* shift, F* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = view.row(b, begin + i, h);
    for (int64_t c = 0; c < d; ++c) out[i * d + c] = static_cast<F>(row[c]);
    if (shift)
      for (int64_t c = 0; c < d; ++c) out[i * d + c] -= shift[c];
  }
}

// The same without a copy where the memory already has the right type.
template <class F, class T>
MatrixView<F> rows_as(const View<const T>& view, int64_t b, int64_t begin, int64_t rows, int64_t h, int64_t d,
                      std::vector<F>& scratch) {
  if constexpr (std::is_same_v<T, F>) {
    return row_major(view.row(b, begin, h), view.row_stride);
  } else {
    scratch.resize(rows * d);
    load_rows(view, b, begin, rows, h, d, static_cast<const F*>(nullptr), scratch.data());
    return row_major(static_cast<const F*>(scratch.data()), d);
  }
}

// S[r, c] = scale q.k for queries i0 + r and keys j0 + c; -inf where the query does not see the key. ld =
// kKeys.
template <class F, class T>
void masked_scores(const Problem<T>& problem, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                   MatrixView<F> q, MatrixView<F> k, F* s) {
  constexpr F kHidden = -std::numeric_limits<F>::infinity();
  gemm(rows, cols, problem.d, static_cast<F>(problem.scale), q, k.transposed(), F(0), s, kKeys);
  for (int64_t r = 0; r < rows; ++r) {
    F* row = s + r * kKeys;
    if (problem.grid.given()) {
      const uint64_t seen = problem.grid.keys_of_tile(i0 + r, j0 / kBoxRows);
      for (int64_t c = 0; c < cols; ++c)
        if ((seen >> c & 1) == 0) row[c] = kHidden;
      continue;
    }
    const Range seen = problem.visible.keys(i0 + r);
    const int64_t begin = std::clamp<int64_t>(seen.begin - j0, 0, cols);
    const int64_t end = std::clamp<int64_t>(seen.end - j0, begin, cols);
    std::fill(row, row + begin, kHidden);
    std::fill(row + end, row + cols, kHidden);
  }
}

// P = exp(S - shift) * factor in place, where shift is near lse and factor = 1 / sum_j exp(s_ij - shift_i):
// with exp(S - lse) alone the rounding of lse, 1e-4 for logits of 1000 in float32, would be an error of every
// p. A row without keys has shift = -inf and P = 0.
template <class F>
void scores_to_probabilities(int64_t rows, int64_t cols, const F* shift, const F* factor, F* s) {
  for (int64_t r = 0; r < rows; ++r) {
    F* row = s + r * kKeys;
    if (shift[r] == -std::numeric_limits<F>::infinity()) {
      std::fill(row, row + cols, F(0));
      continue;
    }
    cpu::exp_sum(row, cols, shift[r]);
    for (int64_t c = 0; c < cols; ++c) row[c] *= factor[r];
  }
}

// Consecutive rows of a tensor.
struct Rows {
  int64_t begin, count;
};

inline std::vector<Rows> tiles_of(Range rows, int64_t size) {
  std::vector<Rows> tiles;
  for (int64_t begin = rows.begin; begin < rows.end; begin += size)
    tiles.push_back({begin, std::min<int64_t>(size, rows.end - begin)});
  return tiles;
}
inline std::vector<Rows> tiles_of(const Grid::Tiles& boxes) {
  std::vector<Rows> tiles;
  for (int n = 0; n < boxes.total(); ++n) tiles.push_back({int64_t{boxes.at(n)} * kBoxRows, kBoxRows});
  return tiles;
}

// Keys that a tile of queries sees, and queries that see a tile of keys.
template <class T>
std::vector<Rows> key_tiles_of(const Problem<T>& p, int64_t i0, int64_t rows) {
  if (p.grid.given()) return tiles_of(p.grid.reached(static_cast<int>(i0 / kBoxRows), false));
  return tiles_of(p.visible.any_sees(i0, i0 + rows - 1), kKeys);
}
template <class T>
std::vector<Rows> query_tiles_of(const Problem<T>& p, int64_t j0, int64_t cols) {
  if (p.grid.given()) return tiles_of(p.grid.reached(static_cast<int>(j0 / kBoxRows), true));
  return tiles_of(p.visible.any_seen_by(j0, j0 + cols - 1), kQueries);
}

// Whether query i sees a key of the tile from j0 on.
template <class T>
bool sees_tile(const Problem<T>& p, int64_t i, int64_t j0, int64_t cols) {
  if (p.grid.given()) return p.grid.keys_of_tile(i, j0 / kBoxRows) != 0;
  const Range seen = p.visible.keys(i);
  return seen.begin < j0 + cols && seen.end > j0;
}

template <class F>
struct KeyTile {
  int64_t begin, cols;
  MatrixView<F> keys;  // [cols, d], minus the reference
  const F* p;          // [rows, cols], ld = kKeys
};

template <class T>
class QueryTile {
 public:
  using F = acc_t<T>;

  explicit QueryTile(const Problem<T>& problem) : problem(problem), d(problem.d) {}

  const Problem<T>& problem;
  const int64_t d;
  int64_t b = 0, h = 0, i0 = 0, rows = 0;
  std::vector<F> q, kbar, lse;   // [rows, d], [rows, d], [rows]
  std::vector<F> shift, factor;  // [rows]: p_ij = exp(s_ij - shift_i) factor_i

  void load(int64_t batch, int64_t head, int64_t first) {
    b = batch, h = head, i0 = first;
    rows = std::min(kQueries, problem.m - i0);
    seen_ = key_tiles_of(problem, i0, rows);
    q.resize(rows * d), kbar.resize(rows * d), lse.resize(rows), factor.assign(rows, F(0)),
        kbar_c_.resize(rows * d), weight_sum_.resize(rows);
    load_rows(problem.q, b, i0, rows, h, d, static_cast<const F*>(nullptr), q.data());
    const auto tiles = static_cast<int64_t>(seen_.size());
    keep_ = tiles * kQueries * kKeys <= kKeptProbabilities;
    p_.resize((keep_ ? tiles : 1) * kQueries * kKeys);
    ready_.assign(tiles, 0);
  }

  // Online softmax without values: lse_i = log sum_j exp(s_ij), kbar_i = sum_j p_ij k_j.
  void compute_statistics() {
    constexpr F inf = std::numeric_limits<F>::infinity();
    std::vector<F> top(rows, -inf);
    std::vector<double> omega(rows, 0.0);  // thousands of tiles: float would round each time
    std::fill(kbar.begin(), kbar.end(), F(0));
    lse.assign(rows, -inf);
    for (const auto [j0, cols] : seen_) {
      F* s = p_.data();
      const MatrixView<F> k = scores(j0, cols, s);
      for (int64_t r = 0; r < rows; ++r) {
        F highest = top[r];
        for (int64_t c = 0; c < cols; ++c) highest = s[r * kKeys + c] > highest ? s[r * kKeys + c] : highest;
        if (highest == -inf && !sees_tile(problem, i0 + r, j0, cols)) {  // nothing seen yet
          std::fill(s + r * kKeys, s + r * kKeys + cols, F(0));
          continue;
        }
        const F shrink = std::exp(top[r] - highest);
        top[r] = highest;
        omega[r] = shrink * omega[r] + cpu::exp_sum(s + r * kKeys, cols, highest);
        if (shrink != F(1))
          for (int64_t c = 0; c < d; ++c) kbar[r * d + c] *= shrink;
      }
      gemm(rows, d, cols, F(1), row_major<F>(s, kKeys), k, F(1), kbar.data(), d);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (omega[r] == 0) continue;
      lse[r] = static_cast<F>(top[r] + std::log(omega[r]));
      factor[r] = static_cast<F>(1 / omega[r]);
      for (int64_t c = 0; c < d; ++c) kbar[r * d + c] *= factor[r];
    }
    shift = top;
    choose_reference();
  }

  // The same, as the forward saved them; the factor is summed anew.
  void load_statistics(const F* saved_kbar, const F* saved_lse) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = problem.row_index(b, i0 + r, h);
      std::copy_n(saved_kbar + row * d, d, &kbar[r * d]);
      lse[r] = saved_lse[row];
    }
    shift = lse;
    std::vector<double> omega(rows, 0.0);
    for (const auto [j0, cols] : seen_) {
      scores(j0, cols, p_.data());
      for (int64_t r = 0; r < rows; ++r)
        if (sees_a_key(r)) omega[r] += cpu::exp_sum(p_.data() + r * kKeys, cols, shift[r]);
    }
    for (int64_t r = 0; r < rows; ++r) factor[r] = sees_a_key(r) ? static_cast<F>(1 / omega[r]) : F(0);
    choose_reference();
  }

  bool sees_a_key(int64_t r) const { return lse[r] != -std::numeric_limits<F>::infinity(); }

  // Calls f(KeyTile) for each key tile in order.
  template <class Visit>
  void for_each_key_tile(Visit&& visit) {
    for (int64_t tile = 0; tile < static_cast<int64_t>(ready_.size()); ++tile) {
      const auto [begin, cols] = seen_[tile];
      F* p = p_.data() + (keep_ ? tile : 0) * kQueries * kKeys;
      if (!keep_ || !ready_[tile]) {
        scores(begin, cols, p);
        scores_to_probabilities(rows, cols, shift.data(), factor.data(), p);
        ready_[tile] = 1;
      }
      keys_.resize(kKeys * d);
      load_rows(problem.k, b, begin, cols, problem.kv_head(h), d, reference_.data(), keys_.data());
      visit(KeyTile<F>{begin, cols, row_major<F>(keys_.data(), d), p});
    }
  }

  MatrixView<F> values(const KeyTile<F>& tile) {
    return rows_as<F>(problem.v, b, tile.begin, tile.cols, problem.kv_head(h), problem.dv, values_);
  }

  // xbar_i = x_i . kbar_i, relative to the reference.
  void means(const F* x, F* xbar) const { row_dots(rows, d, x, kbar_c_.data(), xbar); }

  // slope_ij = (k_j - kbar_i) . x_i, [rows, cols] with ld = kKeys.
  void slopes(const KeyTile<F>& tile, const F* x, const F* xbar, F* slope) const {
    gemm(rows, tile.cols, d, F(1), row_major(x, d), tile.keys.transposed(), F(0), slope, kKeys);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < tile.cols; ++c) slope[r * kKeys + c] -= xbar[r];
  }

  // out_i = sum_j E_ij (k_j - kbar_i), where weigh(tile, E) fills E [rows, cols], ld = kKeys. The row sum of
  // E is taken from the E that is multiplied, so that the result is exactly centred whatever E was rounded
  // to.
  template <class Weigh>
  void centred_sum(Weigh&& weigh, F* out) {
    std::fill(out, out + rows * d, F(0));
    std::fill(weight_sum_.begin(), weight_sum_.end(), F(0));
    for_each_key_tile([&](const KeyTile<F>& tile) {
      F e[kQueries * kKeys];
      weigh(tile, e);
      for (int64_t r = 0; r < rows; ++r) weight_sum_[r] += sum(e + r * kKeys, tile.cols);
      gemm(rows, d, tile.cols, F(1), row_major<F>(e, kKeys), tile.keys, F(1), out, d);
    });
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) out[r * d + c] -= weight_sum_[r] * kbar_c_[r * d + c];
  }

  // ax_i = C_i x_i + lam_i x_i, C_i = sum_j p_ij (k_j - kbar_i)(k_j - kbar_i)^T, without forming C.
  void apply(const F* lam, const F* x, F* ax) {
    F xbar[kQueries];
    means(x, xbar);
    centred_sum(
        [&](const KeyTile<F>& tile, F* e) {
          slopes(tile, x, xbar, e);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < tile.cols; ++c) e[r * kKeys + c] *= tile.p[r * kKeys + c];
        },
        ax);
    for (int64_t i = 0; i < rows * d; ++i) ax[i] += lam[i] * x[i];
  }

  // lam_i as [rows, d]; a row without keys gets 1, so that nothing is divided by exp(-lse) = 0.
  void load_ridge(const Ridge<F>& ridge, std::vector<F>& lam) const {
    // exp(-lse) may overflow; a ridge this large already is softmax attention.
    const F largest = std::is_same_v<F, double> ? F(1e200) : F(1e25);
    lam.resize(rows * d);
    for (int64_t r = 0; r < rows; ++r) {
      const F* row = ridge.data + b * ridge.stride[0] + (i0 + r) * ridge.stride[1] + h * ridge.stride[2];
      for (int64_t c = 0; c < d; ++c) {
        F value = row[ridge.channels == 1 ? 0 : c * ridge.stride[3]];
        if (ridge.absolute) value = std::min(largest, value * std::exp(-lse[r]));
        lam[r * d + c] = sees_a_key(r) ? value : F(1);
      }
    }
  }

 private:
  std::vector<Rows> seen_;
  bool keep_ = false;
  std::vector<char> ready_;         // per key tile: P has been computed
  std::vector<F> p_;                // all P tiles of these rows if keep_, else one
  std::vector<F> reference_;        // [d]
  std::vector<F> kbar_c_;           // kbar - reference
  std::vector<F> weight_sum_;       // [rows]
  std::vector<F> raw_keys_, keys_;  // [kKeys, d]
  std::vector<F> values_;           // [kKeys, dv]

  // Masked scores of one key tile; returns its keys.
  MatrixView<F> scores(int64_t j0, int64_t cols, F* s) {
    const MatrixView<F> k = rows_as<F>(problem.k, b, j0, cols, problem.kv_head(h), d, raw_keys_);
    masked_scores(problem, i0, rows, j0, cols, row_major<F>(q.data(), d), k, s);
    return k;
  }

  void choose_reference() {
    reference_.assign(d, F(0));
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) count += sees_a_key(r);
    for (int64_t r = 0; r < rows; ++r)
      if (sees_a_key(r))
        for (int64_t c = 0; c < d; ++c) reference_[c] += kbar[r * d + c] / static_cast<F>(count);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) kbar_c_[r * d + c] = kbar[r * d + c] - reference_[c];
  }
};

// Calls run(tile) with tile loaded, for every (batch, head, query tile).
template <class T, class Run>
void parallel_over_query_tiles(const Problem<T>& p, Run&& run) {
  const int64_t tiles = (p.m + kQueries - 1) / kQueries;
  torch::stable::parallel_for(0, p.batch * p.heads * tiles, 1, [&](int64_t begin, int64_t end) {
    QueryTile<T> tile(p);
    for (int64_t task = begin; task < end; ++task) {
      tile.load(task / (p.heads * tiles), task / tiles % p.heads, task % tiles * kQueries);
      run(tile);
    }
  });
}

}  // namespace nearfield::lla
