// The portable kernels of the delta rule: picks the instances, allocates scratch, launches.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include "delta/cuda_portable.h"

#include "delta/instances_sm90.h"
#include "delta/sm80.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Instances: what instances.def lists ----

template <class Tag>
constexpr ScalarType kTypeOf = std::is_same_v<Tag, bf16>   ? ScalarType::BFloat16
                               : std::is_same_v<Tag, fp16> ? ScalarType::Half
                                                           : ScalarType::Float;

struct PortableInstances {
  template <class Args>
  struct Entry {
    ScalarType dtype;
    int64_t variant;  // the key dim of a walk; whether there is a gate per channel
    int (*run)(const Args&, void*);
  };
  std::vector<Entry<PrepareSm80Args>> prepare;
  std::vector<Entry<WalkSm80Args>> walk;
  std::vector<Entry<GradientSm80Args>> gradient;

  template <class Tag, bool kChannelGate>
  void add(prepare_sm80<Tag, kChannelGate>*) {
    prepare.push_back({kTypeOf<Tag>, kChannelGate, &prepare_sm80<Tag, kChannelGate>::run});
  }
  template <class Tag, int kKeyDim>
  void add(walk_sm80<Tag, kKeyDim>*) {
    walk.push_back({kTypeOf<Tag>, kKeyDim, &walk_sm80<Tag, kKeyDim>::run});
  }
  template <class Tag, bool kChannelGate>
  void add(gradient_sm80<Tag, kChannelGate>*) {
    gradient.push_back({kTypeOf<Tag>, kChannelGate, &gradient_sm80<Tag, kChannelGate>::run});
  }
  void add(const void*) {}

  PortableInstances() {
#define INSTANCE(kernel, ...) add(static_cast<kernel<__VA_ARGS__>*>(nullptr));
#include "delta/instances.def"
#undef INSTANCE
  }
  static const PortableInstances& all() {
    static const PortableInstances instances;
    return instances;
  }
};

template <class Args>
void run(const char* op, const std::vector<PortableInstances::Entry<Args>>& entries, ScalarType dtype,
         int64_t variant, const Args& args, void* stream) {
  for (const auto& e : entries)
    if (e.dtype == dtype && e.variant == variant) return check_launch(op, e.run(args, stream));
  STD_TORCH_CHECK(false, op, ": this build lacks a portable kernel for q in ",
                  torch::headeronly::toString(dtype));
}

// ---- A call ----

// Whether the walk forward reads q, k and v in place.
bool reads_in_place(const Inputs& x) {
  return !x.channel_gate && x.q.scalar_type() != ScalarType::Float && x.K % 8 == 0 && x.V % 8 == 0;
}

struct PortableCall {
  const char* op;
  const Inputs& x;
  const InputsSm80 in;
  const ScalarType dtype;
  const bool wide;
  const bool raw;
  const ChunkTiles tiles;
  const int64_t chunks;
  void* const stream;
  std::vector<Tensor> memory;  // from the caching allocator: may be dropped once the kernels are launched
  ScratchSm80 scratch{};

  PortableCall(const char* op_, const Inputs& x_, const Options& options, bool backward,
               const Rows<void>& d_o)
      : op(op_),
        x(x_),
        in(kernel_inputs<void, float>(x_, options)),
        dtype(x_.q.scalar_type()),
        wide(dtype == ScalarType::Float),
        raw(!backward && reads_in_place(x_)),
        tiles(x_.K, x_.V, wide, dtype == ScalarType::BFloat16, raw),
        chunks(ChunkSlots(in).total * x_.HV),
        stream(current_stream(x_.q)) {
    const int64_t padded = tiles.keys * kTile;
    scratch.rows = static_cast<ChunkRowsSm80*>(bytes(chunks * static_cast<int64_t>(sizeof(ChunkRowsSm80))));
    scratch.tiles = bytes(chunks * tiles.total(backward) * tile_bytes());
    scratch.backward = backward, scratch.raw = raw;
    scratch.decay = floats(chunks * padded);
    if (in.channel_gate && backward) scratch.G = floats(chunks * kTile * padded);
    run(op, PortableInstances::all().prepare, dtype, in.channel_gate, PrepareSm80Args{in, scratch, d_o},
        stream);
  }

  void* bytes(int64_t n) {
    memory.push_back(allocate(x.q, {n}, ScalarType::Byte));
    return memory.back().mutable_data_ptr();
  }
  float* floats(int64_t n) { return static_cast<float*>(bytes(n * 4)); }
  int64_t tile_bytes() const { return kTileElements * (wide ? 4 : 2); }

  // Few chains: narrower CTAs, so that more SMs have one. An SM has room for one CTA of a walk in place, for
  // two narrow ones of the others.
  void walk(WalkSm80Args& args) const {
    const int64_t wide_ctas = tiles_of(x.V) * x.HV * x.N * (args.backward ? 2 : 1);
    const int64_t sms = device_info(x.q.get_device_index()).num_sms;
    if (args.in_place()) {
      args.value_warps = 4 * wide_ctas <= sms ? 1 : 2 * wide_ctas <= sms ? 2 : 4;
    } else {
      args.value_warps = wide_ctas < sms ? 2 : 4;
    }
    run(op, PortableInstances::all().walk, dtype, tiles.keys * kTile, args, stream);
  }
};

}  // namespace

void portable_forward(const char* op, Inputs x, const Options& options, const Tensor& o, float* final_state,
                      float* states, int64_t states_every) {
  if (reads_in_place(x)) make_loadable(x);
  PortableCall call(op, x, options, false, {});
  WalkSm80Args walk{call.in, call.scratch};
  walk.o = o.mutable_data_ptr(), walk.final_state = final_state;
  walk.states = states, walk.states_every = states_every;
  call.walk(walk);
}

void portable_backward(const char* op, const Inputs& x, const Options& options, const OptTensor& d_o,
                       const OptTensor& d_final, const GradientsOut& out) {
  PortableCall call(op, x, options, true, defined(d_o) ? rows<void>(*d_o) : Rows<void>{});
  const int64_t value_tiles = call.chunks * tiles_of(x.V), state_tiles = value_tiles * call.tiles.keys;
  WalkSm80Args walk{call.in, call.scratch};
  walk.backward = true;
  walk.left = {call.bytes(value_tiles * call.tile_bytes()), call.bytes(value_tiles * call.tile_bytes()),
               call.bytes(state_tiles * call.tile_bytes()), call.bytes(state_tiles * call.tile_bytes())};
  walk.d_final = data_or_null<float>(d_final);
  walk.dv = out.dv.mutable_data_ptr(), walk.d_initial = out.d_initial;
  call.walk(walk);

  GradientSm80Args gradient{call.in, call.scratch, walk.left};
  gradient.dq_heads = call.floats(x.B * x.T * x.HV * x.K);
  gradient.dk_heads = call.floats(x.B * x.T * x.HV * x.K);
  gradient.dbeta = out.dbeta, gradient.dg = out.dg;
  if (out.dA_log != nullptr || out.ddt_bias != nullptr)
    gradient.gate_parts = call.floats(2 * call.chunks * call.in.gate_dim());
  gradient.dq = out.dq.mutable_data_ptr(), gradient.dk = out.dk.mutable_data_ptr();
  gradient.dA_log = out.dA_log, gradient.ddt_bias = out.ddt_bias;
  run(op, PortableInstances::all().gradient, call.dtype, call.in.channel_gate, gradient, call.stream);
}

}  // namespace nearfield::delta
#endif
