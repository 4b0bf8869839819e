// Boxes of tokens between global and shared memory. The tensor map of [B, X_1, X_2, X_3, H, D] needs rank 6,
// the engine has 5, so one of two foldings is used:
//   folded: (head and feature, X_3, X_2, X_1, B)   when the compiled head dim is the tensor's own
//   split:  (feature, head, X_3, X_2, X_1 or B)    otherwise: features beyond D read as zero. A 3-D problem
//   then has
//           no mode left for the batch, and the caller launches batch by batch.
// In shared memory a block is [D / kChunk][rows][kChunk], each row of a chunk one swizzle span: what WGMMA
// wants.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "gna/sm90.h"
#include "nearfield/tma.h"

namespace nearfield::gna {

struct TokenMap {
  bool split;
  int64_t head_stride;  // elements; folded only
  bool batch_is_x1;     // split: mode 4 is the batch (rank <= 2), not X_1
};

// Features in one swizzle span: 128 bytes, or 64 where a row has no more.
constexpr int chunk_of(int head_dim, int element_bytes = 2) {
  return (head_dim * element_bytes < 128 ? 64 : 128) / element_bytes;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Where features from `feature` on of the box at token (x[0], x[1], x[2]) are in the map.
struct BoxPlace {
  int c0, c1, c2, c3, c4;

  __device__ __forceinline__ BoxPlace(const TokenMap& fold, const int (&x)[3], int head, int batch,
                                      int feature)
      : c0(fold.split ? feature : static_cast<int>(head * fold.head_stride) + feature),
        c1(fold.split ? head : x[2]),
        c2(fold.split ? x[2] : x[1]),
        c3(fold.split ? x[1] : x[0]),
        c4(fold.split ? (fold.batch_is_x1 ? batch : x[0]) : batch) {}
};

// Loads one box, all heads dims in chunks. Coordinates outside the tensor read as zero.
template <int kHeadDim, int kRows, class Element>
__device__ __forceinline__ void load_box(const CUtensorMap& map, const TokenMap& fold, uint64_t* barrier,
                                         Element* smem, const int (&x)[3], int head, int batch) {
  constexpr int kChunk = chunk_of(kHeadDim, sizeof(Element));
#pragma unroll
  for (int c = 0; c < kHeadDim / kChunk; ++c) {
    const BoxPlace at(fold, x, head, batch, c * kChunk);
    cute::SM90_TMA_LOAD_5D::copy(&map, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 smem + c * kRows * kChunk, at.c0, at.c1, at.c2, at.c3, at.c4);
  }
}

// Writes one box, kRows rows in shared memory as load_box leaves them; what is beyond the tensor is left out.
template <int kHeadDim, int kRows, class Element>
__device__ __forceinline__ void store_box(const CUtensorMap& map, const TokenMap& fold, const Element* smem,
                                          const int (&x)[3], int head, int batch) {
  constexpr int kChunk = chunk_of(kHeadDim, sizeof(Element));
#pragma unroll
  for (int c = 0; c < kHeadDim / kChunk; ++c) {
    const BoxPlace at(fold, x, head, batch, c * kChunk);
    cute::SM90_TMA_STORE_5D::copy(&map, smem + c * kRows * kChunk, at.c0, at.c1, at.c2, at.c3, at.c4);
  }
}

// Brings the same into the L2 cache.
template <int kHeadDim, int kElementBytes>
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, const TokenMap& fold, const int (&x)[3],
                                             int head, int batch) {
  constexpr int kChunk = chunk_of(kHeadDim, kElementBytes);
#pragma unroll 1
  for (int feature = 0; feature < kHeadDim; feature += kChunk) {
    const BoxPlace at(fold, x, head, batch, feature);
    cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&map, at.c0, at.c1, at.c2, at.c3, at.c4);
  }
}

// Describes a token tensor and its box. `features` is D or Dv, `x` the spatial sizes, `step` the dilation.
inline cudaError_t encode_tokens(CUtensorMap* map, TokenMap* fold, const Tokens<const void>& t,
                                 int element_bytes, int head_dim, int64_t features, int64_t heads,
                                 const int64_t (&x)[3], int64_t batch, const Box& box, const int (&step)[3],
                                 int rank) {
  const int chunk = chunk_of(head_dim, element_bytes);
  fold->split = features != head_dim;
  fold->head_stride = t.head;
  fold->batch_is_x1 = rank <= 2;
  TmaTensor d{};
  d.data = t.data;
  // Only bits are copied, or zeros: the size of an element is all that counts.
  d.type = element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  d.element_bytes = element_bytes;
  d.swizzle = chunk * element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const auto mode = [&](int i, int64_t size, int64_t stride, int box_size, int step_size) {
    d.size[i] = static_cast<uint64_t>(size);
    d.stride[i] = stride;
    d.box[i] = static_cast<uint32_t>(box_size);
    d.step[i] = static_cast<uint32_t>(step_size);
  };
  if (fold->split) {
    mode(0, features, 1, chunk, 1);
    mode(1, heads, t.head, 1, 1);
    mode(2, x[2], t.x[2], box.side[2], step[2]);
    mode(3, x[1], t.x[1], box.side[1], step[1]);
    if (fold->batch_is_x1) {
      mode(4, batch, t.batch, 1, 1);
    } else {
      mode(4, x[0], t.x[0], box.side[0], step[0]);
    }
  } else {
    mode(0, (heads - 1) * t.head + features, 1, chunk, 1);
    mode(1, x[2], t.x[2], box.side[2], step[2]);
    mode(2, x[1], t.x[1], box.side[1], step[1]);
    mode(3, x[0], t.x[0], box.side[0], step[0]);
    mode(4, batch, t.batch, 1, 1);
  }
  return encode_tma(map, d);
}

// encode_tokens for the token tensors of one launch.
struct TokenEncoder {
  const Launches& launches;
  int64_t launch;
  int element_bytes;
  int head_dim;
  const Problem& problem;

  Tokens<const void> shifted(Tokens<const void> t) const {
    t.data = static_cast<const char*>(t.data) + launch * t.batch * element_bytes;
    return t;
  }
  cudaError_t operator()(CUtensorMap* map, TokenMap* fold, const Tokens<const void>& t, int64_t features,
                         int64_t heads, const Box& box) const {
    const int64_t x[3] = {problem.size[0], problem.size[1], problem.size[2]};
    return encode_tokens(map, fold, shifted(t), element_bytes, head_dim, features, heads, x, launches.batch,
                         box, problem.dilation, problem.rank);
  }
  // Additional tokens: a line, `rows` of them in a block.
  cudaError_t line(CUtensorMap* map, TokenMap* fold, const Tokens<const void>& t, int64_t features,
                   int rows) const {
    const int64_t x[3] = {1, 1, problem.additional};
    const int step[3] = {1, 1, 1};
    return encode_tokens(map, fold, shifted(t), element_bytes, head_dim, features, problem.heads_kv, x,
                         launches.batch, Box{{1, 1, rows}}, step, 1);
  }
};

}  // namespace nearfield::gna
