// Activation x gradient (Molchanov et al., 1611.06440 and 1906.10771) and channel moments on the CPU.
//
// Both are sums over the positions of every (example, channel), taken in one read of the input, then a reduction
// over the examples in a fixed order, so that the result does not depend on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernels.h"
#include "channel_sums.h"

namespace pcafast::cpu {
namespace {

constexpr int64_t kGrainSums = 1 << 14;

struct Taylor {
  static constexpr int kSums = 2;  // a * g, |a * g|

  template <class Value>
  struct Sum {
    Value plain{}, absolutes{};

    Sum() = default;
    explicit Sum(Value) {}
    void add(Value a, Value g) {
      const Value product = a * g;
      plain += product;
      absolutes += absolute(product);
    }
    std::array<Value, kSums> values() const { return {plain, absolutes}; }
  };
};

struct Moments {
  static constexpr int kSums = 4;  // x - shift, (x - shift)^2, |x|, x == 0

  template <class Value>
  struct Sum {
    Value shift{}, centred{}, squares{}, absolutes{};
    CountOf<Value> zeros{};

    Sum() = default;
    explicit Sum(Value shift) : shift(shift) {}
    void add(Value x, Value) {
      const Value difference = x - shift;
      centred += difference;
      squares += difference * difference;
      absolutes += absolute(x);
      zeros += is_zero(x);
    }
    std::array<Value, kSums> values() const { return {centred, squares, absolutes, as_value(zeros)}; }
  };
};

// Calls use(sums, channel) for every example and channel, examples in order; `sums` are those over all its positions.
template <class Op, class Use>
void for_each_example(const ChannelView& x, const double* sums, Use&& use) {
  const int64_t parts = Tasks(x).parts, step = x.channels * Op::kSums;
  const int64_t grain = std::max<int64_t>(1, kGrainSums / (x.examples * parts));
  at::parallel_for(0, x.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < x.examples; ++n) {
      for (int64_t c = begin; c < end; ++c) {
        std::array<double, Op::kSums> total{};
        for (int64_t part = 0; part < parts; ++part) {
          const double* const of_part = sums + (n * parts + part) * step + c * Op::kSums;
          for (int k = 0; k < Op::kSums; ++k) total[k] += of_part[k];
        }
        use(total, c);
      }
    }
  });
}

bool all_finite(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
}

}  // namespace

int64_t taylor_workspace(const TaylorArgs& args) { return size_of_sums<Taylor>(args.activation); }

void taylor_update(const TaylorArgs& args) {
  const ChannelView& a = args.activation;
  const int64_t channels = a.channels;
  sum_over_positions<Taylor>(a, args.gradient, nullptr, args.workspace);

  std::vector<double> batch(4 * channels, 0.0);
  for_each_example<Taylor>(a, args.workspace, [&](const auto& sums, int64_t c) {
    const double s = args.scale * sums[0];
    batch[c] += std::abs(s);
    batch[channels + c] += s * s;
    batch[2 * channels + c] += s;
    batch[3 * channels + c] += std::abs(args.scale) * sums[1];
  });
  std::for_each_n(batch.begin(), 2 * channels, [&](double& sum) { sum /= a.positions; });
  if (!all_finite(batch)) {
    ++*args.skipped;
    return;
  }
  for (int64_t k = 0; k < 4 * channels; ++k) args.sums[k] += batch[k];
  *args.examples += a.examples;
  *args.positions += static_cast<double>(a.examples * a.positions);
}

int64_t channel_moments_workspace(const MomentsArgs& args) { return size_of_sums<Moments>(args.x); }

void channel_moments_update(const MomentsArgs& args) {
  const ChannelView& x = args.x;
  const int64_t channels = x.channels;

  // Shifting by any value of the channel keeps the squares from cancelling; the first is at hand.
  std::vector<double> shift(channels);
  with_element_type(x.dtype, [&](auto element) {
    for (int64_t c = 0; c < channels; ++c) shift[c] = to_double(*address<decltype(element)>(x, 0, c, 0));
  });
  sum_over_positions<Moments>(x, x, shift.data(), args.workspace);

  std::vector<double> batch(channels * Moments::kSums, 0.0);
  for_each_example<Moments>(x, args.workspace, [&](const auto& sums, int64_t c) {
    for (int k = 0; k < Moments::kSums; ++k) batch[c * Moments::kSums + k] += sums[k];
  });
  if (!all_finite(batch)) {
    ++*args.skipped;
    return;
  }
  const double added = static_cast<double>(x.examples * x.positions), count = *args.count, total = count + added;
  for (int64_t c = 0; c < channels; ++c) {
    const double* s = &batch[c * Moments::kSums];
    const double delta = shift[c] + s[0] / added - args.mean[c];
    args.centred_squares[c] += s[1] - s[0] * (s[0] / added) + delta * delta * (count * added / total);
    args.mean[c] += delta * (added / total);
    args.absolute[c] += s[2];
    args.zeros[c] += s[3];
  }
  *args.count = total;
}

}  // namespace pcafast::cpu
