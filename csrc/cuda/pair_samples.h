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
  bool padded;           // whether the elements after the last channel may be read, up to the next pixel
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

// Where a sample of a lattice is. They are numbered along columns, then rows, then examples.
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

// Where a block's next samples are: the same for all threads, which keep it in shared memory.
struct alignas(16) Step {
  int64_t columns, offset;         // of the lattice; from a sample to the one `samples` further on
  int64_t next_row, next_example;  // added to the offset at the end of a row, and of an example
  int64_t partner;                 // from a sample of the left tile to its partner of the right one
  int rows, column_step, row_step;

  __device__ Step(const Samples& x, const Lattice& lattice, int samples, int64_t partner)
      : columns(lattice.columns),
        next_row(x.row_stride - lattice.columns * x.column_stride),
        next_example(x.example_stride - lattice.rows * x.row_stride),
        partner(partner),
        rows(lattice.rows) {
    const Place apart(lattice, samples);
    offset = apart.offset(x);
    column_step = apart.column;
    row_step = apart.row;
  }
};

// Goes through the samples of a lattice.
class Cursor {
 public:
  __device__ Cursor(const Samples& x, const Lattice& lattice, int64_t sample, int64_t channel) {
    const Place start(lattice, sample);
    column_ = start.column;
    row_ = start.row;
    offset_ = lattice.first + start.offset(x) + channel * x.channel_stride;
  }

  __device__ int64_t offset() const { return offset_; }

  __device__ void advance(const Step& step) {
    column_ += step.column_step;
    row_ += step.row_step;
    offset_ += step.offset;
    if (column_ >= step.columns) {
      column_ -= step.columns;
      ++row_;
      offset_ += step.next_row;
    }
    if (row_ >= step.rows) {
      row_ -= step.rows;
      offset_ += step.next_example;
    }
  }

 private:
  int64_t column_, offset_;  // positions of an example may be more than an int holds
  int row_;
};

}  // namespace pcafast::cuda
