// Calls the Taylor kernels from Python: through the host header on the CPU, or, compiled by nvcc, on the GPU.
#include <exception>
#include <string>

#include "cuda/device.h"
#include "cuda/kernels_cuda.h"

extern "C" {

size_t taylor_args_bytes() { return sizeof(pcafast::TaylorArgs); }

int64_t taylor_workspace(const pcafast::TaylorArgs* args) { return pcafast::cuda::taylor_workspace(*args); }

// Null, or what went wrong.
const char* taylor_update(const pcafast::TaylorArgs* args, [[maybe_unused]] uint64_t schedule) {
  static std::string error;
  try {
#ifndef __CUDACC__
    device_host::schedule = schedule;
#endif
    pcafast::cuda::taylor_update(*args, nullptr);
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}
}
