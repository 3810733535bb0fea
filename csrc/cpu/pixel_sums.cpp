// Lattices overlap, but cut a map into few cells: sets of rows (and of columns) that lie in the same lattices. The map
// is read once, for the sum of each cell; the sum over a lattice is that of its cells.
#include "pixel_sums.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "load.h"
#include "multiarch.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kTogether = 32;  // channels that a thread takes at a time, if they lie side by side

// The cells along one axis.
class Cells {
 public:
  Cells(int64_t size, int64_t step) : size_(size), step_(step) {}

  // A run of pixels that sums are wanted of; the number by which it is known.
  int64_t add(int64_t start, int64_t count) {
    return runs_.try_emplace({start, count}, static_cast<int64_t>(runs_.size())).first->second;
  }

  void cut() {
    std::map<std::vector<bool>, int64_t> cells;
    of_.resize(size_);
    for (int64_t k = 0; k < size_; ++k) {
      std::vector<bool> in(runs_.size());
      for (const auto& [run, number] : runs_) {
        const auto [start, count] = run;
        in[number] = k >= start && (k - start) % step_ == 0 && (k - start) / step_ < count;
      }
      const bool in_any = std::find(in.begin(), in.end(), true) != in.end();
      of_[k] = in_any ? cells.try_emplace(in, static_cast<int64_t>(cells.size())).first->second : -1;
    }
    inside_.resize(runs_.size());
    for (const auto& [in, cell] : cells) {
      for (size_t run = 0; run < in.size(); ++run) {
        if (in[run]) inside_[run].push_back(cell);
      }
    }
    count_ = cells.size();
  }

  int64_t count() const { return count_; }
  // -1 for a pixel in none of the runs.
  int64_t of(int64_t k) const { return of_[k]; }
  const std::vector<int64_t>& inside(int64_t run) const { return inside_[run]; }

 private:
  int64_t size_, step_, count_ = 0;
  std::map<std::pair<int64_t, int64_t>, int64_t> runs_;
  std::vector<int64_t> of_;
  std::vector<std::vector<int64_t>> inside_;
};

// Of the pixels that were read, or, if channels lie side by side, of one channel each.
struct Seen {
  double largest[kTogether] = {};  // |x|
  double squares[kTogether] = {};
};

// Pixels of a row added to the sums of their columns, or channels of a pixel to those of its cell.
template <class T>
inline void add_row(const T* from, int64_t stride, int64_t count, double* sums, Seen& seen) {
  const auto add = [&](int64_t k, int64_t lane, double value) {
    sums[k] += value;
    seen.largest[lane] = std::abs(value) > seen.largest[lane] ? std::abs(value) : seen.largest[lane];
    seen.squares[lane] += value * value;
  };
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t lanes = std::min(kTogether, count - first);
    if (stride == 1 && lanes == kTogether) {
      for (int64_t lane = 0; lane < kTogether; ++lane) add(first + lane, lane, to_double(from[first + lane]));
    } else if (stride == 1) {
      for (int64_t lane = 0; lane < lanes; ++lane) add(first + lane, lane, to_double(from[first + lane]));
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane) add(first + lane, lane, to_double(from[(first + lane) * stride]));
    }
  }
}

// Columns of the map that are some lattice's and no zeros, and lie at one distance in the input.
struct Stretch {
  int64_t first, source, step, count;  // `first` is counted among all such columns
};

struct Reader {
  const PatchCovarianceArgs& args;
  const Cells &rows, &columns;
  double* sums;  // (channels, row cells, column cells)
  std::vector<int64_t> column_cells;
  std::vector<Stretch> stretches;

  Reader(const PatchCovarianceArgs& args, const Cells& rows, const Cells& columns, double* sums)
      : args(args), rows(rows), columns(columns), sums(sums) {
    for (int64_t column = 0; column < args.width; ++column) {
      const int64_t source = args.source_columns[column], number = column_cells.size();
      if (columns.of(column) < 0 || source < 0) continue;
      column_cells.push_back(columns.of(column));
      if (!stretches.empty()) {
        Stretch& last = stretches.back();
        if (last.count == 1) last.step = source - last.source;
        if (source == last.source + last.count * last.step) {
          ++last.count;
          continue;
        }
      }
      stretches.push_back({number, source, 1, 1});
    }
  }

  int64_t cells() const { return rows.count() * columns.count(); }

  // Calls use(first element of the row in channel 0, its cell) for all rows that are some lattice's and no zeros.
  template <class T, class Use>
  void for_each_row(Use&& use) const {
    const MapView& x = args.x;
    for (int64_t n = 0; n < x.examples; ++n) {
      for (int64_t y = 0; y < args.height; ++y) {
        if (rows.of(y) < 0 || args.source_rows[y] < 0) continue;
        use(static_cast<const T*>(x.data) + n * x.example_stride + args.source_rows[y] * x.row_stride, rows.of(y));
      }
    }
  }
};

template <class T>
PCAFAST_MULTIARCH Seen read_channel(const Reader& reader, int64_t channel) {
  const MapView& x = reader.args.x;
  const int64_t width = reader.column_cells.size(), column_cells = reader.columns.count();
  std::vector<double> by_column(reader.rows.count() * width);
  Seen seen;
  reader.for_each_row<T>([&](const T* row, int64_t cell) {
    for (const Stretch& stretch : reader.stretches) {
      add_row(row + channel * x.channel_stride + stretch.source * x.column_stride, stretch.step * x.column_stride,
              stretch.count, by_column.data() + cell * width + stretch.first, seen);
    }
  });
  double* const to = reader.sums + channel * reader.cells();
  for (int64_t cell = 0; cell < reader.rows.count(); ++cell) {
    for (int64_t k = 0; k < width; ++k) {
      to[cell * column_cells + reader.column_cells[k]] += by_column[cell * width + k];
    }
  }
  return seen;
}

template <class T>
PCAFAST_MULTIARCH Seen read_neighbours(const Reader& reader, int64_t first, int64_t count) {
  const MapView& x = reader.args.x;
  std::vector<double> by_cell(reader.cells() * kTogether);
  Seen seen;
  reader.for_each_row<T>([&](const T* row, int64_t cell) {
    for (const Stretch& stretch : reader.stretches) {
      for (int64_t k = 0; k < stretch.count; ++k) {
        const int64_t of_both = cell * reader.columns.count() + reader.column_cells[stretch.first + k];
        add_row(row + (stretch.source + k * stretch.step) * x.column_stride + first, 1, count,
                by_cell.data() + of_both * kTogether, seen);
      }
    }
  });
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t cell = 0; cell < reader.cells(); ++cell) {
      reader.sums[(first + c) * reader.cells() + cell] = by_cell[cell * kTogether + c];
    }
  }
  return seen;
}

}  // namespace

PixelSums sum_pixels(const PatchCovarianceArgs& args) {
  const int64_t channels = args.x.channels, entries = channels * args.taps;
  Cells rows(args.height, args.row_step), columns(args.width, args.column_step);
  // Of all first pixels, then of all partners; lattice by lattice and tap by tap.
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (const int64_t partner : {0, 1}) {
    for (int64_t k = 0; k < args.lattices; ++k) {
      const PixelPairs& pairs = args.pairs[k];
      for (int64_t t = 0; t < args.taps; ++t) {
        wanted.emplace_back(
            rows.add(pairs.top + partner * pairs.down + args.tap_offsets[2 * t], pairs.rows),
            columns.add(pairs.left + partner * pairs.right + args.tap_offsets[2 * t + 1], pairs.columns));
      }
    }
  }
  rows.cut();
  columns.cut();

  std::vector<double> cells(channels * rows.count() * columns.count());
  const Reader reader(args, rows, columns, cells.data());
  const bool neighbours = args.x.channel_stride == 1 && args.x.column_stride != 1;
  const int64_t together = neighbours ? kTogether : 1, blocks = (channels + together - 1) / together;
  std::vector<Seen> seen(blocks);
  with_element_type(args.x.dtype, [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        seen[b] = neighbours ? read_neighbours<T>(reader, b * together, std::min(together, channels - b * together))
                             : read_channel<T>(reader, b);
      }
    });
  });

  PixelSums sums;
  sums.squares.resize(channels);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t lane = 0; lane < kTogether; ++lane) {
      sums.largest = std::max(sums.largest, seen[b].largest[lane]);
      const int64_t channel = neighbours ? b * together + lane : b;
      if (channel < channels) sums.squares[channel] += seen[b].squares[lane];
    }
  }
  sums.finite = std::all_of(cells.begin(), cells.end(), [](double sum) { return std::isfinite(sum); });
  const auto collect = [&](int64_t begin, std::vector<double>& to) {
    to.resize(args.lattices * entries);
    for (int64_t k = 0; k < args.lattices; ++k) {
      for (int64_t t = 0; t < args.taps; ++t) {
        const auto [row_run, column_run] = wanted[begin + k * args.taps + t];
        for (int64_t c = 0; c < channels; ++c) {
          double sum = 0;
          for (const int64_t row : rows.inside(row_run)) {
            for (const int64_t column : columns.inside(column_run)) {
              sum += cells[(c * rows.count() + row) * columns.count() + column];
            }
          }
          to[k * entries + c * args.taps + t] = sum;
        }
      }
    }
  };
  collect(0, sums.first);
  collect(args.lattices * args.taps, sums.partner);
  return sums;
}

}  // namespace pcafast::cpu
