// Which samples are multiplied: those of some lattices of pixels, each with a partner at a fixed distance. The samples
// of a batch as a whole are a lattice too, each its own partner.
#pragma once

#include "../kernels.h"
#include "device.h"

namespace pcafast::cuda {

// Strides are those from pixel to pixel of a lattice.
struct Samples {
  const void* data;
  Dtype dtype;
  int64_t examples, channels;
  int64_t example_stride, channel_stride, row_stride, column_stride;
  const double* weight;  // of sample i, or null
  int64_t groups;        // of channels, which are multiplied with those of their own group alone
};

// x / y for 0 <= x < 2^53 and the reciprocal of y to rounding; a division of 64-bit integers would be a function call.
__device__ inline int64_t quotient(int64_t x, int64_t y, double reciprocal) {
  const int64_t guess = static_cast<int64_t>(x * reciprocal), rest = x - guess * y;
  return rest < 0 ? guess - 1 : rest >= y ? guess + 1 : guess;
}

// Lies in device memory. `first` is the offset of the first pixel of the first example, `partner` that of a pixel's
// partner from the pixel.
struct Lattice {
  int64_t first, partner, rows, columns;
  int64_t symmetric;      // whether pixels are their own partners
  int64_t first_block;    // of the grid, from this one on
  int64_t pieces, piece;  // how many the samples are cut into, and how many samples each of them has
  double inverse_rows, inverse_columns;
};

// Goes through the samples of a lattice, which are numbered along columns, then rows, then examples.
class Cursor {
 public:
  __device__ Cursor(const Samples& x, const Lattice& lattice, int64_t sample, int step)
      : columns_(lattice.columns),
        next_row_(x.row_stride - lattice.columns * x.column_stride),
        next_example_(x.example_stride - lattice.rows * x.row_stride),
        rows_(lattice.rows) {
    const Place start(lattice, sample), apart(lattice, step);
    column_ = start.column;
    row_ = start.row;
    offset_ = lattice.first + start.offset(x);
    step_columns_ = apart.column;
    step_rows_ = apart.row;
    step_offset_ = apart.offset(x);
  }

  __device__ int64_t offset() const { return offset_; }

  __device__ void advance() {
    column_ += step_columns_;
    row_ += step_rows_;
    offset_ += step_offset_;
    if (column_ >= columns_) {
      column_ -= columns_;
      ++row_;
      offset_ += next_row_;
    }
    if (row_ >= rows_) {
      row_ -= rows_;
      offset_ += next_example_;
    }
  }

 private:
  struct Place {
    int64_t example, column;
    int row;

    __device__ Place(const Lattice& lattice, int64_t sample) {
      const int64_t line = quotient(sample, lattice.columns, lattice.inverse_columns);
      example = quotient(line, lattice.rows, lattice.inverse_rows);
      row = line - example * lattice.rows;
      column = sample - line * lattice.columns;
    }
    __device__ int64_t offset(const Samples& x) const {
      return example * x.example_stride + row * x.row_stride + column * x.column_stride;
    }
  };

  const int64_t columns_, next_row_, next_example_;  // positions of an example may be more than an int holds
  int64_t column_, offset_, step_offset_;
  const int rows_;
  int row_, step_columns_, step_rows_;
};

}  // namespace pcafast::cuda
