// Sums of products over lattices of pixels and their partners, for one pair of blocks of channels at a time.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "pixel_panel.h"

namespace pcafast::cpu {

// Of channels (times taps) that a task takes together.
constexpr int64_t kBlock = 96;
constexpr int64_t kTile = kBlock * kBlock;

struct PixelWork {
  PixelGrid grid;
  const double* centre;  // (channels * taps,)
  double unit;
  int64_t width;  // channels * taps of a group
  bool own;       // groups are single channels: products of a channel with itself alone
};

// Two blocks of channels, perhaps the same, and the lattices over which their products are wanted.
struct PixelTask {
  int64_t begin_i, end_i, begin_j, end_j;
  std::vector<int64_t> lattices;
  bool is_diagonal() const { return begin_i == begin_j; }
};

// Bands that fit a panel. Pixels beyond a band's own, where partners of those lie, are packed with it.
class Bands {
 public:
  explicit Bands(const PixelGrid& grid) : grid_(grid) {
    for (const PixelPairs& pairs : grid.lattices) {
      below_ = std::max(below_, pairs.down);
      left_ = std::max(left_, -pairs.right);
      right_ = std::max(right_, pairs.right);
    }
    rows_ = grid.rows;
    columns_ = grid.columns;
    if (grid.pixels() <= kPixels) {
      examples_ = std::min(kPixels / grid.pixels(), grid.x.examples);
    } else if (grid.columns * (2 * below_ + 1) <= 2 * kPixels) {
      rows_ = std::min(std::max(kPixels / grid.columns - below_, below_ + 1), grid.rows);
    } else {  // long rows are cut as well
      rows_ = std::min(below_ + 1, grid.rows);
      columns_ = std::min(std::max(kPixels / (rows_ + below_) - left_ - right_, left_ + right_ + 1), grid.columns);
    }
  }

  int64_t most_pixels() const {
    return examples_ * std::min(rows_ + below_, grid_.rows) * std::min(left_ + columns_ + right_, grid_.columns);
  }

  template <class Use>
  void for_each(Use&& use) const {
    for (int64_t n = 0; n < grid_.x.examples; n += examples_) {
      for (int64_t row = 0; row < grid_.rows; row += rows_) {
        for (int64_t column = 0; column < grid_.columns; column += columns_) {
          Band band;
          band.example = n;
          band.examples = std::min(examples_, grid_.x.examples - n);
          band.row = row;
          band.own_rows = std::min(rows_, grid_.rows - row);
          band.rows = std::min(band.own_rows + below_, grid_.rows - row);
          band.own_column = column;
          band.own_columns = std::min(columns_, grid_.columns - column);
          band.column = std::max<int64_t>(column - left_, 0);
          band.columns = std::min(column + band.own_columns + right_, grid_.columns) - band.column;
          use(band);
        }
      }
    }
  }

 private:
  static constexpr int64_t kPixels = 2048;

  const PixelGrid& grid_;
  int64_t rows_, columns_, examples_ = 1;
  int64_t below_ = 0, left_ = 0, right_ = 0;  // how far away partners lie
};

// The pixels of a lattice in a band, in batches of a few hundred: as many products are added up in float32.
class Runs {
 public:
  void find(const PixelGrid& grid, const PixelPairs& pairs, const Band& band) {
    runs_.clear();
    batches_.assign(1, 0);
    in_batch_ = 0;
    const auto [begin, end] = inside(band.row, band.own_rows, pairs.top, pairs.rows, grid.row_step);
    const auto [left, right] = inside(band.own_column, band.own_columns, pairs.left, pairs.columns, grid.column_step);
    if (begin >= end || left >= right) return;
    const int64_t distance = pairs.down * band.columns + pairs.right, length = right - left;
    // Rows without gaps are one run.
    const bool dense = length == band.columns && grid.row_step == 1 && grid.column_step == 1;
    if (dense && end - begin == band.rows) {  // and so are whole maps
      add(0, distance, band.examples * band.rows * band.columns, 1);
      return close();
    }
    for (int64_t n = 0; n < band.examples; ++n) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = n * band.rows + pairs.top + k * grid.row_step - band.row;
        const int64_t first = row * band.columns + pairs.left + left * grid.column_step - band.column;
        add(first, distance, dense ? (end - begin) * length : length, grid.column_step);
        if (dense) break;
      }
    }
    close();
  }

  template <class Use>
  void for_each_batch(Use&& use) const {
    for (size_t k = 0; k + 1 < batches_.size(); ++k) use(runs_.data() + batches_[k], runs_.data() + batches_[k + 1]);
  }

 private:
  static constexpr int64_t kTogether = 256;

  // Which of `count` pixels from `first` on, `step` apart, lie among `size` of them from `start` on.
  static std::pair<int64_t, int64_t> inside(int64_t start, int64_t size, int64_t first, int64_t count, int64_t step) {
    const int64_t begin = std::max<int64_t>(0, (start - first + step - 1) / step), last = start + size - 1 - first;
    return {begin, last < 0 ? 0 : std::min(count, last / step + 1)};
  }

  void close() {
    if (batches_.back() < static_cast<int64_t>(runs_.size())) batches_.push_back(runs_.size());
  }

  void add(int64_t first, int64_t distance, int64_t length, int64_t step) {
    while (length > 0) {
      const int64_t part = std::min(length, kTogether - in_batch_);
      runs_.push_back({first, first + distance, part});
      first += part * step;
      length -= part;
      in_batch_ += part;
      if (in_batch_ == kTogether) {
        batches_.push_back(runs_.size());
        in_batch_ = 0;
      }
    }
  }

  std::vector<Run> runs_;
  std::vector<int64_t> batches_;
  int64_t in_batch_ = 0;
};

// Adds to products[(k * 2 + direction) * kTile + i * kBlock + j], for the k-th lattice of the task: direction 0 has
// channels i at the first pixels and j at their partners, direction 1 (where blocks and pixels differ) j and i, as
// [j * kBlock + i]. On the diagonal of a lattice whose pixels are their own partners only j >= i counts. Products of
// channels with themselves lie at [i].
template <class Vector, class T>
void add_products(const PixelWork& work, const PixelTask& task, double* products) {
  const PixelGrid& grid = work.grid;
  const Bands bands(grid);
  PixelPanel<Vector> left(kBlock, bands.most_pixels()), other(task.is_diagonal() ? 0 : kBlock, bands.most_pixels());
  const PixelPanel<Vector>& right = task.is_diagonal() ? left : other;
  Runs runs;
  bands.for_each([&](const Band& band) {
    left.template pack<T>(grid, band, task.begin_i, task.end_i - task.begin_i, work.centre, work.unit);
    if (!task.is_diagonal()) {
      other.template pack<T>(grid, band, task.begin_j, task.end_j - task.begin_j, work.centre, work.unit);
    }
    for (size_t k = 0; k < task.lattices.size(); ++k) {
      const PixelPairs& pairs = grid.lattices[task.lattices[k]];
      const bool same_pixel = pairs.down == 0 && pairs.right == 0;
      double* const out = products + 2 * k * kTile;
      runs.find(grid, pairs, band);
      runs.for_each_batch([&](const Run* begin, const Run* end) {
        if (work.own) {
          left.multiply_own(begin, end, grid.column_step, out);
          return;
        }
        left.multiply(right, begin, end, grid.column_step, same_pixel && task.is_diagonal(), out, kBlock);
        if (!same_pixel && !task.is_diagonal()) {
          right.multiply(left, begin, end, grid.column_step, false, out + kTile, kBlock);
        }
      });
    }
  });
}

}  // namespace pcafast::cpu
