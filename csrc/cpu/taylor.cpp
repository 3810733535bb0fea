// Activation x gradient (Molchanov et al., 1611.06440 and 1906.10771) and channel moments on the CPU.
//
// Both are sums over the positions of every (example, channel), taken in one read of the input, then a reduction
// over the examples in a fixed order, so that the result does not depend on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernels.h"
#include "lanes.h"
#include "multiarch.h"

namespace pcafast::cpu {
namespace {

// Channels that one task handles: long enough to vectorise over them, few enough that their sums stay in cache.
constexpr int64_t kChannelBlock = 64;
constexpr int64_t kGrainElements = 1 << 15;

struct Taylor {
  static constexpr int kSums = 2;  // a * g, |a * g|
  double scale;
  template <class Value>
  void add(Value* sums, Value a, Value g, Value) const {
    const Value product = a * g * scale;
    sums[0] += product;
    sums[1] += absolute(product);
  }
};

struct Moments {
  static constexpr int kSums = 4;  // x - shift, (x - shift)^2, |x|, x == 0
  template <class Value>
  void add(Value* sums, Value x, Value, Value shift) const {
    const Value centred = x - shift;
    sums[0] += centred;
    sums[1] += centred * centred;
    sums[2] += absolute(x);
    sums[3] += one_where_zero(x);
  }
};

template <class T>
struct Operands {
  const T* a;
  const T* g;
  int64_t a_channel, g_channel, a_position, g_position;
};

// Positions lie side by side: the lanes are positions of one channel.
template <class Op, class T>
inline void sum_positions_in_lanes(const Op& op, Operands<T> in, int64_t positions, double shift, double* sums) {
  Lanes lanes[Op::kSums] = {};
  double rest[Op::kSums] = {};
  int64_t p = 0;
  for (; p + kLanes <= positions; p += kLanes) {
    op.add(lanes, load_lanes(in.a + p), load_lanes(in.g + p), broadcast(shift));
  }
  for (; p < positions; ++p) op.add(rest, to_double(in.a[p]), to_double(in.g[p]), shift);
  for (int k = 0; k < Op::kSums; ++k) sums[k] = sum_of_lanes(lanes[k]) + rest[k];
}

// Channels lie side by side (channels-last, sequences): the lanes are channels.
template <class Op, class T>
inline void sum_channels_in_lanes(const Op& op, Operands<T> in, int64_t positions, int64_t channels,
                                  const double* shift, double* sums) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Lanes lanes[Op::kSums] = {};
    const Lanes lane_shift = shift == nullptr ? Lanes{} : load_lanes(shift + c);
    for (int64_t p = 0; p < positions; ++p) {
      op.add(lanes, load_lanes(in.a + c + p * in.a_position), load_lanes(in.g + c + p * in.g_position), lane_shift);
    }
    for (int k = 0; k < Op::kSums; ++k) {
      for (int l = 0; l < kLanes; ++l) sums[(c + l) * Op::kSums + k] = lanes[k][l];
    }
  }
  for (; c < channels; ++c) {
    double rest[Op::kSums] = {};
    for (int64_t p = 0; p < positions; ++p) {
      op.add(rest, to_double(in.a[c + p * in.a_position]), to_double(in.g[c + p * in.g_position]),
             shift == nullptr ? 0.0 : shift[c]);
    }
    std::copy(rest, rest + Op::kSums, sums + c * Op::kSums);
  }
}

template <class Op, class T>
inline void sum_any_strides(const Op& op, Operands<T> in, int64_t positions, double shift, double* sums) {
  std::fill(sums, sums + Op::kSums, 0.0);
  for (int64_t p = 0; p < positions; ++p) {
    op.add(sums, to_double(in.a[p * in.a_position]), to_double(in.g[p * in.g_position]), shift);
  }
}

// The sums over positions of channels [begin, end) of one example, (end - begin, kSums) doubles.
template <class Op, class T>
inline void sum_example(const Op& op, const ChannelView& a, const ChannelView& g, int64_t n, int64_t begin, int64_t end,
                        const double* shift, double* sums) {
  Operands<T> in{static_cast<const T*>(a.data) + n * a.example_stride + begin * a.channel_stride,
                 static_cast<const T*>(g.data) + n * g.example_stride + begin * g.channel_stride,
                 a.channel_stride,
                 g.channel_stride,
                 a.position_stride,
                 g.position_stride};
  if (shift != nullptr) shift += begin;
  const bool channels_adjacent = a.channel_stride == 1 && g.channel_stride == 1;
  const bool positions_adjacent = a.position_stride == 1 && g.position_stride == 1;
  if (channels_adjacent && !(positions_adjacent && a.positions > 1)) {
    return sum_channels_in_lanes(op, in, a.positions, end - begin, shift, sums);
  }
  for (int64_t c = 0; c < end - begin; ++c) {
    const double channel_shift = shift == nullptr ? 0.0 : shift[c];
    if (positions_adjacent) {
      sum_positions_in_lanes(op, in, a.positions, channel_shift, sums + c * Op::kSums);
    } else {
      sum_any_strides(op, in, a.positions, channel_shift, sums + c * Op::kSums);
    }
    in.a += in.a_channel;
    in.g += in.g_channel;
  }
}

template <class Op>
PCAFAST_MULTIARCH void sum_tasks(Op op, const ChannelView& a, const ChannelView& g, const double* shift, double* sums,
                                 int64_t begin, int64_t end) {
  const int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks, first = task % blocks * kChannelBlock;
    const int64_t last = std::min(first + kChannelBlock, a.channels);
    double* out = sums + (n * a.channels + first) * Op::kSums;
    with_element_type(a.dtype,
                      [&](auto element) { sum_example<Op, decltype(element)>(op, a, g, n, first, last, shift, out); });
  }
}

// (examples, channels, kSums)
template <class Op>
void sum_over_positions(Op op, const ChannelView& a, const ChannelView& g, const double* shift, double* sums) {
  const int64_t blocks = (a.channels + kChannelBlock - 1) / kChannelBlock;
  const int64_t elements = std::max<int64_t>(1, std::min(kChannelBlock, a.channels) * a.positions);
  at::parallel_for(0, a.examples * blocks, std::max<int64_t>(1, kGrainElements / elements),
                   [&](int64_t begin, int64_t end) { sum_tasks(op, a, g, shift, sums, begin, end); });
}

bool all_finite(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
}

}  // namespace

int64_t taylor_workspace(const TaylorArgs& args) {
  return args.activation.examples * args.activation.channels * Taylor::kSums;
}

void taylor_update(const TaylorArgs& args) {
  const int64_t n = args.activation.examples, channels = args.activation.channels;
  const int64_t positions = args.activation.positions;
  if (n * positions == 0) return;
  sum_over_positions(Taylor{args.scale}, args.activation, args.gradient, nullptr, args.workspace);

  std::vector<double> batch(4 * channels, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      const double* sums = args.workspace + (i * channels + c) * Taylor::kSums;
      batch[c] += std::abs(sums[0]) / positions;
      batch[channels + c] += sums[0] * sums[0] / positions;
      batch[2 * channels + c] += sums[0];
      batch[3 * channels + c] += sums[1];
    }
  }
  if (!all_finite(batch)) {
    ++*args.skipped;
    return;
  }
  for (int64_t k = 0; k < 4 * channels; ++k) args.sums[k] += batch[k];
  *args.examples += n;
  *args.positions += static_cast<double>(n * positions);
}

void channel_moments_update(const MomentsArgs& args) {
  const ChannelView& x = args.x;
  const int64_t channels = x.channels;
  const double added = static_cast<double>(x.examples * x.positions);
  if (added == 0) return;

  // Shifting by any value of the channel keeps the squares from cancelling; the first is at hand.
  std::vector<double> shift(channels);
  with_element_type(x.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(x.data);
    for (int64_t c = 0; c < channels; ++c) shift[c] = to_double(data[c * x.channel_stride]);
  });
  std::vector<double> sums(x.examples * channels * Moments::kSums);
  sum_over_positions(Moments{}, x, x, shift.data(), sums.data());

  std::vector<double> batch(channels * Moments::kSums, 0.0);
  for (int64_t n = 0; n < x.examples; ++n) {
    for (size_t k = 0; k < batch.size(); ++k) batch[k] += sums[n * batch.size() + k];
  }
  if (!all_finite(batch)) {
    ++*args.skipped;
    return;
  }
  const double count = *args.count, total = count + added;
  for (int64_t c = 0; c < channels; ++c) {
    const double* s = &batch[c * Moments::kSums];
    const double delta = shift[c] + s[0] / added - args.mean[c];
    args.centred_squares[c] += s[1] - s[0] * s[0] / added + delta * delta * (count * added / total);
    args.mean[c] += delta * (added / total);
    args.absolute[c] += s[2];
    args.zeros[c] += s[3];
  }
  *args.count = total;
}

}  // namespace pcafast::cpu
