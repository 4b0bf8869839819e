// The contract between cuda.cpp, which knows tensors, and the Hopper kernels, which do not.
#pragma once

#include "gna/bias.h"
#include "nearfield/dtype.h"

namespace nearfield::gna {

// The shape of one block on the token grid (per dilation group): its sides, outermost first.
struct Box {
  int side[3];
  NEARFIELD_HOST_DEVICE int volume() const { return side[0] * side[1] * side[2]; }
};

// Relative positions of the tokens of two boxes, in one dimension.
NEARFIELD_HOST_DEVICE constexpr int bias_side(const Box& q, const Box& kv, int d) {
  return q.side[d] + kv.side[d] - 1;
}

// A 3-D problem whose head dim is not the compiled one runs batch entry by batch entry: the tensor map has no
// mode left for the batch (copy_sm90.cuh).
struct Launches {
  int64_t count, batch;  // launches, and batch entries in each
  Launches(const Problem& p, int head_dim) {
    const bool alone = p.rank == 3 && p.batch > 1 && (p.dim != head_dim || p.dim_v != head_dim);
    count = alone ? p.batch : 1;
    batch = alone ? 1 : p.batch;
  }
};

// Factors of 8-bit q, k and v, [B, Hkv] each; without data: 1.
struct Descales {
  Tokens<const float> q, k, v;
  NEARFIELD_HOST_DEVICE static float of(const Tokens<const float>& t, int64_t batch, int64_t head_kv) {
    return t.data != nullptr ? *t.at(batch, head_kv) : 1.f;
  }
};

struct FwdSm90Args {
  Problem problem;
  float scale;                 // > 0: op.py folds other signs into q
  Tokens<const void> q, k, v;  // [B, X, H, D], [B, X, Hkv, D], [B, X, Hkv, Dv]; strides multiples of 16 bytes
  Tokens<const void> add_k, add_v;  // [B, M, Hkv, D], [B, M, Hkv, Dv]; unused without additional tokens
  Tokens<void> out;                 // [B, X, H, Dv]
  Tokens<float> lse;                // [B, X, H]
  BiasTable<const float> bias;      // none with 8-bit inputs, which have no additional tokens either
  Descales descale;                 // of 8-bit inputs
  bool out_is_fp16;                 // of 8-bit inputs: out is fp16, else bf16
  Box q_box, kv_box;
  bool wide;       // the kernel with the wide tile (tiles.h)
  int* next_work;  // device memory, one int: the scheduler's counter
  int num_sms;
};

// Each returns a cudaError_t.
template <class Element, int kHeadDim>
struct fwd_sm90 {
  static int run(const FwdSm90Args& args, void* stream);
};

// Per row of [B, X, H]: what the gradients need of a query.
struct RowStats {
  float lse;    // times log2(e)
  float delta;  // rowsum(dO * O) - dLSE
};

struct BwdSm90Args {
  Problem problem;
  float scale;
  Tokens<const void> q, k, v, dout, add_k, add_v;
  Tokens<const RowStats> stats;  // [B, X, H]
  Tokens<void> dk, dv;           // [B, X, Hkv, D], [B, X, Hkv, Dv], contiguous
  bool to_additional;            // the keys that stay are the additional tokens; dk and dv are theirs
  float* dq;                     // bwd_sm90 adds to this DqBuffer; null: dQ is left to bwd_dq_sm90
  Tokens<void> dq_out;           // [B, X, H, D]: of bwd_dq_sm90, and what follows from dq
  BiasTable<const float> bias;
  bool beside;            // bwd_sm90 rounds dq to dq_out as far as it gets,
  int64_t cleared;        // and clears it but for so many units, which have been
  bool counters_cleared;  // those of bwd_sm90, by bwd_ends_sm80::clear right before
  Box q_box, kv_box;
  int* next_work;  // DqCounters behind it
  int num_sms;
  // The statistics of the first units are there, the others come from so many CTAs that run beside bwd_sm90;
  // without CTAs all are there.
  int stats_units, stats_ctas;
};

template <class Element, int kHeadDim>
struct bwd_sm90 {
  static int run(const BwdSm90Args& args, void* stream);
};

template <class Element, int kHeadDim>
struct bwd_dq_sm90 {
  static int run(const BwdSm90Args& args, void* stream);
};

// The float32 dQ of one launch: [B, H, dilation group] x [grid of the longest group] x [D]. Boxes are added
// to it, so it is ordered by group: there the tokens of a box are neighbors. Of every eight features the even
// ones come first, which is how the tensor cores' results are stored fastest.
struct DqBuffer {
  int size[3];
  int64_t elements;
  explicit DqBuffer(const Problem& p) {
    elements = p.batch * p.heads * p.groups() * p.dim;
    for (int d = 0; d < 3; ++d) {
      size[d] = group_length(p.size[d], p.dilation[d], 0);
      elements *= size[d];
    }
  }
};

// Counters of a launch that clears and rounds dQ beside its products (dq_beside_sm90.cuh). A unit is a
// key/value head of a batch entry with its query heads.
struct DqCounters {
  int units = 0, heads = 0;  // of all batch entries
  int* data = nullptr;

  DqCounters() = default;
  DqCounters(const Problem& p, bool beside, int* counters = nullptr) : data(counters) {
    if (beside) units = static_cast<int>(p.batch * p.heads_kv), heads = static_cast<int>(p.batch * p.heads);
  }
  int64_t total() const { return int64_t{4} * units + heads; }
  // Parts of a unit's zeros that somebody writes; that are there.
  NEARFIELD_HOST_DEVICE int* zeroing(int unit) const { return data + unit; }
  NEARFIELD_HOST_DEVICE int* zeroed(int unit) const { return data + units + unit; }
  // Tiles of keys whose share in dQ is there.
  NEARFIELD_HOST_DEVICE int* done(int unit) const { return data + 2 * units + unit; }
  // Parts of a query head, of rounded_rows() each, that somebody rounds.
  NEARFIELD_HOST_DEVICE int* rounding(int head) const { return data + 4 * units + head; }
  // CTAs whose share of a unit's statistics is there.
  NEARFIELD_HOST_DEVICE int* stats(int unit) const { return data + 3 * units + unit; }
};

// The rows of [B, X, H] and where their statistics go.
struct StatsArgs {
  const void *dout, *out;   // contiguous, as lse and dlse are
  const float *lse, *dlse;  // dlse may be null
  int64_t tokens, heads, heads_kv, dim_v;
  RowStats* stats;  // in the order of the rows,
  bool by_head;     // or [B, H, stats_of_head]
};
// Heads begin with lines of the caches of their own: a multiprocessor that has read one head's statistics has
// nothing old of those that are written later.
NEARFIELD_HOST_DEVICE constexpr int64_t stats_of_head(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// The memory-bound ends of the backward.
template <class Element>
struct bwd_ends_sm80 {
  // Statistics of the first units (see DqCounters); all of them, if not by_head.
  static int prepare(const StatsArgs& args, int64_t units, void* stream);
  // Of the other units, by so many CTAs, each on a multiprocessor of its own. The next kernel runs beside it
  // if it is launched as a dependent one, and is told by counters which units are done.
  static int prepare_rest(const StatsArgs& args, int64_t first_unit, const DqCounters& counters, int ctas,
                          void* stream);
  // Zeros to a DqBuffer, and to counters.
  static int clear(float* buffer, int64_t elements, int* counters, int64_t num_counters, void* stream);
  // dq = scale * buffer (+ dq), rounded.
  static int finish(const Problem& problem, float scale, const float* buffer, const Tokens<void>& dq,
                    bool accumulate, void* stream);
  // The same of the parts of heads that bwd_sm90 has not taken.
  static int finish_rest(const Problem& problem, int head_dim, float scale, const float* buffer,
                         const Tokens<void>& dq, int* next_work, void* stream);
};

}  // namespace nearfield::gna
