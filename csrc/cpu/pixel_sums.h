// Sums over the lattices of a patch covariance, of every channel.
#pragma once

#include <vector>

#include "../kernels.h"

namespace pcafast::cpu {

struct PixelSums {
  // (lattices, channels * taps), of first pixels and of their partners, over all examples.
  std::vector<double> first, partner;
  double largest = 0;           // |x|
  std::vector<double> squares;  // (channels,)  of the same pixels, added up
  bool finite = true;
};

PixelSums sum_pixels(const PatchCovarianceArgs& args);

}  // namespace pcafast::cpu
