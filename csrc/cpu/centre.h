// What samples are centred on before they are multiplied: a number near their mean.
#pragma once

#include <cmath>

#include "../kernels.h"

namespace pcafast::cpu {

// In the working type, from which it is subtracted. After a ReLU many samples are zero and add the same square of the
// centre, so that the rounding of a float32 sum goes the same way every time; of a centre of 6 bits the squares add up
// exactly. Where there are so many zeros the deviation is no smaller than a quarter of the mean, and 6 bits are enough.
inline double centre_near(double mean, double share_of_zeros, Dtype dtype) {
  if (dtype == Dtype::kFloat64 || !std::isfinite(mean)) return mean;
  if (share_of_zeros < 1.0 / 16) return static_cast<float>(mean);
  int exponent;
  const double significand = std::frexp(mean, &exponent);
  return std::ldexp(std::nearbyint(significand * 64) / 64, exponent);
}

}  // namespace pcafast::cpu
