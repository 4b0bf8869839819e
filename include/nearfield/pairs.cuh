// Two neighboring 16-bit elements in one word, the lower one first.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/numeric_conversion.h>

#include <type_traits>

namespace nearfield {

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  const auto pair = convert(cutlass::Array<float, 2>{low, high});
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<Element,
                               cutlass::bfloat16_t>) {  // the upper halves of floats: two instructions
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    const auto* pair = reinterpret_cast<const Element*>(&word);
    return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
  }
}
// What rounding a and b into `high` lost, rounded.
template <class Element>
__device__ __forceinline__ uint32_t pack_low(float a, float b, uint32_t high) {
  const float2 rounded = unpack<Element>(high);
  return pack<Element>(a - rounded.x, b - rounded.y);
}

}  // namespace nearfield
