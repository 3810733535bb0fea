// The bidiagonal form of feature maps by Householder reflections, one map in each lane of a vector, and the number of
// their singular values above a threshold. All of it is backward stable in float64, so the count is right at every
// threshold well above float64's rounding.
// Golub and Van Loan, Matrix Computations, 5.4.8; Demmel and Kahan (1990).
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "load.h"
#include "sturm.h"

namespace pcafast::cpu {

// As many maps as Lanes, a vector of doubles, has elements.
template <class Lanes>
class BidiagonalMaps {
 public:
  static constexpr int kLanes = sizeof(Lanes) / sizeof(double);
  using Mask = MaskOf<Lanes>;

  // They are transposed if that makes rows >= columns.
  BidiagonalMaps(int64_t height, int64_t width)
      : rows_(std::max(height, width)),
        columns_(std::min(height, width)),
        stride_(rows_ | 1),
        memory_(new Lanes[stride_ * columns_ + 3 * columns_ + 2 * rows_]) {
    diagonal_ = memory_.get() + stride_ * columns_;
    above_ = diagonal_ + columns_;
    v_ = above_ + columns_;
    x_ = v_ + columns_;
    next_x_ = x_ + rows_;
  }

  // Loads maps [first, first + kLanes), of which those past `last` are `last` again, times the power of two that it
  // returns. That is one unless elements are so extreme that their squares would overflow or vanish, which float64
  // alone can hold.
  template <class T>
  Lanes load(const MapView& view, int64_t first, int64_t last) {
    const bool transposed = view.width >= view.height;
    const int64_t row_stride = transposed ? view.column_stride : view.row_stride;
    const int64_t column_stride = transposed ? view.row_stride : view.column_stride;
    const T* map[kLanes];
    for (int l = 0; l < kLanes; ++l) map[l] = map_at<T>(view, std::min(first + l, last));
    for (int64_t c = 0; c < columns_; ++c)
      for (int64_t r = 0; r < rows_; ++r)
        for (int l = 0; l < kLanes; ++l) column(c)[r][l] = to_double(map[l][r * row_stride + c * column_stride]);
    return std::is_same_v<T, double> ? scale() : broadcast(1);
  }

  // Overwrites the maps by their bidiagonal form, reading and writing them once per step. The row reflection of
  // a step is put off to the next, as A -= x v'. Its v differs from row k, which becomes known column by column,
  // in the first entry alone, so A v is gathered as A (row k)' and corrected by the first column.
  void bidiagonalise() {
    std::fill(v_, v_ + columns_, Lanes{});
    std::fill(x_, x_ + rows_, Lanes{});
    above_[0] = Lanes{};
    for (int64_t k = 0; k < columns_; ++k) {
      Lanes* u = column(k);
      for (int64_t r = k; r < rows_; ++r) u[r] -= x_[r] * v_[k];
      const Reflection left(u[k], sum_of_squares(u + k + 1, rows_ - k - 1));
      diagonal_[k] = left.image;
      if (k + 1 == columns_) return;

      u[k] = left.head;
      Lanes ux{};
      for (int64_t r = k; r < rows_; ++r) ux += u[r] * x_[r];
      std::fill(next_x_ + k + 1, next_x_ + rows_, Lanes{});
      int64_t c = k + 1;
      for (; c + 4 <= columns_; c += 4) reflect_columns<4>(k, c, left.inverse, ux);
      for (; c < columns_; ++c) reflect_columns<1>(k, c, left.inverse, ux);

      const Reflection right(v_[k + 1], sum_of_squares(v_ + k + 2, columns_ - k - 2));
      above_[k + 1] = right.image;
      v_[k + 1] = right.head;
      const Lanes* next = column(k + 1);
      for (int64_t r = k + 1; r < rows_; ++r) x_[r] = (next_x_[r] - right.image * next[r]) * right.inverse;
    }
  }

  // Largest singular value of the bidiagonal form, to a relative 2e-6: squaring does no harm to it.
  Lanes largest_singular_value() {
    for (int64_t i = 0; i < columns_; ++i) {
      v_[i] = diagonal_[i] * diagonal_[i] + above_[i] * above_[i];
      x_[i] = i == 0 ? Lanes{} : diagonal_[i - 1] * above_[i];
    }
    return square_root(largest_eigenvalue(v_, x_, columns_));
  }

  // Whether all elements of the maps were: a NaN or an infinity does not get lost on the way to the bidiagonal form.
  Mask finite() const {
    Lanes zero{};
    for (int64_t i = 0; i < columns_; ++i) zero += diagonal_[i] * 0.0 + above_[i] * 0.0;
    return zero == 0.0;
  }

  // Number of singular values of the bidiagonal form above a positive threshold.
  Mask count_above(const Lanes& threshold) const {
    const Lanes smallest_pivot = broadcast(-1e-290);
    Mask count{};
    Lanes pivot = -threshold;
    for (int64_t i = 0; i < 2 * columns_ - 1; ++i) {
      const Lanes entry = i % 2 == 0 ? diagonal_[i / 2] : above_[i / 2 + 1];
      pivot = magnitude(pivot) < 1e-290 ? smallest_pivot : pivot;
      pivot = -threshold - entry * entry / pivot;
      count -= pivot > 0.0;
    }
    return count;
  }

 private:
  // I - u u' * inverse, which takes (first, rest) to (image, 0); u = (head, rest).
  struct Reflection {
    Lanes image, head, inverse;

    Reflection(const Lanes& first, const Lanes& rest_squared) {
      const Mask is_identity = rest_squared <= kNegligible;
      const Lanes squared = first * first + rest_squared;
      const Lanes norm = square_root(squared);
      const Lanes opposite = first > 0.0 ? -norm : norm;
      image = is_identity ? first : opposite;
      head = first - image;
      const Lanes inverse_or_infinity = 1.0 / (squared + magnitude(first) * norm);
      inverse = is_identity ? Lanes{} : inverse_or_infinity;
    }
  };

  static Lanes broadcast(double value) { return Lanes{} + value; }

  static Lanes sum_of_squares(const Lanes* x, int64_t count) {
    Lanes even{}, odd{};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even += x[i] * x[i];
      odd += x[i + 1] * x[i + 1];
    }
    return i < count ? even + odd + x[i] * x[i] : even + odd;
  }

  Lanes scale() {
    Lanes largest{};
    for (int64_t c = 0; c < columns_; ++c)
      for (int64_t r = 0; r < rows_; ++r) largest = larger(magnitude(column(c)[r]), largest);
    const Mask extreme = (largest > 1e60) | ((largest < 1e-60) & (largest > 0.0));
    const Lanes in_range = smaller(larger(largest, broadcast(0x1p-1022)), broadcast(0x1p+1022));  // has a reciprocal
    const Mask exponent = Mask{} + (int64_t(0x7ff) << 52);
    const Lanes power = 1.0 / (Lanes)((Mask)in_range & exponent);
    const Lanes scale = extreme ? power : broadcast(1);
    for (int64_t c = 0; c < columns_; ++c)
      for (int64_t r = 0; r < rows_; ++r) column(c)[r] *= scale;
    return scale;
  }

  Lanes* column(int64_t c) const { return memory_.get() + c * stride_; }

  // Step k on columns [first, first + kWidth): subtracts x v', the row reflection of step k - 1, and u y', the
  // column reflection of step k; leaves row k in v, and adds the columns times row k to next_x.
  template <int kWidth>
  void reflect_columns(int64_t k, int64_t first, const Lanes& inverse, const Lanes& ux) {
    const Lanes* u = column(k);
    Lanes* a[kWidth];
    Lanes y[kWidth], v[kWidth], row[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      a[i] = column(first + i);
      y[i] = Lanes{};
    }
    for (int64_t r = k; r < rows_; ++r)
      for (int i = 0; i < kWidth; ++i) y[i] += u[r] * a[i][r];
    for (int i = 0; i < kWidth; ++i) {
      v[i] = v_[first + i];
      y[i] = (y[i] - ux * v[i]) * inverse;
      row[i] = a[i][k] - u[k] * y[i] - x_[k] * v[i];
      v_[first + i] = row[i];
    }
    for (int64_t r = k + 1; r < rows_; ++r) {
      const Lanes ur = u[r], xr = x_[r];
      Lanes sum = next_x_[r];
      for (int i = 0; i < kWidth; ++i) {
        const Lanes element = a[i][r] - ur * y[i] - xr * v[i];
        a[i][r] = element;
        sum += element * row[i];
      }
      next_x_[r] = sum;
    }
  }

  int64_t rows_, columns_;
  int64_t stride_;  // between columns; odd, or columns would meet in the same cache sets
  std::unique_ptr<Lanes[]> memory_;
  Lanes* diagonal_;  // columns, of the bidiagonal form
  Lanes* above_;     // columns, its superdiagonal from entry 1 on
  Lanes* v_;         // columns
  Lanes* x_;         // rows
  Lanes* next_x_;    // rows
};

}  // namespace pcafast::cpu
