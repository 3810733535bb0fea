// Calls the kernels of channel moments from Python: through the host header on the CPU, or, compiled by nvcc, on the
// GPU.
#include "cuda/kernels_cuda.h"
#include "entry.h"

extern "C" {

size_t channel_moments_args_bytes() { return sizeof(pcafast::MomentsArgs); }

int64_t channel_moments_workspace(const pcafast::MomentsArgs* args) {
  return pcafast::cuda::channel_moments_workspace(*args);
}

const char* channel_moments_update(const pcafast::MomentsArgs* args) {
  return error_of([&] { pcafast::cuda::channel_moments_update(*args, nullptr); });
}
}
