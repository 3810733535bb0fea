// Covariance of channels on the CPU: centre, pack, and add up the products of channel pairs on and above the
// diagonal, as for a symmetric rank-k update (see DESIGN, "Covariance").
//
// A batch of a moderate number of channels is read once: the products of x - shift are summed in the input's precision
// over a few hundred samples and in float64 from there. The shift is the mean of a few samples; if it turns out to be
// far from the mean of all, the batch is read again. It is then merged into the running state by the pairwise formula
// of Chan, Golub and LeVeque (1979).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

#include "../kernels.h"
#include "any_panel.h"
#include "centre.h"
#include "load.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kTaskRows = 64;  // rows of products that a thread takes at a time
// Up to as many channels, every slice of the batch has a co-moment of its own.
constexpr int64_t kMostPrivate = 512;
constexpr int64_t kSliceWork = 1 << 18;  // products that are worth a thread

// Of the samples of one group of channels, about a shift: their sums (channels,), times their weights, and the sums of
// their products (channels, channels), of which the upper triangle counts.
struct Batch {
  std::vector<double> sums, products;
};

// Of the samples about the shift, multiplied in units of 1 / `unit`. The samples are split over the threads, each with
// sums of its own, added up in order.
Batch add_up(const Samples& s, int64_t first_channel, int64_t channels, const double* shift, double unit,
             int64_t slices) {
  const int64_t square = channels * channels, most = most_samples(channels), panels = (s.size() + most - 1) / most;
  Batch batch{std::vector<double>(slices * channels), std::vector<double>(slices * square)};
  at::parallel_for(0, slices, 1, [&](int64_t slice_begin, int64_t slice_end) {
    const std::unique_ptr<AnyPanel> panel = panel_for(s.x.dtype, channels);
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      for (int64_t k = slice * panels / slices; k < (slice + 1) * panels / slices; ++k) {
        panel->pack(s, k * most, std::min((k + 1) * most, s.size()), first_channel, shift, unit);
        panel->add_sums(batch.sums.data() + slice * channels);
        panel->multiply(0, channels, 1, batch.products.data() + slice * square);
      }
    }
  });
  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t k = 0; k < channels; ++k) batch.sums[k] += batch.sums[slice * channels + k];
    for (int64_t k = 0; k < square; ++k) batch.products[k] += batch.products[slice * square + k];
  }
  batch.sums.resize(channels);
  batch.products.resize(square);
  return batch;
}

// Adds the products of the samples about the shift, times `factor`, to the upper triangle of `products`. The threads
// share the packed panel and split its rows.
void add_up_in_place(const Samples& s, int64_t first_channel, int64_t channels, const double* shift, double unit,
                     double factor, double* products) {
  const std::unique_ptr<AnyPanel> panel = panel_for(s.x.dtype, channels);
  const int64_t most = most_samples(channels), blocks = (channels + kTaskRows - 1) / kTaskRows;
  for (int64_t begin = 0; begin < s.size(); begin += most) {
    panel->pack(s, begin, std::min(begin + most, s.size()), first_channel, shift, unit);
    // Blocks of rows, of which the upper are longer: every task has one from above and one from below.
    at::parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        for (const int64_t block : std::set<int64_t>{task, blocks - 1 - task}) {
          panel->multiply(block * kTaskRows, std::min((block + 1) * kTaskRows, channels), factor, products);
        }
      }
    });
  }
}

double largest_deviation(const Samples& s, int64_t first_channel, int64_t channels, const double* shift) {
  double largest = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(s.x.data) + first_channel * s.x.channel_stride;
    for_each_run(s.x, 0, s.size(), [&](int64_t offset, int64_t first, int64_t length) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < length; ++i) {
          if (s.weight != nullptr && s.weight[first + i] == 0) continue;
          const double x = to_double(data[offset + c * s.x.channel_stride + i * s.x.position_stride]);
          largest = std::max(largest, std::abs(x - shift[first_channel + c]));
        }
      }
    });
  });
  return largest;
}

// Of the samples as they are. Squares of very large or small float32 are no float32: then they are added up again, in
// units of a power of two.
Batch add_up_in_range(const Samples& s, int64_t first_channel, int64_t channels, const double* shift, int64_t slices) {
  constexpr double kSmallest = 1e-20, kLargest = 1e30;
  Batch batch = add_up(s, first_channel, channels, shift, 1, slices);
  double largest = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double square = batch.products[c * (channels + 1)];
    largest = std::isfinite(square) ? std::max(largest, square) : kLargest;
  }
  if (largest > kSmallest && largest < kLargest) return batch;
  const double deviation = largest_deviation(s, first_channel, channels, shift);
  if (deviation == 0) return batch;
  const double unit = std::exp2(std::clamp(-std::ilogb(deviation), -126, 126));
  batch = add_up(s, first_channel, channels, shift, unit, slices);
  for (double& sum : batch.sums) sum /= unit;
  for (double& sum : batch.products) sum /= unit * unit;
  return batch;
}

// Whether the mean lies within a standard deviation of the shift in every channel, so that little cancels.
bool is_centred(const Batch& batch, double weight) {
  const int64_t channels = batch.sums.size();
  for (int64_t c = 0; c < channels; ++c) {
    if (batch.sums[c] * (batch.sums[c] / weight) > 0.5 * batch.products[c * (channels + 1)]) return false;
  }
  return true;
}

// Near the mean: of a few runs of samples, weighted or not.
std::vector<double> rough_centre(const Samples& s) {
  constexpr int64_t kRuns = 16, kMostInRun = 64, kShare = 8;
  const int64_t channels = s.x.channels, runs = std::min(kRuns, s.size());
  const int64_t in_run = std::clamp<int64_t>(s.size() / kRuns / kShare, 1, kMostInRun);
  std::vector<double> sums(channels, 0.0), squares(channels, 0.0);
  double taken = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(s.x.data);
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t begin = run * s.size() / runs;
      for_each_run(s.x, begin, std::min(begin + in_run, s.size()), [&](int64_t offset, int64_t first, int64_t length) {
        for (int64_t i = 0; i < length; ++i) {
          if (s.weight != nullptr && s.weight[first + i] == 0) continue;
          const auto* const sample = data + offset + i * s.x.position_stride;
          for (int64_t c = 0; c < channels; ++c) {
            const double value = to_double(sample[c * s.x.channel_stride]);
            sums[c] += value;
            squares[c] += value * value;
          }
          ++taken;
        }
      });
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = taken > 0 && std::isfinite(sums[c]) ? sums[c] / taken : 0;
    sums[c] = centre_near(mean, taken > 0 ? squares[c] / taken - mean * mean : 0, s.x.dtype);
  }
  return sums;
}

// The batch's mean and the weight of its samples, and where that mean is from the shift that it was centred on.
struct Means {
  double added;
  std::vector<double> mean, from_shift;
};

// Merges a batch into a running co-moment and mirrors it. With `products` given, those of the batch about the shift;
// else they have been added to the upper triangle already.
void merge(const CovarianceArgs& args, const Means& batch, int64_t group, const double* products) {
  constexpr int64_t kBlock = 64;  // of rows and columns that stay in cache
  const int64_t size = args.x.channels / args.groups, first = group * size;
  const double square = args.scale * args.scale, weight = *args.count * batch.added / (*args.count + batch.added);
  double* const comoment = args.comoment + group * size * size;
  std::vector<double> delta(size);
  for (int64_t c = 0; c < size; ++c) delta[c] = batch.mean[first + c] * args.scale - args.mean[first + c];
  const double* const from_shift = batch.from_shift.data() + first;
  at::parallel_for(0, (size + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, size); row += kBlock) {
      for (int64_t column = row; column < size; column += kBlock) {
        const int64_t last = std::min(column + kBlock, size);
        for (int64_t i = row; i < std::min(row + kBlock, size); ++i) {
          const double of_shift = batch.added * from_shift[i] * square, of_delta = weight * delta[i];
          double* const to = comoment + i * size;
          for (int64_t j = std::max(i, column); j < last; ++j) to[j] += of_delta * delta[j] - of_shift * from_shift[j];
          if (products == nullptr) continue;
          for (int64_t j = std::max(i, column); j < last; ++j) to[j] += products[i * size + j] * square;
        }
        for (int64_t j = column; j < last; ++j) {
          for (int64_t i = row; i < std::min(row + kBlock, j); ++i) comoment[j * size + i] = comoment[i * size + j];
        }
      }
    }
  });
}

void advance(const CovarianceArgs& args, const Means& batch) {
  const double total = *args.count + batch.added;
  for (int64_t c = 0; c < args.x.channels; ++c) {
    args.mean[c] += (batch.mean[c] * args.scale - args.mean[c]) * (batch.added / total);
  }
  *args.count = total;
}

// Many channels: there is time for a pass over the batch that finds its mean and whether it counts, but none for a
// matrix beside the running one.
void update_in_place(const CovarianceArgs& args) {
  const Samples s{args.x, nullptr};
  const int64_t channels = args.x.channels, width = channels / args.groups;
  std::vector<double> moments(4 * channels);  // mean, centred squares, absolute, zeros
  double count = 0;
  int64_t skipped = 0;
  MomentsArgs of_batch{args.x,
                       &count,
                       moments.data(),
                       moments.data() + channels,
                       moments.data() + 2 * channels,
                       moments.data() + 3 * channels,
                       &skipped,
                       nullptr};
  std::vector<double> workspace(channel_moments_workspace(of_batch));
  of_batch.workspace = workspace.data();
  channel_moments_update(of_batch);
  const double most = *std::max_element(moments.begin() + channels, moments.begin() + 2 * channels);
  // Or numbers so far apart that their distance is no float32.
  if (skipped > 0 || (args.x.dtype != Dtype::kFloat64 && most > 0x1p252)) {
    ++*args.skipped;
    return;
  }
  Means batch{count, {moments.begin(), moments.begin() + channels}, {}};
  std::vector<double> shift;
  for (int64_t c = 0; c < channels; ++c) {
    shift.push_back(centre_near(batch.mean[c], moments[channels + c] / count, args.x.dtype));
    batch.from_shift.push_back(batch.mean[c] - shift[c]);
  }
  // Squares of very large or small float32 are no float32.
  const double unit = most > 0 ? std::exp2(std::clamp(-std::ilogb(most / count) / 2, -126, 126)) : 1;
  for (int64_t g = 0; g < args.groups; ++g) {
    double* const comoment = args.comoment + g * width * width;
    add_up_in_place(s, g * width, width, shift.data(), unit, args.scale * args.scale / (unit * unit), comoment);
    merge(args, batch, g, nullptr);
  }
  advance(args, batch);
}

}  // namespace

void covariance_update(const CovarianceArgs& args) {
  const Samples s{args.x, args.weight};
  const int64_t channels = args.x.channels, width = channels / args.groups;
  if (width > kMostPrivate && s.weight == nullptr) return update_in_place(args);
  const int64_t work = s.size() * channels * std::max<int64_t>(1, width / 2);
  const int64_t slices = width > kMostPrivate ? 1 : std::clamp<int64_t>(work / kSliceWork, 1, at::get_num_threads());

  Means batch{static_cast<double>(s.size()), rough_centre(s), std::vector<double>(channels)};
  if (s.weight != nullptr) batch.added = std::accumulate(s.weight, s.weight + s.size(), 0.0);
  if (batch.added == 0) return;

  std::vector<double>& shift = batch.mean;
  // Nothing is committed before all groups are known to be finite.
  std::vector<Batch> groups(args.groups);
  bool finite = true;
  for (int64_t g = 0; g < args.groups && finite; ++g) {
    Batch& group = groups[g];
    group = add_up_in_range(s, g * width, width, shift.data(), slices);
    if (!is_centred(group, batch.added)) {
      for (int64_t c = 0; c < width; ++c) {
        double& value = shift[g * width + c];
        const double off = group.sums[c] / batch.added;
        const double variance = group.products[c * (width + 1)] / batch.added - off * off;
        value = centre_near(value + off, variance, args.x.dtype);
      }
      group = add_up_in_range(s, g * width, width, shift.data(), slices);
    }
    for (int64_t c = 0; c < width; ++c) finite &= std::isfinite(group.products[c * (width + 1)]);
  }
  if (!finite) {
    ++*args.skipped;
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    batch.from_shift[c] = groups[c / width].sums[c % width] / batch.added;
    batch.mean[c] += batch.from_shift[c];
  }
  for (int64_t g = 0; g < args.groups; ++g) merge(args, batch, g, groups[g].products.data());
  advance(args, batch);
}

}  // namespace pcafast::cpu
