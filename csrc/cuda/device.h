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
constexpr size_t kSharedBytesOfBlock = 1 << 10;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

#ifdef __CUDACC__
inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here; must not surface again at somebody else's check
  throw std::runtime_error(std::string("CUDA kernel launch failed: ") + cudaGetErrorString(error));
}

// How many bytes of shared memory a block can have on the current device.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// How many it has for all of its blocks, each of which takes kSharedBytesOfBlock for itself.
inline size_t shared_bytes_of_multiprocessor() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return bytes;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); an impossible launch throws std::runtime_error.
// A kernel that is given more than 48 KiB has no static shared memory beside it.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            std::common_type_t<Parameters>... arguments) {
  if (shared_bytes > 48 << 10) {  // then the most there is, so that no two threads ask for different amounts
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes()));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
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

// Takes 16-bit elements apart when they are used; until then two are in one register.
template <typename T, int kSize>
class alignas(sizeof(T) * kSize) Vector {
  static_assert(sizeof(T) * kSize <= 16, "one load instruction moves at most 16 bytes");
  static constexpr bool kPairs = sizeof(T) == 2 && kSize > 1;
  using Stored = std::conditional_t<kPairs, uint32_t, T>;
  Stored stored_[sizeof(T) * kSize / sizeof(Stored)];

 public:
  __device__ T operator[](int i) const {
    if constexpr (kPairs) {
      return {static_cast<uint16_t>(stored_[i / 2] >> (i % 2 * 16))};
    } else {
      return stored_[i];
    }
  }
};

// One load instruction; the address must be aligned to the whole vector.
template <int kSize, typename T>
__device__ Vector<T, kSize> load(const T* address) {
  return *reinterpret_cast<const Vector<T, kSize>*>(address);
}

}  // namespace pcafast::cuda
