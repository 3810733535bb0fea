// Where the pixels of a patch covariance lie in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels.h"

namespace pcafast::cpu {

// Offsets of rows or columns from the first element of a map, -1 for zeros.
struct Line {
  std::vector<int64_t> offsets;
  int64_t step = 0;  // between neighbours, if all lie at one
  bool even = true;

  Line(const int64_t* source, int64_t begin, int64_t count, int64_t every, int64_t stride) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t from = source[begin + k * every];
      offsets.push_back(from < 0 ? -1 : from * stride);
    }
    step = count > 1 ? offsets[1] - offsets[0] : stride;
    for (int64_t k = 0; k < count; ++k) even &= offsets[k] >= 0 && offsets[k] == offsets[0] + k * step;
  }
};

// The pixels to pack: the whole map, or, if there is but one lattice of pixels that are their own partners, that
// lattice alone, which then is a map without gaps. Entry c * taps + t of a pixel is channel c at its tap t.
struct PixelGrid {
  MapView x;
  int64_t rows, columns, row_step, column_step;  // steps of the lattices on this grid
  std::vector<PixelPairs> lattices;
  int64_t taps;
  std::vector<Line> row_lines, column_lines;  // one for each tap

  explicit PixelGrid(const PatchCovarianceArgs& args)
      : x(args.x),
        rows(args.height),
        columns(args.width),
        row_step(args.row_step),
        column_step(args.column_step),
        lattices(args.pairs, args.pairs + args.lattices),
        taps(args.taps) {
    int64_t top = 0, left = 0, down = 1, across = 1;
    if (lattices.size() == 1 && lattices[0].down == 0 && lattices[0].right == 0) {
      PixelPairs& all = lattices[0];
      top = all.top, left = all.left, down = row_step, across = column_step;
      rows = all.rows, columns = all.columns, row_step = column_step = 1;
      all.top = all.left = 0;
    }
    for (int64_t t = 0; t < taps; ++t) {
      row_lines.emplace_back(args.source_rows, top + args.tap_offsets[2 * t], rows, down, x.row_stride);
      column_lines.emplace_back(args.source_columns, left + args.tap_offsets[2 * t + 1], columns, across,
                                x.column_stride);
    }
  }

  int64_t pixels() const { return rows * columns; }
};

}  // namespace pcafast::cpu
