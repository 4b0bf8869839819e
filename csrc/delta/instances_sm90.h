// From tensors to the built instances of the Hopper kernels: what forward and backward share on the Torch
// side.
#pragma once

#include "delta/checks.h"
#include "delta/head_cluster_sm90.h"
#include "delta/sm80.h"
#include "delta/sm90.h"
#include "delta/sm90_bwd.h"
#include "delta/step.h"
#include "nearfield/device.h"

namespace nearfield::delta {

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
}

// ---- Instances ----

// What instances.def lists, read once; kernels that are not asked for here drop out.
struct InstancesSm90 {
  struct Key {
    bool bf16;
    int64_t key_dim;
    bool channel_gate;
    bool operator==(const Key& o) const {
      return bf16 == o.bf16 && key_dim == o.key_dim && channel_gate == o.channel_gate;
    }
  };
  template <class Args>
  struct Entry {
    Key key;
    int (*run)(const Args&, void*);
  };
  std::vector<Entry<PrepareArgs>> prepare;
  std::vector<Entry<StatePassArgs>> state_pass;
  struct HeadCluster {
    Key key;
    int (*run)(const HeadClusterArgs&, void*, void*);
    int (*at_once)();
  };
  std::vector<HeadCluster> head_cluster;
  std::vector<Entry<ComposeSpansArgs>> compose_spans;  // its key has the key dim only

  template <class Tag, int kKeyDim, bool kChannelGate>
  void add(prepare_sm90<Tag, kKeyDim, kChannelGate>*) {
    using Kernel = prepare_sm90<Tag, kKeyDim, kChannelGate>;
    prepare.push_back({{std::is_same_v<Tag, bf16>, kKeyDim, kChannelGate}, &Kernel::run});
  }
  template <class Tag, int kKeyDim, bool kChannelGate>
  void add(state_pass_sm90<Tag, kKeyDim, kChannelGate>*) {
    using Kernel = state_pass_sm90<Tag, kKeyDim, kChannelGate>;
    state_pass.push_back({{std::is_same_v<Tag, bf16>, kKeyDim, kChannelGate}, &Kernel::run});
  }
  template <class Tag, int kKeyDim>
  void add(head_cluster_sm90<Tag, kKeyDim>*) {
    using Kernel = head_cluster_sm90<Tag, kKeyDim>;
    head_cluster.push_back({{std::is_same_v<Tag, bf16>, kKeyDim, false}, &Kernel::run, &Kernel::at_once});
  }
  template <int kKeyDim>
  void add(compose_spans_sm90<kKeyDim>*) {
    compose_spans.push_back({{false, kKeyDim, false}, &compose_spans_sm90<kKeyDim>::run});
  }
  void add(const void*) {}

  InstancesSm90() {
#ifdef NEARFIELD_DELTA_SM90
#define INSTANCE(kernel, ...) add(static_cast<kernel<__VA_ARGS__>*>(nullptr));
#include "delta/instances.def"
#undef INSTANCE
#endif
  }
  static const InstancesSm90& all() {
    static const InstancesSm90 instances;
    return instances;
  }
  template <class Args>
  static auto find(const std::vector<Entry<Args>>& entries, const Key& key) {
    for (const auto& e : entries)
      if (e.key == key) return e.run;
    return static_cast<int (*)(const Args&, void*)>(nullptr);
  }
};

struct KernelChoice {
  InstancesSm90::Key key;
  int (*prepare)(const PrepareArgs&, void*);
  int (*state_pass)(const StatePassArgs&, void*);
  int (*compose_spans)(const ComposeSpansArgs&, void*);
  InstancesSm90::HeadCluster head_cluster;  // with a gate per head
};

// The smallest key dim that serves, at least so many.
inline KernelChoice choose_kernels(const char* op, const Inputs& x, int64_t least_key_dim = 0) {
  const auto dtype = x.q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": q has dtype ",
                  torch::headeronly::toString(dtype), "; supported on CUDA: bfloat16, float16");
  STD_TORCH_CHECK(x.K % 8 == 0 && x.V % 8 == 0, op, ": q has ", x.K, " and v ", x.V,
                  " channels; supported on CUDA: multiples of 8");
  KernelChoice choice{{dtype == ScalarType::BFloat16, 0, x.channel_gate}, nullptr, nullptr, nullptr, {}};
  std::ostringstream built;
  for (const auto& e : InstancesSm90::all().prepare) {
    if (e.key.bf16 != choice.key.bf16 || e.key.channel_gate != x.channel_gate) continue;
    built << (built.tellp() ? ", " : "") << e.key.key_dim;
    if (e.key.key_dim >= std::max(x.K, least_key_dim) &&
        (choice.prepare == nullptr || e.key.key_dim < choice.key.key_dim)) {
      choice.key = e.key;
      choice.prepare = e.run;
    }
  }
  STD_TORCH_CHECK(choice.prepare != nullptr, op, ": q has ", x.K, " channels, with a gate per ",
                  x.channel_gate ? "channel" : "head",
                  "; supported on CUDA: multiples of 8 up to the largest of [", built.str(), "]");
  choice.state_pass = InstancesSm90::find(InstancesSm90::all().state_pass, choice.key);
  choice.compose_spans =
      InstancesSm90::find(InstancesSm90::all().compose_spans, {false, choice.key.key_dim, false});
  for (const auto& e : InstancesSm90::all().head_cluster)
    if (e.key == choice.key) choice.head_cluster = e;
  STD_TORCH_CHECK(choice.state_pass != nullptr && choice.compose_spans != nullptr, op,
                  ": prepare was built for these arguments, the state pass was not");
  return choice;
}

// ---- Tensors ----

// The copy engine wants 16-byte aligned starts and strides.
inline Tensor loadable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) fits &= t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) % 8 == 0);
  if (fits) return t;
  Tensor copy = allocate(t, shape_of(t));
  return torch::stable::copy_(copy, t);
}

inline void make_loadable(Inputs& x) {
  x.q = loadable(x.q), x.k = loadable(x.k), x.v = loadable(x.v);
  if (x.channel_gate) x.g = loadable(*x.g);  // read two channels at once
}

// ---- Scratch ----

struct Scratch {
  ChunkScratch chunks{};
  std::vector<Tensor> memory;

  void* bytes(const Tensor& like, int64_t n) {
    memory.push_back(allocate(like, {n}, ScalarType::Byte));
    return memory.back().mutable_data_ptr();
  }
};

// Allocated from the caching allocator, so it may be dropped as soon as the kernels are launched.
inline Scratch allocate_scratch(const Tensor& like, const InputsSm90& in, const KernelChoice& choice,
                                bool with_P) {
  const int64_t chunks = ChunkSlots(in).total * in.value_heads, image = kImage * 2;
  const int64_t key_images = choice.key.key_dim / kImageColumns;
  Scratch s;
  s.chunks.rows = static_cast<ChunkRows*>(s.bytes(like, chunks * static_cast<int64_t>(sizeof(ChunkRows))));
  if (!in.channel_gate) {
    s.chunks.N = s.bytes(like, chunks * image);
    if (with_P) s.chunks.P = s.bytes(like, chunks * image);
  } else {
    s.chunks.NP = s.bytes(like, chunks * image);
    s.chunks.Kh = s.bytes(like, chunks * key_images * image);
    s.chunks.Kt = s.bytes(like, chunks * key_images * image);
    s.chunks.Qh = s.bytes(like, chunks * key_images * image);
    s.chunks.decay = static_cast<float*>(s.bytes(like, chunks * choice.key.key_dim * 4));
  }
  return s;
}

// N and, with_P, P for a walk of the forward whose chunks keep NP.
inline void allocate_apart(Scratch& s, const Tensor& like, const InputsSm90& in, bool with_P) {
  const int64_t bytes = ChunkSlots(in).total * in.value_heads * kImage * 2;
  s.chunks.N = s.bytes(like, bytes);
  if (with_P) s.chunks.P = s.bytes(like, bytes);
}

// For hard chunks.
inline void allocate_low_halves(Scratch& s, const Tensor& like, const InputsSm90& in,
                                const KernelChoice& choice, bool with_P) {
  if (!choice.key.bf16) return;  // float16 has digits enough
  const int64_t chunks = ChunkSlots(in).total * in.value_heads, image = kImage * 2;
  s.chunks.hard = static_cast<float*>(s.bytes(like, chunks * 4));
  s.chunks.N_low = s.bytes(like, chunks * image);
  if (with_P) s.chunks.P_low = s.bytes(like, chunks * image);
  if (in.channel_gate) s.chunks.Kt_low = s.bytes(like, chunks * (choice.key.key_dim / kImageColumns) * image);
}

}  // namespace nearfield::delta
