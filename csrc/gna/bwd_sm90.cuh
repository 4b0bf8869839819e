// Gradients of neighborhood attention on Hopper, keys staying: what the two consumer warpgroups divide among
// themselves depends on what fits their registers.
#pragma once

#include "gna/bwd_split_features_sm90.cuh"
#include "gna/bwd_split_keys_sm90.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim>
int bwd_sm90<Tag, kHeadDim>::run(const BwdSm90Args& args, void* stream) {
  using Traits =
      std::conditional_t<(kHeadDim <= 128), SplitKeys<Tag, kHeadDim>, SplitFeatures<Tag, kHeadDim>>;
  return launch_key_stationary<Traits>(args, std::is_same_v<Tag, bf16>, stream);
}

}  // namespace nearfield::gna
