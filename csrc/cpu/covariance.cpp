// Covariance of channels on the CPU: centre, pack, and add up the products of channel pairs on and above the
// diagonal, as for a symmetric rank-k update (see DESIGN, "Covariance").
//
// A batch is read once: the products of x - shift are summed in the input's precision over one packed panel at most and
// in float64 from panel to panel. The shift is the mean of a few samples; if it turns out to be far from the mean of
// all, the batch is read again. It is then merged into the running state by the pairwise formula of Chan, Golub and
// LeVeque (1979).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <set>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "any_panel.h"
#include "load.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kTaskRows = 64;  // rows of products that a thread takes at a time
// Below this many doubles every slice of the batch gets a co-moment of its own.
constexpr int64_t kPrivateDoubles = 1 << 18;
constexpr int64_t kSliceWork = 1 << 18;  // products that are worth a thread

// Of the samples of one group of channels, about a shift: their sums (channels,), times their weights, and the sums of
// their products (channels, channels), of which the upper triangle counts.
struct Batch {
  std::vector<double> sums, products;
};

// Of the samples times `unit`.
//
// Small matrices: the samples are split over the threads, each with sums of its own, added up in order. Large ones: the
// threads share the packed panel and split its rows.
Batch add_up(const Samples& s, int64_t first_channel, int64_t channels, const double* shift, double unit,
             int64_t slices) {
  const int64_t square = channels * channels;
  const bool split_samples = square <= kPrivateDoubles;
  if (!split_samples) slices = 1;
  const int64_t most = most_samples(channels), panels = (s.size() + most - 1) / most;
  Batch batch{std::vector<double>(slices * channels), std::vector<double>(slices * square)};
  at::parallel_for(0, slices, 1, [&](int64_t slice_begin, int64_t slice_end) {
    const std::unique_ptr<AnyPanel> panel = panel_for(s.x.dtype, channels);
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      for (int64_t k = slice * panels / slices; k < (slice + 1) * panels / slices; ++k) {
        const int64_t begin = k * most, end = std::min(begin + most, s.size());
        double* const out = batch.products.data() + slice * square;
        panel->pack(s, begin, end, first_channel, shift, unit);
        panel->add_sums(batch.sums.data() + slice * channels);
        if (split_samples) {
          panel->multiply(0, channels, out);
          continue;
        }
        // Blocks of rows, of which the upper are longer: every task has one from above and one from below.
        const int64_t blocks = (channels + kTaskRows - 1) / kTaskRows;
        at::parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t first, int64_t last) {
          for (int64_t task = first; task < last; ++task) {
            for (const int64_t block : std::set<int64_t>{task, blocks - 1 - task}) {
              panel->multiply(block * kTaskRows, std::min((block + 1) * kTaskRows, channels), out);
            }
          }
        });
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

// The mean of a few runs of samples, weighted or not: any value near the mean will do as a shift.
std::vector<double> rough_mean(const Samples& s) {
  constexpr int64_t kRuns = 16, kMostInRun = 64, kShare = 8;
  const int64_t channels = s.x.channels, runs = std::min(kRuns, s.size());
  const int64_t in_run = std::clamp<int64_t>(s.size() / kRuns / kShare, 1, kMostInRun);
  std::vector<double> sums(channels, 0.0);
  int64_t taken = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(s.x.data);
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t begin = run * s.size() / runs;
      for_each_run(s.x, begin, std::min(begin + in_run, s.size()), [&](int64_t offset, int64_t first, int64_t length) {
        for (int64_t i = 0; i < length; ++i) {
          if (s.weight != nullptr && s.weight[first + i] == 0) continue;
          const auto* const sample = data + offset + i * s.x.position_stride;
          for (int64_t c = 0; c < channels; ++c) sums[c] += to_double(sample[c * s.x.channel_stride]);
          ++taken;
        }
      });
    }
  });
  for (double& sum : sums) sum = taken > 0 && std::isfinite(sum) ? sum / taken : 0;
  return sums;
}

// Fills the lower triangle from the upper, in blocks that keep both in cache.
void mirror(double* square, int64_t size) {
  constexpr int64_t kBlock = 64;
  at::parallel_for(0, (size + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, size); row += kBlock) {
      for (int64_t column = 0; column <= row; column += kBlock) {
        for (int64_t i = row; i < std::min(row + kBlock, size); ++i) {
          for (int64_t j = column; j < std::min(column + kBlock, i); ++j) square[i * size + j] = square[j * size + i];
        }
      }
    }
  });
}

}  // namespace

void covariance_update(const CovarianceArgs& args) {
  const Samples s{args.x, args.weight};
  const int64_t channels = args.x.channels, width = channels / args.groups;
  const int64_t work = s.size() * channels * std::max<int64_t>(1, width / 2);
  const int64_t slices = std::clamp<int64_t>(work / kSliceWork, 1, at::get_num_threads());

  double added = static_cast<double>(s.size());
  if (s.weight != nullptr) added = std::accumulate(s.weight, s.weight + s.size(), 0.0);
  if (added == 0) return;

  std::vector<double> shift = rough_mean(s);
  const auto round_shift = [&] {  // to the working type, in which it is subtracted
    if (args.x.dtype == Dtype::kFloat64) return;
    for (double& value : shift) value = static_cast<float>(value);
  };
  round_shift();
  // Nothing is committed before all groups are known to be finite.
  std::vector<Batch> batches(args.groups);
  bool finite = true;
  for (int64_t g = 0; g < args.groups && finite; ++g) {
    Batch& batch = batches[g];
    batch = add_up_in_range(s, g * width, width, shift.data(), slices);
    if (!is_centred(batch, added)) {
      for (int64_t c = 0; c < width; ++c) shift[g * width + c] += batch.sums[c] / added;
      round_shift();
      batch = add_up_in_range(s, g * width, width, shift.data(), slices);
    }
    for (int64_t c = 0; c < width; ++c) finite &= std::isfinite(batch.products[c * (width + 1)]);
  }
  if (!finite) {
    ++*args.skipped;
    return;
  }

  const double count = *args.count, total = count + added, square = args.scale * args.scale;
  std::vector<double> from_shift(channels),
      delta(channels);  // where the batch's mean is from the shift, the running mean
  for (int64_t c = 0; c < channels; ++c) {
    from_shift[c] = batches[c / width].sums[c % width] / added;
    delta[c] = (shift[c] + from_shift[c]) * args.scale - args.mean[c];
    args.mean[c] += delta[c] * (added / total);
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    double* comoment = args.comoment + g * width * width;
    const double *f = &from_shift[g * width], *d = &delta[g * width];
    at::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double of_shift = added * f[i] * square, of_delta = d[i] * (count * added / total);
        for (int64_t j = i; j < width; ++j) {
          comoment[i * width + j] += batches[g].products[i * width + j] * square - of_shift * f[j] + of_delta * d[j];
        }
      }
    });
    mirror(comoment, width);
  }
  *args.count = total;
}

}  // namespace pcafast::cpu
