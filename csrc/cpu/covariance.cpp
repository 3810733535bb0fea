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
                          const double* mean, Work* panel) {
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
          return to_double(row[i]) - centre;
        } else {
          return to_float(row[i]) - centre;
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
                               const double* mean, void* panel) {
  int64_t samples = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    using T = decltype(element);
    samples = pack_panel<T>(s, begin, end, first_channel, channels, mean, static_cast<WorkType<T>*>(panel));
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

// The batch's upper co-moment of one group about `mean`, (channels, channels).
//
// Small matrices: the samples are split over the threads, each with a sum of its own, added up in order. Large
// ones: the threads share the packed panel and split its rows.
void group_comoment(const Samples& s, int64_t first_channel, int64_t channels, const double* mean, int64_t slices,
                    std::vector<double>& comoment) {
  const int64_t square = channels * channels;
  const bool split_samples = square <= kPrivateDoubles;
  if (!split_samples) slices = 1;
  const int64_t panels = (s.size() + kPanelSamples - 1) / kPanelSamples;
  std::vector<double> partial(slices * square, 0.0);
  at::parallel_for(0, slices, 1, [&](int64_t slice_begin, int64_t slice_end) {
    std::vector<double> panel(channels * kPanelSamples);  // doubles are wide enough for either working type
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      for (int64_t k = slice * panels / slices; k < (slice + 1) * panels / slices; ++k) {
        const int64_t begin = k * kPanelSamples, end = std::min(begin + kPanelSamples, s.size());
        const int64_t samples = pack(s, begin, end, first_channel, channels, mean, panel.data());
        double* out = partial.data() + slice * square;
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
  comoment.assign(partial.begin(), partial.begin() + square);
  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t k = 0; k < square; ++k) comoment[k] += partial[slice * square + k];
  }
}

}  // namespace

void covariance_update(const CovarianceArgs& args) {
  const Samples s{args.x, args.weight};
  const int64_t channels = args.x.channels, group_channels = channels / args.groups;
  if (s.size() == 0 || channels == 0) return;
  const int64_t work = s.size() * channels * std::max<int64_t>(1, group_channels / 2);
  const int64_t slices = std::clamp<int64_t>(work / kSliceWork, 1, at::get_num_threads());

  std::vector<double> sums(slices * channels, 0.0), weights(slices, 0.0);
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      weights[i] = sum_slice(s, i * s.size() / slices, (i + 1) * s.size() / slices, &sums[i * channels]);
    }
  });
  double added = 0;
  std::vector<double> mean(channels, 0.0);
  for (int64_t i = 0; i < slices; ++i) {
    added += weights[i];
    for (int64_t c = 0; c < channels; ++c) mean[c] += sums[i * channels + c];
  }
  if (added == 0) return;
  for (double& m : mean) m /= added;

  // One group after another; nothing is committed before all are known to be finite.
  std::vector<std::vector<double>> batch(args.groups);
  bool finite = std::all_of(mean.begin(), mean.end(), [](double m) { return std::isfinite(m); });
  for (int64_t g = 0; g < args.groups && finite; ++g) {
    group_comoment(s, g * group_channels, group_channels, mean.data(), slices, batch[g]);
    for (int64_t c = 0; c < group_channels; ++c) finite &= std::isfinite(batch[g][c * (group_channels + 1)]);
  }
  if (!finite) {
    ++*args.skipped;
    return;
  }

  const double count = *args.count, total = count + added;
  // What rounding the mean to the working type left uncentred.
  std::vector<double> delta(channels), residue(channels, 0.0);
  for (int64_t c = 0; c < channels; ++c) {
    delta[c] = mean[c] - args.mean[c];
    if (args.x.dtype != Dtype::kFloat64) residue[c] = mean[c] - static_cast<double>(static_cast<float>(mean[c]));
    args.mean[c] += delta[c] * (added / total);
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    double* comoment = args.comoment + g * group_channels * group_channels;
    for (int64_t i = 0; i < group_channels; ++i) {
      const int64_t ci = g * group_channels + i;
      for (int64_t j = i; j < group_channels; ++j) {
        const int64_t cj = g * group_channels + j;
        const double sum = comoment[i * group_channels + j] + batch[g][i * group_channels + j] -
                           added * residue[ci] * residue[cj] + delta[ci] * delta[cj] * (count * added / total);
        comoment[i * group_channels + j] = comoment[j * group_channels + i] = sum;
      }
    }
  }
  *args.count = total;
}

}  // namespace pcafast::cpu
