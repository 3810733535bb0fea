// Rank of feature maps on the CPU, one map in each lane of a vector.
//
// A map is brought to bidiagonal form B by Householder reflections, and its singular values are counted with one
// Sturm sequence of the Golub-Kahan matrix [0 B'; B 0]. The largest singular value comes from a short search on
// B'B, where squaring does no harm. All of it is backward stable in float64, so the count is right at every
// threshold well above float64's rounding.
// Golub and Van Loan, Matrix Computations, 5.4.8 and 8.6; Demmel and Kahan (1990).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../kernels.h"
#include "load.h"

namespace pcafast::cpu {
namespace {

// Elements are near 1, or at least above 1e-60; a vector whose squared norm is below this is taken as zero.
constexpr double kNegligible = 1e-200;

template <class Lanes>
inline Lanes smaller(const Lanes& a, const Lanes& b) {
  return a < b ? a : b;
}

template <class Lanes>
inline Lanes larger(const Lanes& a, const Lanes& b) {
  return a > b ? a : b;
}

// As many maps as Lanes, a vector of doubles, has elements.
template <class Lanes>
class Maps {
 public:
  static constexpr int kLanes = sizeof(Lanes) / sizeof(double);
  using Mask = decltype(Lanes{} < Lanes{});  // of int64_t, all bits set where true

  // The largest magnitude of every map, and whether all its elements are finite.
  struct Extent {
    Lanes largest{};
    Mask finite = ~Mask{};
  };

  // They are transposed if that makes rows >= columns.
  Maps(int64_t height, int64_t width)
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

  // Loads maps [first, first + kLanes), of which those past `last` are `last` again.
  template <class T>
  Extent load(const MapView& view, int64_t first, int64_t last) {
    const bool transposed = view.width >= view.height;
    const int64_t row_stride = transposed ? view.column_stride : view.row_stride;
    const int64_t column_stride = transposed ? view.row_stride : view.column_stride;
    const T* map[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t i = std::min(first + l, last);
      map[l] = static_cast<const T*>(view.data) + i / view.channels * view.example_stride +
               i % view.channels * view.channel_stride;
    }
    Extent extent;
    for (int64_t c = 0; c < columns_; ++c)
      for (int64_t r = 0; r < rows_; ++r) {
        Lanes element{};
        for (int l = 0; l < kLanes; ++l) element[l] = to_double(map[l][r * row_stride + c * column_stride]);
        column(c)[r] = element;
        extent.largest = larger(magnitude(element), extent.largest);
        extent.finite &= magnitude(element) <= std::numeric_limits<double>::max();
      }
    return extent;
  }

  // Multiplies every map by a power of two if its elements are so extreme that their squares would overflow or
  // vanish, which happens in float64 only, and returns it. The clamp is for the power to have a reciprocal.
  Lanes scale(const Lanes& largest) {
    const Mask extreme = (largest > 1e60) | ((largest < 1e-60) & (largest > 0.0));
    int64_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= extreme[l];
    if (any == 0) return broadcast(1);
    const Lanes in_range = smaller(larger(largest, broadcast(0x1p-1022)), broadcast(0x1p+1022));
    const Mask exponent = Mask{} + (int64_t(0x7ff) << 52);
    const Lanes scale = 1.0 / (Lanes)((Mask)in_range & exponent);
    for (int64_t c = 0; c < columns_; ++c)
      for (int64_t r = 0; r < rows_; ++r) column(c)[r] *= scale;
    return scale;
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

  // Largest singular value of the bidiagonal form, to a relative 2e-6. The largest eigenvalue of B'B lies
  // between its largest diagonal element and twice that, since B'B is tridiagonal and not negative. A bound is
  // above it if all leading minors of bound - B'B are positive. Three bounds at a time hide the latency.
  Lanes largest_singular_value() {
    constexpr int kBounds = 3;
    Lanes* diagonal = v_;
    Lanes* off_squared = x_;
    Lanes largest = broadcast(kNegligible);
    for (int64_t i = 0; i < columns_; ++i) {
      diagonal[i] = diagonal_[i] * diagonal_[i] + above_[i] * above_[i];
      off_squared[i] = i == 0 ? Lanes{} : diagonal_[i - 1] * above_[i];
      largest = larger(diagonal[i], largest);
    }
    for (int64_t i = 0; i < columns_; ++i) {
      diagonal[i] /= largest;
      off_squared[i] /= largest;
      off_squared[i] *= off_squared[i];
    }
    Lanes low = broadcast(1), high = broadcast(2);
    for (int round = 0; round < 9; ++round) {
      Lanes bound[kBounds], minor[kBounds], last[kBounds], least[kBounds];
      for (int b = 0; b < kBounds; ++b) {
        bound[b] = low + (high - low) * ((b + 1.0) / (kBounds + 1));
        minor[b] = least[b] = broadcast(1);
        last[b] = Lanes{};
      }
      for (int64_t i = 0; i < columns_; ++i)
        for (int b = 0; b < kBounds; ++b) {
          const Lanes next = (bound[b] - diagonal[i]) * minor[b] - off_squared[i] * last[b];
          last[b] = minor[b];
          minor[b] = next;
          least[b] = smaller(next, least[b]);
          if (i % 16 == 15) {  // keeps the minors in range
            const Lanes size = larger(magnitude(minor[b]), magnitude(last[b]));
            minor[b] /= size;
            last[b] /= size;
          }
        }
      for (int b = 0; b < kBounds; ++b) {
        const Mask is_above = least[b] > 0.0;
        const Lanes above = is_above ? bound[b] : high, below = is_above ? low : bound[b];
        high = smaller(above, high);
        low = larger(below, low);
      }
    }
    return square_root(high * largest);
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

  static Lanes magnitude(const Lanes& x) { return (Lanes)((Mask)x & std::numeric_limits<int64_t>::max()); }

  static Lanes square_root(const Lanes& x) {
    Lanes root{};
    for (int l = 0; l < kLanes; ++l) root[l] = std::sqrt(x[l]);
    return root;
  }

  static Lanes sum_of_squares(const Lanes* x, int64_t count) {
    Lanes even{}, odd{};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even += x[i] * x[i];
      odd += x[i + 1] * x[i + 1];
    }
    return i < count ? even + odd + x[i] * x[i] : even + odd;
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

template <class Lanes>
inline void rank_maps(const RankArgs& args, int64_t begin, int64_t end) {
  const MapView& view = args.x;
  Maps<Lanes> maps(view.height, view.width);
  const double rounding = std::max(view.height, view.width) * std::numeric_limits<double>::epsilon();
  const double relative = std::max(args.rtol, rounding);
  for (int64_t first = begin; first < end; first += Maps<Lanes>::kLanes) {
    typename Maps<Lanes>::Extent extent;
    with_element_type(view.dtype,
                      [&](auto zero) { extent = maps.template load<decltype(zero)>(view, first, end - 1); });
    const Lanes scale = maps.scale(extent.largest);
    maps.bidiagonalise();
    const Lanes threshold = larger(relative * maps.largest_singular_value(), args.atol * scale);
    const auto count = maps.count_above(threshold);
    for (int l = 0; l < Maps<Lanes>::kLanes && first + l < end; ++l)
      args.ranks[first + l] = extent.finite[l] ? count[l] : -1;
  }
}

// Lanes must be one register of the instruction set at hand: GCC makes very slow code of a wider vector. So
// each instruction set has a function of its own, into which all of the above is inlined.
typedef double TwoLanes __attribute__((vector_size(16)));

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
typedef double FourLanes __attribute__((vector_size(32)));
typedef double EightLanes __attribute__((vector_size(64)));

__attribute__((target("arch=x86-64-v4"), flatten)) void rank_avx512(const RankArgs& args, int64_t begin, int64_t end) {
  rank_maps<EightLanes>(args, begin, end);
}

__attribute__((target("arch=x86-64-v3"), flatten)) void rank_avx2(const RankArgs& args, int64_t begin, int64_t end) {
  rank_maps<FourLanes>(args, begin, end);
}

const auto rank_range = __builtin_cpu_supports("x86-64-v4")   ? rank_avx512
                        : __builtin_cpu_supports("x86-64-v3") ? rank_avx2
                                                              : rank_maps<TwoLanes>;
#else
const auto rank_range = rank_maps<TwoLanes>;
#endif

}  // namespace

void feature_map_rank(const RankArgs& args) {
  constexpr int64_t kGroup = 8;  // a multiple of every vector's length
  const int64_t maps = args.x.examples * args.x.channels;
  const int64_t shorter = std::min(args.x.height, args.x.width);
  if (shorter == 0) {
    std::fill(args.ranks, args.ranks + maps, 0);
    return;
  }
  const int64_t multiply_adds = args.x.height * args.x.width * shorter * kGroup;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / multiply_adds);
  at::parallel_for(0, (maps + kGroup - 1) / kGroup, grain,
                   [&](int64_t begin, int64_t end) { rank_range(args, begin * kGroup, std::min(end * kGroup, maps)); });
}

}  // namespace pcafast::cpu
