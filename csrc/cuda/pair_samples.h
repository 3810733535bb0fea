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
  int64_t groups;        // of channels

  __host__ __device__ int64_t width() const { return channels / groups; }
};

// Lies in device memory. `first` is the offset of the first pixel of the first example, `partner` that of a pixel's
// partner from the pixel; blocks first_block, first_block + 1, ... of the grid multiply it, in so many pieces.
struct Lattice {
  int64_t first, partner, rows, columns, first_block, pieces, symmetric;
};

// Goes through the samples of a lattice, which are numbered along columns, then rows, then examples.
class Cursor {
 public:
  __device__ Cursor(const Samples& x, const Lattice& lattice, int64_t sample, int step)
      : rows_(lattice.rows),
        columns_(lattice.columns),
        next_row_(x.row_stride - columns_ * x.column_stride),
        next_example_(x.example_stride - rows_ * x.row_stride) {
    const int64_t line = sample / columns_, lines = step / columns_;
    column_ = sample - line * columns_;
    row_ = line % rows_;
    offset_ =
        lattice.first + line / rows_ * x.example_stride + row_ * x.row_stride + column_ * x.column_stride;
    step_columns_ = step - lines * columns_;
    step_rows_ = lines % rows_;
    step_offset_ = lines / rows_ * x.example_stride + step_rows_ * x.row_stride + step_columns_ * x.column_stride;
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
  const int64_t rows_, columns_, next_row_, next_example_;
  int64_t offset_, step_offset_;
  int64_t column_, row_, step_columns_, step_rows_;
};

}  // namespace pcafast::cuda
