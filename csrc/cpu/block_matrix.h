// A symmetric matrix in square blocks, for vectors whose lanes are rows of it.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "multiarch.h"

namespace pcafast::cpu {

// The blocks on and below the diagonal count, those on it whole; the others have no meaning. An even number of blocks
// stands on each side, filled up with rows and columns of zeros. A vector is one Lanes for each block.
template <class Lanes>
class BlockMatrix {
 public:
  static constexpr int kLanes = sizeof(Lanes) / sizeof(double);

  explicit BlockMatrix(int64_t size)
      : blocks_(2 * ((size + 2 * kLanes - 1) / (2 * kLanes))), memory_(new Lanes[kLanes * blocks_ * blocks_]) {}

  // On each side.
  int64_t blocks() const { return blocks_; }

  // The kLanes columns of the block in row i and column j of blocks.
  Lanes* block(int64_t i, int64_t j) const { return memory_.get() + (j * blocks_ + i) * kLanes; }

  void set_to_zero() { std::fill(memory_.get(), memory_.get() + kLanes * blocks_ * blocks_, Lanes{}); }

  // Adds the sum over k < count of a_k b_k' to the blocks on and below the diagonal, from `first` on. The vectors lie
  // block by block, `stride` Lanes from one block to the next, the same block of all vectors side by side.
  void add_products(const Lanes* a, const Lanes* b, int64_t stride, int64_t count, int64_t first) {
    for (int64_t j = first; j < blocks_; ++j)
      for (int64_t i = j / 2 * 2; i < blocks_; i += 2) {
        const Lanes *upper = a + i * stride, *lower = upper + stride;
        const double* const right = (const double*)(b + j * stride);
        Lanes sum[kLanes][2] = {};
        for (int64_t k = 0; k < count; ++k) {
          const Lanes upper_k = upper[k], lower_k = lower[k];
          for (int c = 0; c < kLanes; ++c) {
            sum[c][0] += upper_k * right[k * kLanes + c];
            sum[c][1] += lower_k * right[k * kLanes + c];
          }
        }
        for (int c = 0; c < kLanes; ++c) {
          block(i, j)[c] += sum[c][0];
          block(i + 1, j)[c] += sum[c][1];
        }
      }
  }

  // p = matrix u, over the blocks from `first` on. Takes two columns of blocks at a time: if `first` is odd, the block
  // of u before it must be zero.
  void multiply_by(const Lanes* u, Lanes* p, int64_t first) {
    first = first / 2 * 2;
    std::fill(p + first, p + blocks_, Lanes{});
    for (int64_t j = first; j < blocks_; j += 2) {
      const double* const uj = (const double*)(u + j);
      const Lanes *a = block(j, j), *b = block(j, j + 1);
      Lanes across[2][kLanes] = {};
      for (int c = 0; c < kLanes; ++c) across[0][c] = a[kLanes + c] * u[j + 1];
      multiply_block(a, uj, p[j]);
      multiply_block(a + kLanes, uj, p[j + 1]);
      multiply_block(b + kLanes, uj + kLanes, p[j + 1]);
      for (int64_t i = j + 2; i < blocks_; ++i) {
        a = block(i, j);
        b = block(i, j + 1);
        const Lanes ui = u[i];
        Lanes even = p[i], odd{};
        for (int c = 0; c < kLanes; ++c) {
          Lanes ac = a[c], bc = b[c];
          load_once(ac);
          load_once(bc);
          even += ac * uj[c];
          odd += bc * uj[kLanes + c];
          across[0][c] += ac * ui;
          across[1][c] += bc * ui;
        }
        p[i] = even + odd;
      }
      p[j] += sum_each(across[0]);
      p[j + 1] += sum_each(across[1]);
    }
  }

  // Over the blocks from `first` on.
  double dot(const Lanes* x, const Lanes* y, int64_t first) const {
    Lanes even{}, odd{};
    int64_t i = first;
    for (; i + 2 <= blocks_; i += 2) {
      even += x[i] * y[i];
      odd += x[i + 1] * y[i + 1];
    }
    if (i < blocks_) even += x[i] * y[i];
    return sum_of(even + odd);
  }

 private:
  // Keeps the compiler from reading memory once for each use, which is slower: two loads go with two additions.
  static void load_once([[maybe_unused]] Lanes& x) {
#if defined(__x86_64__) && defined(__GNUC__)
    asm("" : "+v"(x));
#endif
  }

  static void multiply_block(const Lanes* a, const double* v, Lanes& p) {
    Lanes even{}, odd{};
    for (int c = 0; c < kLanes; c += 2) {
      even += a[c] * v[c];
      odd += a[c + 1] * v[c + 1];
    }
    p += even + odd;
  }

  static double sum_of(const Lanes& x) {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += x[l];
    return sum;
  }

  // Element c is the sum of x[c].
  static Lanes sum_each(const Lanes (&x)[kLanes]) {
#if PCAFAST_HAS_SHUFFLEVECTOR
    return sum_from<0, kLanes>(x, std::make_index_sequence<kLanes>());
#else
    Lanes sums;
    for (int c = 0; c < kLanes; ++c) sums[c] = sum_of(x[c]);
    return sums;
#endif
  }

#if PCAFAST_HAS_SHUFFLEVECTOR
  // Of x[kFirst] to x[kFirst + kCount - 1], the partial sums side by side, each kLanes / kCount times.
  template <int kFirst, int kCount, size_t... kLane>
  static Lanes sum_from(const Lanes (&x)[kLanes], std::index_sequence<kLane...> lanes) {
    if constexpr (kCount == 1) {
      return x[kFirst];
    } else {
      constexpr int kHalf = kCount / 2;
      const Lanes a = sum_from<kFirst, kHalf>(x, lanes), b = sum_from<kFirst + kHalf, kHalf>(x, lanes);
      return __builtin_shufflevector(a, b, (kLane & kHalf ? kLanes + kLane : kLane)...) +
             __builtin_shufflevector(a, b, (kLane & kHalf ? kLanes + (kLane ^ kHalf) : kLane ^ kHalf)...);
    }
  }
#endif

  int64_t blocks_;
  std::unique_ptr<Lanes[]> memory_;
};

}  // namespace pcafast::cpu
