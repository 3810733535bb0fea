// The CUDA half of kernels.h: every pointer is to device memory, all work goes to the stream, nothing waits for it.
// A launch that fails throws std::runtime_error.
#pragma once

#include "../kernels.h"

typedef struct CUstream_st* cudaStream_t;  // as in cuda_runtime.h, which callers need not include

namespace pcafast::cuda {

// How many doubles args.workspace must hold, aligned to 16 bytes; depends on all of args that is not behind a pointer.
int64_t taylor_workspace(const TaylorArgs& args);
void taylor_update(const TaylorArgs& args, cudaStream_t stream);
int64_t channel_moments_workspace(const MomentsArgs& args);
void channel_moments_update(const MomentsArgs& args, cudaStream_t stream);
int64_t covariance_workspace(const CovarianceArgs& args);
void covariance_update(const CovarianceArgs& args, cudaStream_t stream);
// The map that pixels are counted in is x itself: source tables are not read, and the one tap is at (0, 0). The tables
// of pairs and slots lie in host memory and are read during the call alone.
int64_t patch_covariance_workspace(const PatchCovarianceArgs& args);
void patch_covariance_update(const PatchCovarianceArgs& args, cudaStream_t stream);
// Maps have kMostRankRows rows and columns at most.
constexpr int64_t kMostRankRows = 512;
int64_t feature_map_rank_workspace(const RankArgs& args);
void feature_map_rank(const RankArgs& args, cudaStream_t stream);

}  // namespace pcafast::cuda
