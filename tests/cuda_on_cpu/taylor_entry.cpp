// Calls the Taylor kernels from Python: through the host header on the CPU, or, compiled by nvcc, on the GPU.
#include "cuda/kernels_cuda.h"
#include "entry.h"

extern "C" {

size_t taylor_args_bytes() { return sizeof(pcafast::TaylorArgs); }

int64_t taylor_workspace(const pcafast::TaylorArgs* args) { return pcafast::cuda::taylor_workspace(*args); }

const char* taylor_update(const pcafast::TaylorArgs* args) {
  return error_of([&] { pcafast::cuda::taylor_update(*args, nullptr); });
}
}
