// Calls the kernels of patch covariance from Python: through the host header on the CPU, or, compiled by nvcc, on the
// GPU.
#include "cuda/kernels_cuda.h"
#include "entry.h"

extern "C" {

size_t patch_covariance_args_bytes() { return sizeof(pcafast::PatchCovarianceArgs); }

int64_t patch_covariance_workspace(const pcafast::PatchCovarianceArgs* args) {
  return pcafast::cuda::patch_covariance_workspace(*args);
}

const char* patch_covariance_update(const pcafast::PatchCovarianceArgs* args) {
  return error_of([&] { pcafast::cuda::patch_covariance_update(*args, nullptr); });
}
}
