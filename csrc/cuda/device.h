// What the kernels need beyond plain CUDA: element types, wide loads, launches that throw. Without nvcc, the header
// device_host.h (tests/cuda_on_cpu, on the include path of the tests alone) stands in for CUDA and runs the same
// kernels on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "device_host.h"
#endif

namespace pcafast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef __CUDACC__
// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); an impossible launch throws std::runtime_error.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            std::common_type_t<Parameters>... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // told here; must not surface again at somebody else's check
    throw std::runtime_error(std::string("CUDA kernel launch failed: ") + cudaGetErrorString(error));
  }
}

// The shared_bytes of the launch, aligned to 16 bytes.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}
#endif

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Exact: float holds every 16-bit value.
__device__ inline float to_real(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_real(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }

template <typename T>
using Real = decltype(to_real(T{}));

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  static_assert(sizeof(T) * kSize <= 16, "one load instruction moves at most 16 bytes");
  T values[kSize];
};

// One load instruction; the address must be aligned to the whole vector.
template <int kSize, typename T>
__device__ Vector<T, kSize> load(const T* address) {
  return *reinterpret_cast<const Vector<T, kSize>*>(address);
}

}  // namespace pcafast::cuda
