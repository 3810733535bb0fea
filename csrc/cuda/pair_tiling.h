// Tiles of samples in shared memory, and how the threads of a block share the work.
#pragma once

#include "pair_samples.h"

namespace pcafast::cuda {

constexpr int kWarpRows = 32;

// A block multiplies kTile channels of the left samples by as many of the right ones. Its warps stand in two columns.
// Whichever of channels and samples lie side by side in memory do so in shared memory as well.
template <class Kind_, int kTile_, bool kChannelsInside_>
struct Tiling {
  using Kind = Kind_;
  static constexpr int kTile = kTile_, kThreads = 2 * kTile, kWarpColumns = kTile / 2;
  static constexpr int kResident = kTile > 64 ? 1 : Kind::kResident;  // blocks on a multiprocessor, at least
  static constexpr int kChunk = Kind::kChunk;                         // samples at a time
  static constexpr bool kChannelsInside = kChannelsInside_;
  static constexpr int kInside = kChannelsInside ? kTile : kChunk, kOutside = kChannelsInside ? kChunk : kTile;
  // From row to row, so that what a warp reads at once lies in different banks.
  static constexpr int kRow = kInside + (kChannelsInside ? Kind::kPadOfChannels : Kind::kPadOfSamples);
  static constexpr int kElements = kOutside * kRow;
  static constexpr size_t kBytes =
      2 * Kind::kStages * kElements * sizeof(typename Kind::Staged) + 2 * kTile * sizeof(typename Kind::Sum);

  static __device__ int index(int channel, int sample) {
    return kChannelsInside ? sample * kRow + channel : channel * kRow + sample;
  }
};

}  // namespace pcafast::cuda
