// What both rank kernels do with a map besides bringing it to bidiagonal form. As on the CPU (csrc/cpu/bidiagonal.h):
// Householder reflections, then one Sturm sequence of the Golub-Kahan matrix; all in float64.
#pragma once

#include "elements.h"

namespace pcafast::cuda::rank {

// Elements are near 1, or at least above 1e-60; a squared norm below this is taken as zero.
constexpr double kNegligible = 1e-200;

// Maps as matrices (rows, columns), rows >= columns.
struct Matrices {
  const void* data;
  Dtype dtype;
  int64_t count, channels, example_stride, channel_stride, row_stride, column_stride;
  int rows, columns;

  __device__ int64_t start(int64_t map) const {
    return map / channels * example_stride + map % channels * channel_stride;
  }
  __device__ double element(int64_t start, int row, int column) const {
    return to_real(cuda::element<Any>(data, dtype, start + row * row_stride + column * column_stride));
  }
};

struct Tolerances {
  double relative, absolute;
};

// The largest of the magnitudes; infinite if any is NaN.
__device__ inline double larger_magnitude(double largest, double x) {
  return fabs(x) <= largest ? largest : isfinite(x) ? fabs(x) : INFINITY;
}

// A power of two that takes elements so extreme that their squares would overflow or vanish to near 1.
__device__ inline double power_of_two_scale(double largest) {
  const bool extreme = largest > 1e60 || (largest < 1e-60 && largest > 0);
  if (!extreme || !isfinite(largest)) return 1;
  return scalbn(1.0, -min(max(ilogb(largest), -1022), 1022));  // subnormal numbers have no reciprocal
}

// I - u u' * inverse, which takes a vector with this first element and squared norm to (image, 0); u is the vector with
// `head` in the place of its first element.
struct Reflection {
  double image, head = 0, inverse = 0;

  __device__ Reflection(double first, double squared) : image(first) {
    if (squared <= kNegligible) return;
    const double norm = sqrt(squared);
    image = first > 0 ? -norm : norm;
    head = first - image;
    inverse = 1 / (squared + fabs(first) * norm);
  }
};

// The largest of `lanes` neighbouring lanes, a power of two of them.
__device__ inline double largest_of_lanes(double x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// Largest singular value, to a relative 2e-6, of the bidiagonal form with `diagonal` and, from entry 1 on, `above`. The
// largest eigenvalue of B'B lies between its largest diagonal element and twice that, and a bound is above it if all
// leading minors of bound - B'B are positive. A team of kTeam neighbouring lanes tests as many bounds at a time.
// `squared` is shared memory for 2 * size doubles.
template <int kTeam>
__device__ double largest_singular_value(const double* diagonal, const double* above, int size, double* squared) {
  constexpr int kRounds = kTeam == 32 ? 4 : kTeam == 16 ? 5 : 9;  // (kTeam + 1)^kRounds is a million or more
  const int lane = threadIdx.x % kTeam, warp_lane = threadIdx.x % kWarp;
  double* const beside_squared = squared + size;
  double largest = kNegligible;
  for (int i = lane; i < size; i += kTeam) {
    squared[i] = diagonal[i] * diagonal[i] + (i > 0 ? above[i] * above[i] : 0);
    beside_squared[i] = i > 0 ? diagonal[i - 1] * above[i] : 0;
    largest = max(largest, squared[i]);
  }
  largest = largest_of_lanes(largest, kTeam);
  for (int i = lane; i < size; i += kTeam) {
    squared[i] /= largest;
    beside_squared[i] /= largest;
    beside_squared[i] *= beside_squared[i];
  }
  __syncwarp();
  double low = 1, step = 1;
  for (int round = 0; round < kRounds; ++round) {
    step /= kTeam + 1;
    const double bound = low + (lane + 1) * step;
    double minor = 1, last = 0;
    bool is_above = true;
    for (int i = 0; i < size; ++i) {
      const double next = (bound - squared[i]) * minor - beside_squared[i] * last;
      last = minor;
      minor = next;
      is_above = is_above && next > 0;
      if (i % 16 == 15) {  // keeps the minors in range
        const double size_of_both = max(fabs(minor), fabs(last));
        minor /= size_of_both;
        last /= size_of_both;
      }
    }
    const unsigned votes = __ballot_sync(kFullWarp, !is_above);
    low += __popc(votes >> (warp_lane - lane) & (kFullWarp >> (kWarp - kTeam))) * step;
  }
  return sqrt((low + step) * largest);
}

// Number of singular values of the bidiagonal form above a positive threshold.
__device__ inline int count_above(const double* diagonal, const double* above, int size, double threshold) {
  int count = 0;
  double pivot = -threshold;
  for (int i = 1; i < 2 * size; ++i) {
    const double entry = i % 2 == 1 ? diagonal[i / 2] : above[i / 2];
    if (fabs(pivot) < 1e-290) pivot = -1e-290;
    pivot = -threshold - entry * entry / pivot;
    count += pivot > 0;
  }
  return count;
}

}  // namespace pcafast::cuda::rank
