// The bias that is added to the scores, and its gradient.
#pragma once

#include <algorithm>

#include "gna/gna.h"

namespace nearfield::gna {

// [H, 2 w_1 - 1, 2 w_2 - 1, 2 w_3 - 1], contiguous. A pair's place is key - query + w - 1 per dimension, both
// as indices inside their dilation group: the window contains its query, so no offset is longer than w - 1.
template <class T>
struct BiasTable {
  T* data = nullptr;  // null: no bias
  int64_t head = 0;   // elements from head to head
  int size = 0;       // elements of a head
  int step[3] = {};   // elements from place to place
  int center = 0;     // place of a query itself

  BiasTable heads(const HeadGroup& g) const {
    BiasTable view = *this;
    if (data != nullptr) view.data += g.first * head;
    view.head *= g.step;
    return view;
  }
};

template <class T>
BiasTable<T> bias_table(T* data, const Problem& p) {
  BiasTable<T> table;
  table.data = data;
  table.size = 1;
  for (int d = 2; d >= 0; --d) {
    table.step[d] = table.size;
    table.center += (p.window[d] - 1) * table.size;
    table.size *= 2 * p.window[d] - 1;
  }
  table.head = table.size;
  return table;
}

// The gradient is a sum over all tiles. They are dealt out to parts whose number follows from sizes alone,
// each part sums into tables of its own, in order, and the tables are added at the end.
template <class T>
struct BiasGradient {
  BiasTable<T> table;  // of part 0; zeros at first
  int64_t part = 0;    // elements from part to part
  int parts = 0;
};

// At most `wanted` parts, and 2^24 elements together. `elements`: of the tables of all heads.
inline int bias_parts(int64_t elements, int64_t wanted) {
  constexpr int64_t kMost = int64_t{1} << 24;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, kMost / std::max<int64_t>(1, elements))));
}

// The CPU kernels, for one group of heads and its bias.
template <class T, class C>
void run_fwd_cpu(const FwdParams<T, C>& params, const BiasTable<const C>& bias);
template <class T, class C>
void run_bwd_cpu(const BwdParams<T, C>& params, const BiasTable<const C>& bias,
                 const BiasGradient<C>& gradient);

}  // namespace nearfield::gna
