// Gradients of neighborhood attention on Hopper, keys staying: what the two consumer warpgroups divide among
// themselves depends on what fits their registers.
#pragma once

#include "gna/bwd_split_features_sm90.cuh"
#include "gna/bwd_split_keys_sm90.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim, bool kBiased>
using KeyStationary = std::conditional_t<(kHeadDim <= 128), SplitKeys<Tag, kHeadDim, kBiased>,
                                         SplitFeatures<Tag, kHeadDim, kBiased>>;

template <class Tag, int kHeadDim>
int bwd_sm90<Tag, kHeadDim>::run(const BwdSm90Args& args, void* stream) {
  // Additional tokens have no bias.
  const auto launch = args.bias.data != nullptr && !args.to_additional
                          ? launch_key_stationary<KeyStationary<Tag, kHeadDim, true>>
                          : launch_key_stationary<KeyStationary<Tag, kHeadDim, false>>;
  return launch(args, stream);
}

}  // namespace nearfield::gna
