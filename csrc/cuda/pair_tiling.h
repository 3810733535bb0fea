// Tiles of samples in shared memory, and how the threads of a block share the work.
#pragma once

#include "pair_samples.h"

namespace pcafast::cuda {

// A block multiplies kTile channels of the left samples by as many of the right ones. Its warps stand in two columns,
// each with kWarpRows rows. Whichever of channels and samples lie side by side in memory do so in shared memory as
// well.
template <class Kind_, int kTile_, bool kChannelsInside_, int kWarpRows_>
struct Tiling {
  using Kind = Kind_;
  static constexpr int kTile = kTile_, kWarpRows = kWarpRows_, kWarpColumns = kTile / 2;
  static constexpr int kThreads = 2 * kTile / kWarpRows * kWarp;
  static constexpr int kChunk = Kind::kChunk;  // samples at a time
  static constexpr bool kChannelsInside = kChannelsInside_;
  static constexpr int kInside = kChannelsInside ? kTile : kChunk, kOutside = kChannelsInside ? kChunk : kTile;
  // From row to row, so that what a warp reads at once lies in different banks.
  static constexpr int kRow = kInside + (kChannelsInside ? Kind::kPadOfChannels : Kind::kPadOfSamples);
  static constexpr int kElements = kOutside * kRow;
  static constexpr size_t kBytes = 2 * Kind::kStages * kElements * sizeof(typename Kind::Staged) +
                                   2 * kTile * sizeof(typename Kind::Sum) + sizeof(Step) +
                                   kThreads * Kind::kSums * sizeof(double);

  static __device__ int index(int channel, int sample) {
    return kChannelsInside ? sample * kRow + channel : channel * kRow + sample;
  }
};

}  // namespace pcafast::cuda
