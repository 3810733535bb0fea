// Stands in for CUDA in tests: its names, for kernels that run on the CPU (block.h). A barrier or an exchange between
// lanes is known by the place of the call.
#pragma once

#include <cmath>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // so that all of it lies in one segment, which find_shared() finds

using std::copysign;
using std::fabs;
using std::fma;
using std::isfinite;
using std::max;
using std::min;
using std::sqrt;

typedef struct CUstream_st* cudaStream_t;

namespace device_host {

template <typename T>
T shuffle(unsigned lanes, T value, unsigned source, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet({place, false, lanes}, bits, source % kWarp).received;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(unsigned lanes, int predicate, Place place) {
  return meet({place, false, lanes}, predicate != 0).votes;
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

}  // namespace device_host

inline void __syncthreads(device_host::Place place = device_host::Place::here()) {
  if (device_host::barrier_stands(place)) device_host::meet({place, true, 0});
}
inline int __syncthreads_and(int predicate, device_host::Place place = device_host::Place::here()) {
  if (!device_host::barrier_stands(place)) return predicate != 0;
  return device_host::meet({place, true, 0}, predicate != 0).votes == device_host::states.size();
}
inline void __syncwarp(unsigned lanes = ~0u, device_host::Place place = device_host::Place::here()) {
  if (device_host::barrier_stands(place)) device_host::meet({place, false, lanes});
}
inline unsigned __ballot_sync(unsigned lanes, int predicate, device_host::Place place = device_host::Place::here()) {
  return device_host::vote(lanes, predicate, place);
}
inline int __any_sync(unsigned lanes, int predicate, device_host::Place place = device_host::Place::here()) {
  return device_host::vote(lanes, predicate, place) != 0;
}
template <typename T>
T __shfl_sync(unsigned lanes, T value, int source, device_host::Place place = device_host::Place::here()) {
  return device_host::shuffle(lanes, value, source, place);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, device_host::Place place = device_host::Place::here()) {
  return device_host::shuffle(lanes, value, device_host::lane() ^ mask, place);
}
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "sums of floating-point numbers have a fixed order");
  const T old = *address;
  *address += value;
  return old;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>  // newer C libraries have a function of that name
T rsqrt(T x) {
  return 1 / std::sqrt(x);
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const bool finite = (x.bits & 0x7c00u) != 0x7c00u;
  const float value = finite ? __uint_as_float(magnitude) * 0x1p112f : __uint_as_float(magnitude | 0x7f800000u);
  return sign ? -value : value;
}

namespace pcafast::cuda {

inline size_t max_shared_bytes() { return device_host::max_shared_bytes; }
inline size_t shared_bytes_of_multiprocessor() { return device_host::max_shared_bytes + (1 << 10); }
inline int multiprocessors() { return device_host::multiprocessors; }

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            std::common_type_t<Parameters>... arguments) {
  device_host::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                        [&] { kernel(arguments...); });
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(device_host::dynamic_memory.data());
}

}  // namespace pcafast::cuda
