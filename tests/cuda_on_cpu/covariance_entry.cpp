// Calls the kernels of covariance from Python: through the host header on the CPU, or, compiled by nvcc, on the GPU.
#include "cuda/kernels_cuda.h"
#include "entry.h"

extern "C" {

size_t covariance_args_bytes() { return sizeof(pcafast::CovarianceArgs); }

int64_t covariance_workspace(const pcafast::CovarianceArgs* args) { return pcafast::cuda::covariance_workspace(*args); }

const char* covariance_update(const pcafast::CovarianceArgs* args) {
  return error_of([&] { pcafast::cuda::covariance_update(*args, nullptr); });
}
}
