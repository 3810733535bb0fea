// Covariance of channels on the CPU: centre, pack, and add up the products of channel pairs on and above the
// diagonal, as for a symmetric rank-k update (see DESIGN, "Covariance").
//
// A batch is read twice: for its mean, and for the products of x - mean, which are summed in the input's
// precision over one packed panel at most and in float64 from panel to panel. The batch is then merged into
// the running state by the pairwise formula of Chan, Golub and LeVeque (1979).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "covariance_panel.h"
#include "load.h"
#include "multiarch.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kTaskRows = 64;  // rows of products that a thread takes at a time
// Below this many doubles every slice of the batch gets a co-moment of its own.
constexpr int64_t kPrivateDoubles = 1 << 18;
constexpr int64_t kSliceWork = 1 << 18;  // products that are worth a thread

// Per channel the weighted sum over samples [begin, end), and the sum of the weights.
template <class T>
inline double sum_samples(const Samples& s, int64_t begin, int64_t end, double* sums) {
  const ChannelView& x = s.x;
  const T* data = static_cast<const T*>(x.data);
  double weights = 0;
  for_each_run(x, begin, end, [&](int64_t offset, int64_t first, int64_t length) {
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

PCAFAST_MULTIARCH double sum_slice(const Samples& s, int64_t begin, int64_t end, double* sums) {
  double weights = 0;
  with_element_type(s.x.dtype, [&](auto element) { weights = sum_samples<decltype(element)>(s, begin, end, sums); });
  return weights;
}

// A panel for the instruction set at hand.
class AnyPanel {
 public:
  virtual ~AnyPanel() = default;
  virtual void pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, const double* mean,
                    double unit) = 0;
  virtual void multiply(int64_t begin, int64_t end, double* out) const = 0;
};

// All that a panel does is inlined into these two functions, which have the instruction set.
#define PCAFAST_PANEL(Name, ...)                                                                                   \
  template <class Vector>                                                                                          \
  class Name final : public AnyPanel {                                                                             \
   public:                                                                                                         \
    explicit Name(int64_t channels) : panel_(channels) {}                                                          \
    __VA_ARGS__ void pack(const Samples& s, int64_t begin, int64_t end, int64_t first_channel, const double* mean, \
                          double unit) override {                                                                  \
      with_element_type(s.x.dtype, [&](auto element) {                                                             \
        using T = decltype(element);                                                                               \
        if constexpr (std::is_same_v<T, double> == std::is_same_v<typename Panel<Vector>::Work, double>) {         \
          panel_.template pack<T>(s, begin, end, first_channel, mean, unit);                                       \
        }                                                                                                          \
      });                                                                                                          \
    }                                                                                                              \
    __VA_ARGS__ void multiply(int64_t begin, int64_t end, double* out) const override {                            \
      panel_.multiply(begin, end, out);                                                                            \
    }                                                                                                              \
                                                                                                                   \
   private:                                                                                                        \
    Panel<Vector> panel_;                                                                                          \
  };

template <template <class> class Name, class Floats, class Doubles>
std::unique_ptr<AnyPanel> make_panel(Dtype dtype, int64_t channels) {
  if (dtype == Dtype::kFloat64) return std::make_unique<Name<Doubles>>(channels);
  return std::make_unique<Name<Floats>>(channels);
}

typedef float Floats16 __attribute__((vector_size(16)));
typedef double Doubles16 __attribute__((vector_size(16)));
PCAFAST_PANEL(Panel128)

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
typedef float Floats32 __attribute__((vector_size(32)));
typedef double Doubles32 __attribute__((vector_size(32)));
typedef float Floats64 __attribute__((vector_size(64)));
typedef double Doubles64 __attribute__((vector_size(64)));
PCAFAST_PANEL(Panel256, __attribute__((target("arch=x86-64-v3"), flatten)))
PCAFAST_PANEL(Panel512, __attribute__((target("arch=x86-64-v4"), flatten)))

const auto panel_for = __builtin_cpu_supports("x86-64-v4")   ? make_panel<Panel512, Floats64, Doubles64>
                       : __builtin_cpu_supports("x86-64-v3") ? make_panel<Panel256, Floats32, Doubles32>
                                                             : make_panel<Panel128, Floats16, Doubles16>;
#else
const auto panel_for = make_panel<Panel128, Floats16, Doubles16>;
#endif

// The upper triangle of the batch's co-moment of one group about `mean`, of the samples times `unit`.
//
// Small matrices: the samples are split over the threads, each with a sum of its own, added up in order. Large
// ones: the threads share the packed panel and split its rows.
std::vector<double> scaled_comoment(const Samples& s, int64_t first_channel, int64_t channels, const double* mean,
                                    double unit, int64_t slices) {
  const int64_t square = channels * channels;
  const bool split_samples = square <= kPrivateDoubles;
  if (!split_samples) slices = 1;
  const int64_t panels = (s.size() + kMostSamples - 1) / kMostSamples;
  std::vector<double> sums(slices * square, 0.0);
  at::parallel_for(0, slices, 1, [&](int64_t slice_begin, int64_t slice_end) {
    const std::unique_ptr<AnyPanel> panel = panel_for(s.x.dtype, channels);
    for (int64_t slice = slice_begin; slice < slice_end; ++slice) {
      for (int64_t k = slice * panels / slices; k < (slice + 1) * panels / slices; ++k) {
        const int64_t begin = k * kMostSamples, end = std::min(begin + kMostSamples, s.size());
        double* out = sums.data() + slice * square;
        panel->pack(s, begin, end, first_channel, mean, unit);
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
    for (int64_t k = 0; k < square; ++k) sums[k] += sums[slice * square + k];
  }
  sums.resize(square);
  return sums;
}

double largest_deviation(const Samples& s, int64_t first_channel, int64_t channels, const double* mean) {
  double largest = 0;
  with_element_type(s.x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(s.x.data) + first_channel * s.x.channel_stride;
    for_each_run(s.x, 0, s.size(), [&](int64_t offset, int64_t first, int64_t length) {
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
