// Elements of the four supported types as float and double, exactly.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../kernels.h"

namespace pcafast::cpu {

inline float to_float(float x) { return x; }
inline float to_float(c10::BFloat16 x) { return static_cast<float>(x); }
#ifdef __FLT16_MAX__
// One instruction where the processor has F16C, which c10's own conversion uses only if all of torch does.
inline float to_float(c10::Half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.x)); }
#else
inline float to_float(c10::Half x) { return static_cast<float>(x); }
#endif

inline double to_double(double x) { return x; }
template <class T>
inline double to_double(T x) {
  return to_float(x);
}
#ifdef __x86_64__
inline double to_double(c10::Half x) {
  float value = to_float(x);
  asm("" : "+x"(value));  // or GCC 12 makes one conversion of the two, which is a library call
  return value;
}
#endif

// Calls `use` with a value of the C++ type that `dtype` names.
template <class Use>
inline void with_element_type(Dtype dtype, Use&& use) {
  switch (dtype) {
    case Dtype::kFloat16:
      return use(c10::Half());
    case Dtype::kBFloat16:
      return use(c10::BFloat16());
    case Dtype::kFloat32:
      return use(float());
    case Dtype::kFloat64:
      return use(double());
  }
}

// The first element of map i, counted through examples and channels.
template <class T>
inline const T* map_at(const MapView& x, int64_t i) {
  return static_cast<const T*>(x.data) + i / x.channels * x.example_stride + i % x.channels * x.channel_stride;
}

}  // namespace pcafast::cpu
