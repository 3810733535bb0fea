// What samples are centred on before they are multiplied: a number near their mean.
#pragma once

#include <algorithm>
#include <cmath>

#include "../kernels.h"

namespace pcafast::cpu {

// A multiple of a sixteenth of the deviation, or somewhat less, in the working type, from which it is subtracted. Where
// many samples are equal, as the zeros after a ReLU, they add the same square every time; of a centre of few bits such
// squares add up exactly, while the rounding of others would go the same way every time.
inline double centre_near(double mean, double variance, Dtype dtype) {
  if (dtype == Dtype::kFloat64 || !std::isfinite(mean)) return mean;
  if (!(variance > 0) || !std::isfinite(variance)) return static_cast<float>(mean);
  const double grid = std::exp2(std::ilogb(variance) / 2 - 4);
  return static_cast<float>(std::nearbyint(mean / grid) * grid);
}

}  // namespace pcafast::cpu
