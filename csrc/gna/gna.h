// The contract between the Torch side of neighborhood attention and its kernels: sizes, strides and pointers.
// No Torch here. The mathematics and the glossary are in README.md.
#pragma once

#include <cstdint>
#include <vector>

#include "nearfield/window.h"

namespace nearfield::gna {

// Sizes and window parameters. One- and two-dimensional problems are padded on the left with dimensions of
// length 1 (window 1, stride 1, dilation 1, not causal), so that kernels know three dimensions only.
struct Problem {
  int rank;  // spatial dimensions the caller gave: 1, 2 or 3
  int64_t batch;
  int size[3];  // X_1, X_2, X_3
  int64_t heads, heads_kv;
  int64_t dim, dim_v;
  int window[3], stride[3], dilation[3];
  bool causal[3];
  int64_t additional;  // extra keys that every query sees; 0 if none are given

  NEARFIELD_HOST_DEVICE int64_t tokens() const { return static_cast<int64_t>(size[0]) * size[1] * size[2]; }
  NEARFIELD_HOST_DEVICE int64_t groups() const {
    return static_cast<int64_t>(dilation[0]) * dilation[1] * dilation[2];
  }
  NEARFIELD_HOST_DEVICE int64_t heads_per_kv() const { return heads_kv ? heads / heads_kv : 0; }
  // Dimension d inside dilation group r of that dimension.
  NEARFIELD_HOST_DEVICE Window axis(int d, int r) const {
    return {group_length(size[d], dilation[d], r), window[d], stride[d], causal[d]};
  }
};

// Heads with the same windows: first, first + step, .. With shared key/value heads the step is 1.
struct HeadGroup {
  Problem problem;  // of these heads alone
  int64_t first = 0, first_kv = 0, step = 1;
};

// A tensor [batch, X_1, X_2, X_3, heads, features] whose features are contiguous; all strides in elements.
// Extra tokens [batch, M, heads, features] use the last spatial stride, statistics [batch, X_1, X_2, X_3,
// heads] have one feature.
template <class T>
struct Tokens {
  T* data = nullptr;
  int64_t batch = 0;
  int64_t x[3] = {0, 0, 0};
  int64_t head = 0;

  NEARFIELD_HOST_DEVICE T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }

  // The view of heads first, first + step, ..
  Tokens heads(int64_t first, int64_t step) const {
    Tokens view = *this;
    if (data != nullptr) view.data += first * head;
    view.head *= step;
    return view;
  }
};

// T: element type, C: type of computation and of the statistics.
template <class T, class C>
struct FwdParams {
  Problem problem;
  double scale;
  Tokens<const T> q, k, v;       // [B, X, H, D], [B, X, Hkv, D], [B, X, Hkv, Dv]
  Tokens<const T> add_k, add_v;  // [B, M, Hkv, D], [B, M, Hkv, Dv]
  Tokens<T> out;                 // [B, X, H, Dv]
  Tokens<C> lse;                 // [B, X, H]

  FwdParams heads(const HeadGroup& g) const {
    FwdParams part = *this;
    part.problem = g.problem;
    part.q = q.heads(g.first, g.step);
    for (auto* t : {&part.k, &part.v, &part.add_k, &part.add_v}) *t = t->heads(g.first_kv, g.step);
    part.out = out.heads(g.first, g.step);
    part.lse = lse.heads(g.first, g.step);
    return part;
  }
};

template <class T, class C>
struct BwdParams {
  Problem problem;
  double scale;
  Tokens<const T> q, k, v, add_k, add_v, out, dout;
  Tokens<const C> lse, dlse;  // dlse.data may be null: no gradient arrives there
  Tokens<T> dq, dk, dv;       // as q, k, v
  Tokens<T> add_dk, add_dv;   // as add_k, add_v
  Tokens<C> delta;            // scratch [B, X, H]: rowsum(dout * out) - dlse
  C* partial;                 // scratch [B, Hkv, additional_chunks, M, D + Dv]

  BwdParams heads(const HeadGroup& g) const {
    BwdParams part = *this;
    part.problem = g.problem;
    for (auto* t : {&part.q, &part.out, &part.dout}) *t = t->heads(g.first, g.step);
    for (auto* t : {&part.lse, &part.dlse}) *t = t->heads(g.first, g.step);
    for (auto* t : {&part.k, &part.v, &part.add_k, &part.add_v}) *t = t->heads(g.first_kv, g.step);
    for (auto* t : {&part.dk, &part.dv, &part.add_dk, &part.add_dv}) *t = t->heads(g.first_kv, g.step);
    part.dq = dq.heads(g.first, g.step);
    part.delta = delta.heads(g.first, g.step);
    return part;
  }
};

// Parts of the queries whose share in the gradients of the additional tokens is summed separately. Depends on
// sizes only, never on the number of threads, so that repeated runs agree bit by bit.
int64_t additional_chunks(const Problem& problem);

// Scratch of the CPU backward, in elements of the statistics' type. Head groups run one after the other.
struct BwdWorkspace {
  int64_t delta, partial;
};
BwdWorkspace bwd_cpu_workspace(const Problem& whole, const std::vector<HeadGroup>& groups);

}  // namespace nearfield::gna
