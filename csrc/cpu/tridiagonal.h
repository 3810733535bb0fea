// The symmetric matrix A'A of one map, and its reduction to tridiagonal form by Householder reflections.
//
// For maps too large for the cache when there is one in every lane of a vector: here the lanes are rows of one matrix.
// The reduction puts off the updates of kPanel reflections and applies them in one sweep (Dongarra, Hammarling and
// Sorensen, 1989; LAPACK's dsytrd).
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "block_matrix.h"
#include "load.h"
#include "sturm.h"

namespace pcafast::cpu {

template <class Lanes>
class Gram {
 public:
  static constexpr int kLanes = sizeof(Lanes) / sizeof(double);

  Gram(int64_t height, int64_t width)
      : rows_(std::max(height, width)),
        size_(std::min(height, width)),
        matrix_(size_),
        blocks_(matrix_.blocks()),
        memory_(new Lanes[blocks_ * (2 * kPanel + std::max(rows_, kPanelStride))]) {
    vectors_ = memory_.get();
    factor_ = vectors_ + 2 * kPanel * blocks_;
  }

  // A'A of the map A, or A A' if its width exceeds its height. The map is multiplied by a power of two if its elements
  // are so extreme that their fourth powers would overflow or vanish. Returns that power, or zero if an element is NaN
  // or infinite.
  template <class T>
  double multiply(const T* map, const MapView& view) {
    load(map, view);
    Lanes largest{};
    MaskOf<Lanes> finite = ~MaskOf<Lanes>{};
    for (const Lanes* x = factor_; x < factor_ + rows_ * blocks_; ++x) {
      largest = larger(magnitude(*x), largest);
      finite &= magnitude(*x) <= std::numeric_limits<double>::max();
    }
    double top = 0;
    for (int l = 0; l < kLanes; ++l) {
      if (!finite[l]) return 0;
      top = std::max(top, largest[l]);
    }
    double scale = 1;
    if (top > 1e18 || (top < 1e-18 && top > 0)) {
      scale = std::scalbn(1.0, -std::clamp(std::ilogb(top), -1022, 1022));  // subnormal numbers have no reciprocal
      for (Lanes* x = factor_; x < factor_ + rows_ * blocks_; ++x) *x *= scale;
    }
    matrix_.set_to_zero();
    for (int64_t first = 0; first < rows_; first += kCachedRows) {
      const Lanes* const rows = factor_ + first;
      matrix_.add_products(rows, rows, rows_, std::min(kCachedRows, rows_ - first), 0);
    }
    return scale;
  }

  // Leaves the tridiagonal form in diagonal[i * step] and beside[i * step], the entry between i - 1 and i.
  void tridiagonalise(double* diagonal, double* beside, int64_t step) {
    last_image_ = 0;
    for (int64_t first = 0; first < size_; first += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, size_ - first);
      for (int64_t l = 0; l < count; ++l) {
        beside[(first + l) * step] = last_image_;
        diagonal[(first + l) * step] = reflect(first + l, l);
      }
      if (first + count < size_) {
        matrix_.add_products(factor_, factor_ + 2 * kPanel, kPanelStride, 2 * kPanel, (first + count) / kLanes);
      }
    }
  }

 private:
  static constexpr int64_t kPanel = 8;
  static constexpr int64_t kPanelStride = 4 * kPanel + 1;  // odd, or blocks would meet in the same cache sets
  static constexpr int64_t kCachedRows = 256;

  // The map, transposed if that makes rows >= columns, and rows filled up with zeros.
  template <class T>
  void load(const T* map, const MapView& view) {
    const bool transposed = view.width > view.height || (view.width == view.height && view.row_stride == 1);
    const int64_t row_stride = transposed ? view.column_stride : view.row_stride;
    const int64_t column_stride = transposed ? view.row_stride : view.column_stride;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t b = 0; b < blocks_; ++b) {
        Lanes& element = factor_[b * rows_ + r];
        const T* const from = map + r * row_stride + b * kLanes * column_stride;
        const int64_t count = std::min<int64_t>(kLanes, size_ - b * kLanes);
        if (column_stride == 1 && count == kLanes) {
          for (int c = 0; c < kLanes; ++c) element[c] = to_double(from[c]);
        } else {
          for (int c = 0; c < kLanes; ++c) element[c] = c < count ? to_double(from[c * column_stride]) : 0.0;
        }
      }
    }
  }

  // The panel: a reflection takes v w' + w v' from the matrix.
  Lanes* v(int64_t l) const { return vectors_ + l * blocks_; }
  Lanes* w(int64_t l) const { return vectors_ + (kPanel + l) * blocks_; }

  // Eliminates column k, the l-th of its panel, and returns its diagonal element.
  double reflect(int64_t k, int64_t l) {
    const int64_t own_block = k / kLanes, lane = k % kLanes;
    Lanes *const u = v(l), *const p = w(l);
    for (int64_t i = own_block; i < blocks_; ++i) u[i] = matrix_.block(i, own_block)[lane];
    double of_v[kPanel], of_w[kPanel];
    for (int64_t j = 0; j < l; ++j) {
      of_v[j] = w(j)[own_block][lane];
      of_w[j] = v(j)[own_block][lane];
    }
    subtract_panel(l, of_v, of_w, own_block, u);
    const double diagonal = u[own_block][lane];
    if (k + 1 == size_) return diagonal;

    const int64_t next_block = (k + 1) / kLanes, next_lane = (k + 1) % kLanes;
    if (next_block % 2 == 1) u[next_block - 1] = Lanes{};
    for (int64_t c = 0; c < next_lane; ++c) u[next_block][c] = 0;
    const double first = u[next_block][next_lane];
    u[next_block][next_lane] = 0;
    const double rest = matrix_.dot(u, u, next_block);
    double inverse = 0;
    last_image_ = first;
    if (rest > kNegligible) {
      const double norm = std::sqrt(first * first + rest);
      last_image_ = first > 0 ? -norm : norm;
      inverse = 1 / (first * first + rest + std::abs(first) * norm);
    }
    u[next_block][next_lane] = first - last_image_;

    matrix_.multiply_by(u, p, next_block);
    for (int64_t j = 0; j < l; ++j) {
      of_v[j] = matrix_.dot(w(j), u, next_block);
      of_w[j] = matrix_.dot(v(j), u, next_block);
    }
    subtract_panel(l, of_v, of_w, next_block, p);
    for (int64_t c = 0; c < next_lane; ++c) p[next_block][c] = 0;
    const double half = matrix_.dot(p, u, next_block) * inverse / 2;
    for (int64_t i = next_block; i < blocks_; ++i) {
      p[i] = (p[i] - u[i] * half) * inverse;
      Lanes* const packed = factor_ + i * kPanelStride + l;
      packed[0] = u[i];
      packed[kPanel] = p[i];
      packed[2 * kPanel] = -p[i];
      packed[3 * kPanel] = -u[i];
    }
    return diagonal;
  }

  // from -= the sum over j < l of v(j) of_v[j] + w(j) of_w[j], over the blocks from `first` on.
  void subtract_panel(int64_t l, const double* of_v, const double* of_w, int64_t first, Lanes* from) const {
    for (int64_t i = first; i < blocks_; ++i) {
      Lanes sum[2] = {};
      for (int64_t j = 0; j < l; ++j) {
        sum[0] += v(j)[i] * of_v[j];
        sum[1] += w(j)[i] * of_w[j];
      }
      from[i] -= sum[0] + sum[1];
    }
  }

  int64_t rows_, size_;  // of the map
  BlockMatrix<Lanes> matrix_;
  int64_t blocks_;  // on each side of the matrix
  std::unique_ptr<Lanes[]> memory_;
  Lanes* vectors_;  // of the panel, v and w
  Lanes* factor_;   // the map, then the panel packed for add_products: v, w, -w, -v
  double last_image_ = 0;
};

}  // namespace pcafast::cpu
