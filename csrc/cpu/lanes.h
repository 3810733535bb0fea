// Eight doubles at a time, as GCC and clang vector extensions: the compiler maps them to whatever the
// instruction set at hand has.
#pragma once

#include <cstring>

#include "load.h"

namespace pcafast::cpu {

constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef int64_t LaneMask __attribute__((vector_size(8 * kLanes)));

inline Lanes broadcast(double value) { return Lanes{} + value; }

template <class T>
inline Lanes load_lanes(const T* from) {
  Lanes lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = to_double(from[l]);
  return lanes;
}

inline Lanes load_lanes(const double* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Lanes load_lanes(const float* from) {
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return __builtin_convertvector(floats, Lanes);
}

inline double absolute(double x) { return __builtin_fabs(x); }
inline Lanes absolute(Lanes x) {
  const LaneMask sign = LaneMask{} + (int64_t(1) << 63);
  return (Lanes)((LaneMask)x & ~sign);
}

inline double one_where_zero(double x) { return x == 0 ? 1.0 : 0.0; }
inline Lanes one_where_zero(Lanes x) { return (Lanes)((x == 0.0) & (LaneMask)broadcast(1.0)); }

inline double sum_of_lanes(Lanes x) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += x[l];
  return sum;
}

}  // namespace pcafast::cpu
