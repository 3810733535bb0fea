// Covariance of channels on the CPU: centre, pack, and add up the products of channel pairs on and above the
// diagonal, as for a symmetric rank-k update (see DESIGN, "Covariance").
//
// A batch is read twice: for its mean, and for the products of x - mean, which are summed in the input's
// precision over one packed panel at most and in float64 from panel to panel. The batch is then merged into
// the running state by the pairwise formula of Chan, Golub and LeVeque (1979).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "load.h"
#include "multiarch.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kPanelSamples = 512;
constexpr int64_t kTile = 4;  // channels on each side of a register tile
// Below this many doubles every slice of the batch gets a co-moment of its own.
constexpr int64_t kPrivateDoubles = 1 << 18;
constexpr int64_t kSliceWork = 1 << 18;  // products that are worth a thread

// Samples are numbered example by example, position by position.
struct Samples {
  ChannelView x;
  const double* weight;
  int64_t size() const { return x.examples * x.positions; }
};

// Visits the samples [begin, end) as runs inside one example: use(offset of the first, first sample, length).
template <class Use>
inline void for_each_run(const ChannelView& x, int64_t begin, int64_t end, int64_t longest, Use&& use) {
  while (begin < end) {
    const int64_t n = begin / x.positions, p = begin % x.positions;
    const int64_t length = std::min({end - begin, x.positions - p, longest});
    use(n * x.example_stride + p * x.position_stride, begin, length);
    begin += length;
  }
}

// Per channel the weighted sum over samples [begin, end), and the sum of the weights.
template <class T>
inline double sum_samples(const Samples& s, int64_t begin, int64_t end, double* sums) {
  const ChannelView& x = s.x;
  const T* data = static_cast<const T*>(x.data);
  double weights = 0;
  for_each_run(x, begin, end, kPanelSamples, [&](int64_t offset, int64_t first, int64_t length) {
    const double* w = s.weight == nullptr ? nullptr : s.weight + first;
    for (int64_t i = 0; i < length; ++i) weights += w == nullptr ? 1.0 : w[i];
    if (x.channel_stride == 1) {
      for (int64_t i = 0; i < length; ++i) {
        const T* row = data + offset + i * x.position_stride;
        const double wi = w == nullptr ? 1.0 : w[i];
        if (wi == 0) continue;
        for (int64_t c = 0; c < x.channels; ++c) sums[c] += wi * to_double(row[c]);
      }
      return;
    }
    for (int64_t c = 0; c < x.channels; ++c) {
      const T* row = data + offset + c * x.channel_stride;
      double partial[8] = {};
      int64_t i = 0;
      if (w == nullptr) {
        for (; i + 8 <= length; i += 8) {
          for (int l = 0; l < 8; ++l) partial[l] += to_double(row[(i + l) * x.position_stride]);
        }
      }
      for (; i < length; ++i) {
        const double wi = w == nullptr ? 1.0 : w[i];
        if (wi != 0) partial[0] += wi * to_double(row[i * x.position_stride]);
      }
      for (double part : partial) sums[c] += part;
    }
  });
  return weights;
}

// Centred samples of the channels of one group, channel by channel; positions of weight zero are left out and the
// others scaled by the square root of their weight. Returns how many samples were packed, padded with zeros to a
// whole number of vectors.
template <class T, class Work>
inline int64_t pack_panel(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, int64_t channels,
                          const double* mean, double unit, Work* panel) {
  constexpr int64_t kBlock = 16;  // samples read together where channels lie side by side
  const ChannelView& x = s.x;
  const T* data = static_cast<const T*>(x.data) + first_channel * x.channel_stride;
  const int64_t longest = x.channel_stride == 1 ? kBlock : kPanelSamples;
  int64_t packed = 0;
  for_each_run(x, begin, end, longest, [&](int64_t offset, int64_t first, int64_t length) {
    int64_t kept = length;
    for (int64_t c = 0; c < channels; ++c) {
      const T* row = data + offset + c * x.channel_stride;
      const Work centre = static_cast<Work>(mean[first_channel + c]);
      Work* to = panel + c * kPanelSamples + packed;
      auto centred = [&](int64_t i) {
        if constexpr (std::is_same_v<Work, double>) {
          return (to_double(row[i]) - centre) * unit;
        } else {
          return (to_float(row[i]) - centre) * static_cast<Work>(unit);
        }
      };
      if (s.weight != nullptr) {
        kept = 0;
        for (int64_t i = 0; i < length; ++i) {
          const double w = s.weight[first + i];
          if (w != 0) to[kept++] = static_cast<Work>(std::sqrt(w)) * centred(i * x.position_stride);
        }
      } else if (x.position_stride == 1) {  // the stride known to the compiler, so that it vectorises
        for (int64_t i = 0; i < length; ++i) to[i] = centred(i);
      } else {
        for (int64_t i = 0; i < length; ++i) to[i] = centred(i * x.position_stride);
      }
    }
    packed += kept;
  });
  const int64_t padded = (packed + kBlock - 1) / kBlock * kBlock;
  for (int64_t c = 0; c < channels; ++c) {
    std::fill(panel + c * kPanelSamples + packed, panel + c * kPanelSamples + padded, Work(0));
  }
  return padded;
}

// A tile of products: out[i][j] += sum over samples of a[i] * b[j].
template <int kRows, int kColumns, class Work>
inline void add_tile(const Work* a, const Work* b, int64_t samples, double* out, int64_t out_stride) {
  constexpr int kWidth = 64 / sizeof(Work);
  typedef Work Vector __attribute__((vector_size(64)));
  Vector sums[kRows][kColumns] = {};
  for (int64_t k = 0; k < samples; k += kWidth) {
    Vector left[kRows], right[kColumns];
    for (int i = 0; i < kRows; ++i) std::memcpy(&left[i], a + i * kPanelSamples + k, sizeof(Vector));
    for (int j = 0; j < kColumns; ++j) std::memcpy(&right[j], b + j * kPanelSamples + k, sizeof(Vector));
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) sums[i][j] += left[i] * right[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      Work sum = 0;
      for (int l = 0; l < kWidth; ++l) sum += sums[i][j][l];
      out[i * out_stride + j] += sum;
    }
  }
}

// Rows [begin, end) of the upper triangle of panel * panel', in tiles; the last tiles are narrower.
template <class Work>
inline void add_products(const Work* panel, int64_t samples, int64_t channels, int64_t begin, int64_t end,
                         double* comoment) {
  for (int64_t i = begin; i < end; i += kTile) {
    const Work* a = panel + i * kPanelSamples;
    const bool whole_rows = i + kTile <= end;
    for (int64_t j = i; j < channels; j += kTile) {
      const Work* b = panel + j * kPanelSamples;
      double* out = comoment + i * channels + j;
      if (whole_rows && j + kTile <= channels) {
        add_tile<kTile, kTile>(a, b, samples, out, channels);
        continue;
      }
      for (int64_t r = 0; r < std::min(kTile, end - i); ++r) {
        for (int64_t c = 0; c < std::min(kTile, channels - j); ++c) {
          add_tile<1, 1>(a + r * kPanelSamples, b + c * kPanelSamples, samples, out + r * channels + c, channels);
        }
      }
    }
  }
}

template <class T>
using WorkType = std::conditional_t<std::is_same_v<T, double>, double, float>;

PCAFAST_MULTIARCH double sum_slice(const Samples& s, int64_t begin, int64_t end, double* sums) {
  double weights = 0;
  with_element_type(s.x.dtype, [&](auto element) { weights = sum_samples<decltype(element)>(s, begin, end, sums); });
  return weights;
}

PCAFAST_MULTIARCH int64_t pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, int64_t channels,
                               const double* mean, double unit, void* panel) {
  int64_t samples = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    using T = decltype(element);
    samples = pack_panel<T>(s, begin, end, first_channel, channels, mean, unit, static_cast<WorkType<T>*>(panel));
  });
  return samples;
}

PCAFAST_MULTIARCH void multiply(Dtype dtype, const void* panel, int64_t samples, int64_t channels, int64_t begin,
                                int64_t end, double* comoment) {
  if (dtype == Dtype::kFloat64) {
    add_products(static_cast<const double*>(panel), samples, channels, begin, end, comoment);
  } else {
    add_products(static_cast<const float*>(panel), samples, channels, begin, end, comoment);
  }
}

// The upper triangle of the batch's co-moment of one group about `mean`, of the samples times `unit`.
//
// Small matrices: the samples are split over the threads, each with a sum of its own, added up in order. Large
// ones: the threads share the packed panel and split its rows.
std::vector<double> scaled_comoment(const Samples& s, int64_t first_channel, int64_t channels, const double* mean,
                                    double unit, int64_t slices) {
  const int64_t square = channels * channels;
  const bool split_samples = square <= kPrivateDoubles;
  if (!split_samples) slices = 1;
  const int64_t panels = (s.size() + kPanelSamples - 1) / kPanelSamples;
  std::vector<double> sums(slices * square, 0.0);
  at::parallel_for(0, slices, 1, [&](int64_t slice_begin, int64_t slice_end) {
    std::vector<double> panel(channels * kPanelSamples);  // doubles are wide enough for either working type
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      for (int64_t k = slice * panels / slices; k < (slice + 1) * panels / slices; ++k) {
        const int64_t begin = k * kPanelSamples, end = std::min(begin + kPanelSamples, s.size());
        const int64_t samples = pack(s, begin, end, first_channel, channels, mean, unit, panel.data());
        double* out = sums.data() + slice * square;
        if (split_samples) {
          multiply(s.x.dtype, panel.data(), samples, channels, 0, channels, out);
          continue;
        }
        // Row blocks of tiles, so that the tiling does not depend on the number of threads.
        const int64_t blocks = (channels + kTile - 1) / kTile;
        at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
          multiply(s.x.dtype, panel.data(), samples, channels, first * kTile, std::min(last * kTile, channels), out);
        });
      }
    }
  });
  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t k = 0; k < square; ++k) sums[k] += sums[slice * square + k];
  }
  sums.resize(square);
  return sums;
}

double largest_deviation(const Samples& s, int64_t first_channel, int64_t channels, const double* mean) {
  double largest = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(s.x.data) + first_channel * s.x.channel_stride;
    for_each_run(s.x, 0, s.size(), kPanelSamples, [&](int64_t offset, int64_t first, int64_t length) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < length; ++i) {
          if (s.weight != nullptr && s.weight[first + i] == 0) continue;
          const double x = to_double(data[offset + c * s.x.channel_stride + i * s.x.position_stride]);
          largest = std::max(largest, std::abs(x - mean[first_channel + c]));
        }
      }
    });
  });
  return largest;
}

// The same of the samples as they are. Squares of very large or small float32 are no float32: then it is done again,
// in units of a power of two.
std::vector<double> group_comoment(const Samples& s, int64_t first_channel, int64_t channels, const double* mean,
                                   int64_t slices) {
  constexpr double kSmallest = 1e-20, kLargest = 1e30;
  std::vector<double> comoment = scaled_comoment(s, first_channel, channels, mean, 1, slices);
  double largest = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double square = comoment[c * (channels + 1)];
    largest = std::isfinite(square) ? std::max(largest, square) : kLargest;
  }
  if (largest > kSmallest && largest < kLargest) return comoment;
  const double deviation = largest_deviation(s, first_channel, channels, mean);
  if (deviation == 0) return comoment;
  const double unit = std::exp2(std::clamp(-std::ilogb(deviation), -126, 126));
  comoment = scaled_comoment(s, first_channel, channels, mean, unit, slices);
  for (double& sum : comoment) sum /= unit * unit;
  return comoment;
}

// The batch's mean, and the sum of its weights.
double batch_mean(const Samples& s, int64_t slices, std::vector<double>& mean) {
  const int64_t channels = s.x.channels;
  std::vector<double> sums(slices * channels, 0.0), weights(slices, 0.0);
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      weights[i] = sum_slice(s, i * s.size() / slices, (i + 1) * s.size() / slices, &sums[i * channels]);
    }
  });
  double weight = 0;
  for (int64_t i = 0; i < slices; ++i) {
    weight += weights[i];
    for (int64_t c = 0; c < channels; ++c) mean[c] += sums[i * channels + c];
  }
  for (double& m : mean) m /= weight;
  return weight;
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

  std::vector<double> mean(channels, 0.0);
  const double added = batch_mean(s, slices, mean);
  if (added == 0) return;
  // Nothing is committed before all groups are known to be finite.
  std::vector<std::vector<double>> batch(args.groups);
  bool finite = std::all_of(mean.begin(), mean.end(), [](double m) { return std::isfinite(m); });
  for (int64_t g = 0; g < args.groups && finite; ++g) {
    batch[g] = group_comoment(s, g * width, width, mean.data(), slices);
    for (int64_t c = 0; c < width; ++c) finite &= std::isfinite(batch[g][c * (width + 1)]);
  }
  if (!finite) {
    ++*args.skipped;
    return;
  }

  const double count = *args.count, total = count + added, square = args.scale * args.scale;
  // What rounding the mean to the working type left uncentred, and how far the batch's mean is from the running one.
  std::vector<double> residue(channels, 0.0), delta(channels);
  for (int64_t c = 0; c < channels; ++c) {
    if (args.x.dtype != Dtype::kFloat64) residue[c] = mean[c] - static_cast<double>(static_cast<float>(mean[c]));
    delta[c] = mean[c] * args.scale - args.mean[c];
    args.mean[c] += delta[c] * (added / total);
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    double* comoment = args.comoment + g * width * width;
    const double *r = &residue[g * width], *d = &delta[g * width];
    at::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double of_residue = added * r[i] * square, of_delta = d[i] * (count * added / total);
        for (int64_t j = i; j < width; ++j) {
          comoment[i * width + j] += batch[g][i * width + j] * square - of_residue * r[j] + of_delta * d[j];
        }
      }
    });
    mirror(comoment, width);
  }
  *args.count = total;
}

}  // namespace pcafast::cpu
