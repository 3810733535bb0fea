// Elements of tensors whose type is known when they are read, or not before.
#pragma once

#include "../kernels.h"
#include "device.h"

namespace pcafast::cuda {

// An element of a type known only at run time.
struct Any {
  uint64_t bits;
  Dtype dtype;
};
__device__ inline double to_real(Any x) {
  switch (x.dtype) {
    case Dtype::kFloat16:
      return to_real(Float16{static_cast<uint16_t>(x.bits)});
    case Dtype::kBFloat16:
      return to_real(BFloat16{static_cast<uint16_t>(x.bits)});
    case Dtype::kFloat32:
      return __uint_as_float(static_cast<uint32_t>(x.bits));
    default:
      return __longlong_as_double(x.bits);
  }
}

// T is Any or what the dtype says.
template <typename T>
__device__ T element(const void* data, Dtype dtype, int64_t index) {
  if constexpr (!std::is_same_v<T, Any>) {
    return static_cast<const T*>(data)[index];
  } else if (dtype == Dtype::kFloat64) {
    return {static_cast<const uint64_t*>(data)[index], dtype};
  } else if (dtype == Dtype::kFloat32) {
    return {static_cast<const uint32_t*>(data)[index], dtype};
  } else {
    return {static_cast<const uint16_t*>(data)[index], dtype};
  }
}

}  // namespace pcafast::cuda
