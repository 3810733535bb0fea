// Rank of feature maps on the GPU: a few lanes of a warp to a map of up to 32 x 32, a block to a larger one.
#include <algorithm>
#include <limits>

#include "device.h"
#include "kernels_cuda.h"
#include "rank_large.h"
#include "rank_small.h"

namespace pcafast::cuda {
namespace {

using namespace rank;

// Of maps that do not fit into shared memory. A block keeps them there one after another.
constexpr int64_t kWorkspaceBytes = 256 << 20;

Matrices matrices(const MapView& x) {
  // Rows run along the contiguous dimension where there is a choice.
  const bool transposed = x.width > x.height || (x.width == x.height && x.column_stride <= x.row_stride);
  return {x.data,
          x.dtype,
          x.examples * x.channels,
          x.channels,
          x.example_stride,
          x.channel_stride,
          transposed ? x.column_stride : x.row_stride,
          transposed ? x.row_stride : x.column_stride,
          static_cast<int>(std::max(x.height, x.width)),
          static_cast<int>(std::min(x.height, x.width))};
}

// Of those that rank_large is compiled for.
int chunks(const Matrices& maps) {
  for (const int most : {2, 3, 4, 5, 7, 8}) {
    if (maps.rows <= most * kWarp) return most;
  }
  return 16;
}

int64_t elements(const Matrices& maps) { return int64_t{chunks(maps)} * kWarp * maps.columns; }

// The shared memory of a block that has its map there.
size_t shared_bytes(const Matrices& maps) {
  return (elements(maps) + LargeMemory::size(chunks(maps) * kWarp, maps.columns)) * sizeof(double);
}

bool fits(const Matrices& maps) { return shared_bytes(maps) <= max_shared_bytes(); }

int64_t blocks_with_workspace(const Matrices& maps) {
  const int64_t room = kWorkspaceBytes / (elements(maps) * sizeof(double));
  return std::min({maps.count, std::max<int64_t>(1, room), 2 * int64_t{multiprocessors()}});
}

template <class Team>
void launch_small(const Matrices& maps, const Tolerances& tolerances, int64_t* ranks, cudaStream_t stream) {
  constexpr int64_t kMaps = kSmallThreads / Team::kLanes;
  launch(rank_small<Team>, dim3(ceil_div(maps.count, kMaps)), dim3(kSmallThreads), 0, stream, maps, tolerances, ranks);
}

template <int kChunks>
void launch_large(const Matrices& maps, const Tolerances& tolerances, const RankArgs& args, cudaStream_t stream) {
  if (fits(maps)) {
    launch(rank_large<kChunks, true>, dim3(maps.count), dim3(kLargeThreads), shared_bytes(maps), stream, maps,
           tolerances, args.workspace, args.ranks);
  } else {
    const size_t beside = LargeMemory::size(kChunks * kWarp, maps.columns) * sizeof(double);
    launch(rank_large<kChunks, false>, dim3(blocks_with_workspace(maps)), dim3(kLargeThreads), beside, stream, maps,
           tolerances, args.workspace, args.ranks);
  }
}

}  // namespace

int64_t feature_map_rank_workspace(const RankArgs& args) {
  const Matrices maps = matrices(args.x);
  if (maps.rows <= kWarp || maps.count == 0 || maps.columns == 0 || fits(maps)) return 0;
  return blocks_with_workspace(maps) * elements(maps);
}

void feature_map_rank(const RankArgs& args, cudaStream_t stream) {
  const Matrices maps = matrices(args.x);
  if (maps.count == 0) return;
  const double rounding = maps.rows * std::numeric_limits<double>::epsilon();
  const Tolerances tolerances = {std::max(args.rtol, rounding), args.atol};
  if (maps.rows <= 8) {
    launch_small<Team<2, 2, 4, 4>>(maps, tolerances, args.ranks, stream);
  } else if (maps.rows <= 16) {
    launch_small<Team<4, 4, 4, 4>>(maps, tolerances, args.ranks, stream);
  } else if (maps.rows <= 32) {
    launch_small<Team<4, 8, 8, 4>>(maps, tolerances, args.ranks, stream);
  } else if (chunks(maps) == 2) {
    launch_large<2>(maps, tolerances, args, stream);
  } else if (chunks(maps) == 3) {
    launch_large<3>(maps, tolerances, args, stream);
  } else if (chunks(maps) == 4) {
    launch_large<4>(maps, tolerances, args, stream);
  } else if (chunks(maps) == 5) {
    launch_large<5>(maps, tolerances, args, stream);
  } else if (chunks(maps) == 7) {
    launch_large<7>(maps, tolerances, args, stream);
  } else if (chunks(maps) == 8) {
    launch_large<8>(maps, tolerances, args, stream);
  } else {
    launch_large<16>(maps, tolerances, args, stream);
  }
}

}  // namespace pcafast::cuda
