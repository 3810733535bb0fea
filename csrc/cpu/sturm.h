// Eigenvalues of symmetric tridiagonal matrices by Sturm sequences, one matrix in each lane of a vector.
// Golub and Van Loan, Matrix Computations, 8.4.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace pcafast::cpu {

// Maps are scaled to elements near 1, or at least above 1e-60 (1e-18 before their Gram matrix is formed); a squared
// norm below this is taken as zero.
constexpr double kNegligible = 1e-200;

// Of int64_t, all bits set where true.
template <class Lanes>
using MaskOf = decltype(Lanes{} < Lanes{});

template <class Lanes>
inline Lanes smaller(const Lanes& a, const Lanes& b) {
  return a < b ? a : b;
}

template <class Lanes>
inline Lanes larger(const Lanes& a, const Lanes& b) {
  return a > b ? a : b;
}

template <class Lanes>
inline Lanes magnitude(const Lanes& x) {
  return (Lanes)((MaskOf<Lanes>)x & std::numeric_limits<int64_t>::max());
}

template <class Lanes>
inline Lanes square_root(const Lanes& x) {
  Lanes root{};
  for (size_t l = 0; l < sizeof(Lanes) / sizeof(double); ++l) root[l] = std::sqrt(x[l]);
  return root;
}

// Largest eigenvalue, to a relative 4e-6, of matrices that have none below zero; `beside` is what stands beside the
// diagonal, from entry 1 on. Both are overwritten. It lies between the largest diagonal element and twice that, and a
// bound is above it if all leading minors of bound - matrix are positive. Three bounds at a time hide the latency.
template <class Lanes>
inline Lanes largest_eigenvalue(Lanes* diagonal, Lanes* beside, int64_t size) {
  constexpr int kBounds = 3;
  Lanes largest = Lanes{} + kNegligible;
  for (int64_t i = 0; i < size; ++i) largest = larger(diagonal[i], largest);
  const Lanes inverse = 1.0 / largest;
  for (int64_t i = 0; i < size; ++i) {
    diagonal[i] *= inverse;
    beside[i] = i == 0 ? Lanes{} : beside[i] * inverse;
    beside[i] *= beside[i];
  }
  Lanes low = Lanes{} + 1.0, high = Lanes{} + 2.0;
  for (int round = 0; round < 9; ++round) {
    Lanes bound[kBounds], minor[kBounds], last[kBounds], least[kBounds];
    for (int b = 0; b < kBounds; ++b) {
      bound[b] = low + (high - low) * ((b + 1.0) / (kBounds + 1));
      minor[b] = least[b] = Lanes{} + 1.0;
      last[b] = Lanes{};
    }
    for (int64_t i = 0; i < size; ++i)
      for (int b = 0; b < kBounds; ++b) {
        const Lanes next = (bound[b] - diagonal[i]) * minor[b] - beside[i] * last[b];
        last[b] = minor[b];
        minor[b] = next;
        least[b] = smaller(next, least[b]);
        if (i % 16 == 15) {  // keeps the minors in range
          const Lanes size_of_both = larger(magnitude(minor[b]), magnitude(last[b]));
          minor[b] /= size_of_both;
          last[b] /= size_of_both;
        }
      }
    for (int b = 0; b < kBounds; ++b) {
      const MaskOf<Lanes> is_above = least[b] > 0.0;
      const Lanes above = is_above ? bound[b] : high, below = is_above ? low : bound[b];
      high = smaller(above, high);
      low = larger(below, low);
    }
  }
  return high * largest;
}

// How many eigenvalues lie above a positive threshold.
template <class Lanes>
inline MaskOf<Lanes> count_above(const Lanes* diagonal, const Lanes* beside, int64_t size, const Lanes& threshold) {
  const Lanes smallest_pivot = Lanes{} - 1e-290;
  MaskOf<Lanes> count{};
  Lanes pivot = diagonal[0] - threshold;
  count -= pivot > 0.0;
  for (int64_t i = 1; i < size; ++i) {
    pivot = magnitude(pivot) < 1e-290 ? smallest_pivot : pivot;
    pivot = diagonal[i] - threshold - beside[i] * beside[i] / pivot;
    count -= pivot > 0.0;
  }
  return count;
}

}  // namespace pcafast::cpu
