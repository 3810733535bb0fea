// A band of pixels, centred and packed for the products of pairs of them.
//
// Channels are in blocks of one vector each: packed(block)[pixel] has one pixel of kLanes channels, so a pixel's
// partner is at a fixed distance.
#pragma once

#include <algorithm>
#include <memory>

#include "pixel_grid.h"
#include "tile.h"
#include "vectors.h"

namespace pcafast::cpu {

// Of `examples` maps from `example` on: the pixels to pack, and those of them (from the same row on) that are its own.
struct Band {
  int64_t example, examples;
  int64_t row, rows, column, columns;
  int64_t own_rows, own_column, own_columns;
};

template <class Vector>
class PixelPanel : Lanes<Vector> {
 public:
  using typename Lanes<Vector>::Work;
  using Lanes<Vector>::kLanes, Lanes<Vector>::kRows, Lanes<Vector>::element, Lanes<Vector>::load;

  PixelPanel(int64_t most_channels, int64_t most_pixels)
      : capacity_(most_pixels),
        packed_(new Vector[(most_channels + kLanes - 1) / kLanes * most_pixels]()),
        centre_(new Work[(most_channels + kLanes - 1) / kLanes * kLanes]()) {}

  int64_t blocks() const { return (entries_ + kLanes - 1) / kLanes; }
  int64_t entries() const { return entries_; }

  // Packs `entries` channels (of taps) from `first` on as (x - centre) * unit.
  template <class T>
  void pack(const PixelGrid& grid, const Band& band, int64_t first, int64_t entries, const double* centre,
            double unit) {
    const MapView& x = grid.x;
    if (entries != entries_)
      std::fill(packed_.get(), packed_.get() + (entries + kLanes - 1) / kLanes * capacity_, Vector{});
    entries_ = entries;
    pixels_ = 0;
    unit_ = static_cast<Work>(unit);
    std::copy(centre + first, centre + first + entries, centre_.get());
    const Line &rows = grid.row_lines[0], &columns = grid.column_lines[0];
    const bool even = grid.taps == 1 && columns.even;
    const bool whole = even && rows.even && (rows.step == band.columns * columns.step || band.rows == 1);
    if (even && grid.pixels() == 1) {  // examples are as good as pixels
      const T* const first_map = static_cast<const T*>(x.data) + band.example * x.example_stride;
      const int64_t begin = rows.offsets[0] + columns.offsets[0];
      if (begin >= 0) {
        pack_run(first_map + first * x.channel_stride + begin, x.channel_stride, x.example_stride, band.examples);
        return;
      }
    }
    for (int64_t n = band.example; n < band.example + band.examples; ++n) {
      const T* const map = static_cast<const T*>(x.data) + n * x.example_stride;
      if (whole) {
        const int64_t begin = rows.offsets[band.row] + columns.offsets[band.column];
        pack_run(map + first * x.channel_stride + begin, x.channel_stride, columns.step, band.rows * band.columns);
        continue;
      }
      for (int64_t row = band.row; row < band.row + band.rows; ++row) {
        if (even && rows.offsets[row] >= 0) {
          const int64_t begin = rows.offsets[row] + columns.offsets[band.column];
          pack_run(map + first * x.channel_stride + begin, x.channel_stride, columns.step, band.columns);
        } else {
          look_up(grid, band, map, first, row);
        }
      }
    }
  }

  // Adds the products of this panel's channels at the first pixels and `partners`' at theirs to out[i * stride + j],
  // for the pairs of `runs`, which are at most a few hundred; j from i on alone, if `symmetric`, and some before it.
  // `out` is padded to whole tiles.
  void multiply(const PixelPanel& partners, const Run* begin, const Run* end, int64_t step, bool symmetric, double* out,
                int64_t stride) const {
    const int64_t blocks = partners.blocks();
    for (int64_t block = 0; block < blocks;) {
      // Four are two and two: a single one leaves units idle.
      const int64_t vectors = blocks - block == 4 ? 2 : std::min<int64_t>(3, blocks - block);
      const int64_t rows = symmetric ? std::min((block + vectors) * kLanes, entries_) : entries_;
      for (int64_t row = 0; row < rows; row += kRows) {
        double* const to = out + row * stride + block * kLanes;
        if (vectors == 3) add_tile<kRows, 3>(partners, row, block, begin, end, step, to, stride);
        if (vectors == 2) add_tile<kRows, 2>(partners, row, block, begin, end, step, to, stride);
        if (vectors == 1) {
          entries_ - row <= kRows / 2 ? add_tile<kRows / 2, 1>(partners, row, block, begin, end, step, to, stride)
                                      : add_tile<kRows, 1>(partners, row, block, begin, end, step, to, stride);
        }
      }
      block += vectors;
    }
  }

  // Adds the products of every channel with itself to out[i].
  void multiply_own(const Run* begin, const Run* end, int64_t step, double* out) const {
    for (int64_t block = 0; block < blocks(); block += 4) {
      if (block + 4 <= blocks()) {
        add_own<4>(block, begin, end, step, out);
      } else {
        for (int64_t one = block; one < blocks(); ++one) add_own<1>(one, begin, end, step, out);
      }
    }
  }

 private:
  Vector* packed(int64_t block) const { return packed_.get() + block * capacity_; }

  // `count` pixels that lie at one stride.
  template <class T>
  void pack_run(const T* data, int64_t channel_stride, int64_t stride, int64_t count) {
    const int64_t whole_blocks = entries_ / kLanes;
    int64_t i = 0;
    if (channel_stride == 1) {
      for (int64_t b = 0; b < whole_blocks; ++b) {
        const Vector centre = load(centre_.get() + b * kLanes);
        Vector* const to = packed(b) + pixels_;
        for (int64_t k = 0; k < count; ++k) to[k] = (load(data + k * stride + b * kLanes) - centre) * unit_;
      }
      i = count;
    } else if (stride == 1) {
      i = count / kLanes * kLanes;
      for (int64_t b = 0; b < whole_blocks; ++b) {
        for (int64_t k = 0; k < i; k += kLanes) pack_tile(data + k, channel_stride, b, packed(b) + pixels_ + k);
      }
    }
    pack_elements(data, channel_stride, stride, 0, whole_blocks * kLanes, i, count);
    pack_elements(data, channel_stride, stride, whole_blocks * kLanes, entries_, 0, count);
    pixels_ += count;
  }

  template <class T>
  void pack_elements(const T* data, int64_t channel_stride, int64_t stride, int64_t first_channel, int64_t last_channel,
                     int64_t first, int64_t last) {
    for (int64_t c = first_channel; c < last_channel; ++c) {
      Work* const to = (Work*)(packed(c / kLanes) + pixels_) + c % kLanes;
      const T* const from = data + c * channel_stride;
      const Work centre = centre_[c];
      for (int64_t i = first; i < last; ++i) to[i * kLanes] = (element(from[i * stride]) - centre) * unit_;
    }
  }

  // kLanes channels of kLanes pixels that lie side by side.
  template <class T>
  void pack_tile(const T* data, int64_t channel_stride, int64_t block, Vector* to) {
    Vector tile[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t c = block * kLanes + l;
      tile[l] = (load(data + c * channel_stride) - centre_[c]) * unit_;
    }
    this->transpose(tile);
    std::copy(tile, tile + kLanes, to);
  }

  // A row of which pixels lie anywhere.
  template <class T>
  void look_up(const PixelGrid& grid, const Band& band, const T* map, int64_t first, int64_t row) {
    for (int64_t e = 0; e < entries_; ++e) {
      const int64_t channel = (first + e) / grid.taps, tap = (first + e) % grid.taps;
      const int64_t row_offset = grid.row_lines[tap].offsets[row];
      const int64_t* const offsets = grid.column_lines[tap].offsets.data() + band.column;
      const T* const from = map + channel * grid.x.channel_stride + row_offset;
      Work* const to = (Work*)(packed(e / kLanes) + pixels_) + e % kLanes;
      const Work centre = centre_[e];
      for (int64_t k = 0; k < band.columns; ++k) {
        const bool is_zero = row_offset < 0 || offsets[k] < 0;
        to[k * kLanes] = ((is_zero ? Work(0) : element(from[offsets[k]])) - centre) * unit_;
      }
    }
    pixels_ += band.columns;
  }

  template <int kVectors>
  void add_own(int64_t block, const Run* begin, const Run* end, int64_t step, double* out) const {
    Vector sum[kVectors] = {};
    for (const Run* run = begin; run < end; ++run) {
      const Vector *first = packed(block) + run->first, *partner = packed(block) + run->partner;
      for (int64_t i = 0; i < run->length * step; i += step) {
        for (int v = 0; v < kVectors; ++v) sum[v] += first[v * capacity_ + i] * partner[v * capacity_ + i];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int l = 0; l < kLanes; ++l) out[(block + v) * kLanes + l] += sum[v][l];
    }
  }

  template <int kCount, int kVectors>
  void add_tile(const PixelPanel& partners, int64_t row, int64_t block, const Run* begin, const Run* end, int64_t step,
                double* out, int64_t stride) const {
    Tiles<Vector>::template add<Vector, kCount, kVectors>(
        {(const Work*)packed(row / kLanes) + row % kLanes, partners.packed(block), capacity_, begin, end, step},
        {out, stride, kCount, kVectors * kLanes, 1});
  }

  int64_t capacity_, entries_ = 0, pixels_ = 0;
  std::unique_ptr<Vector[]> packed_;
  std::unique_ptr<Work[]> centre_;
  Work unit_ = 1;
};

}  // namespace pcafast::cpu
