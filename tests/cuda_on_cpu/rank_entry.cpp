// Calls the rank kernels from Python: through the host header on the CPU, or, compiled by nvcc, on the GPU.
#include "cuda/kernels_cuda.h"
#include "entry.h"

extern "C" {

size_t rank_args_bytes() { return sizeof(pcafast::RankArgs); }

int64_t rank_workspace(const pcafast::RankArgs* args) { return pcafast::cuda::feature_map_rank_workspace(*args); }

const char* rank(const pcafast::RankArgs* args) {
  return error_of([&] { pcafast::cuda::feature_map_rank(*args, nullptr); });
}
}
