// Sums over the positions of every (example, channel), in one read of the input, for each of the layouts that
// activations come in. What is summed is up to an Op:
//
// - Op::Sum<Value>: the sums of one channel, Value being double, or of neighbouring channels or positions, Value being
//   Lanes.
// - Sum(shift): all sums zero; the shift belongs to the channel.
// - Sum.add(x, y): takes in one position of both operands.
// - Sum.values(): the Op::kSums sums.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "../kernels.h"
#include "lanes.h"
#include "multiarch.h"

namespace pcafast::cpu {

constexpr int64_t kGrainElements = 1 << 15;
constexpr int64_t kPartPositions = 1 << 15;
constexpr int kPrefetch = 512;  // elements ahead; memory is read a fifth faster than without

// How the batch is cut into tasks: an example, a part of its positions, a block of its channels. It does not depend on
// the number of threads, so neither does the result. Where channels lie side by side a block is long, to be read in
// long runs, but not so long that its sums leave the cache.
struct Tasks {
  static constexpr int64_t kLongBlock = 512, kShortBlock = 64;
  int64_t parts, blocks, block_channels;

  explicit Tasks(const ChannelView& x)
      : parts(std::max<int64_t>(1, (x.positions + kPartPositions - 1) / kPartPositions)),
        block_channels(x.channel_stride == 1 ? kLongBlock : kShortBlock) {
    blocks = (x.channels + block_channels - 1) / block_channels;
  }
};

template <class T>
inline const T* address(const ChannelView& x, int64_t example, int64_t channel, int64_t position) {
  return static_cast<const T*>(x.data) + example * x.example_stride + channel * x.channel_stride +
         position * x.position_stride;
}

// Both operands at the same example, channel and position.
template <class T>
struct Operands {
  const T *x, *y;
};

template <class T>
inline void prefetch([[maybe_unused]] const T* address) {
#ifdef __GNUC__
  __builtin_prefetch(address);
#endif
}

// Positions lie side by side: the lanes are positions of one channel.
template <class Op, class T>
inline void sum_positions_in_lanes(Operands<T> in, int64_t positions, double shift, double* sums) {
  typename Op::template Sum<Lanes> lanes(broadcast(shift));
  typename Op::template Sum<double> rest(shift);
  int64_t p = 0;
  for (; p + kPair <= positions; p += kPair) {
    prefetch(in.x + p + kPrefetch);
    prefetch(in.y + p + kPrefetch);
    const LanePair x = load_pair(in.x + p), y = load_pair(in.y + p);
    lanes.add(x.first, y.first);
    lanes.add(x.second, y.second);
  }
  for (; p < positions; ++p) rest.add(to_double(in.x[p]), to_double(in.y[p]));
  const auto of_lanes = lanes.values();
  const auto of_rest = rest.values();
  for (int k = 0; k < Op::kSums; ++k) sums[k] = sum_of_lanes(of_lanes[k]) + of_rest[k];
}

template <class Op, class T>
inline void sum_any_strides(const ChannelView& a, const ChannelView& b, Operands<T> in, int64_t positions, double shift,
                            double* sums) {
  typename Op::template Sum<double> sum(shift);
  for (int64_t p = 0; p < positions; ++p) {
    sum.add(to_double(in.x[p * a.position_stride]), to_double(in.y[p * b.position_stride]));
  }
  const auto values = sum.values();
  std::copy(values.begin(), values.end(), sums);
}

// Channels lie side by side (channels-last, sequences): the lanes are channels. Takes several positions at a time, as
// the sums are too many for the registers.
template <class Op, class T>
inline void sum_channels_in_lanes(const ChannelView& a, const ChannelView& b, Operands<T> in, int64_t positions,
                                  int64_t channels, const double* shift, double* sums) {
  using Sum = typename Op::template Sum<Lanes>;
  constexpr int64_t kTogether = 4;
  Sum lanes[Tasks::kLongBlock / kLanes];
  const int64_t pairs = channels / kPair;
  for (int64_t i = 0; i < 2 * pairs && shift != nullptr; ++i) {
    Lanes own;
    for (int l = 0; l < kLanes; ++l) own[l] = shift[i / 2 * kPair + index_in_pair<T>(i % 2, l)];
    lanes[i] = Sum(own);
  }
  const auto add = [&](int64_t p, auto together) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      Sum first = lanes[2 * pair], second = lanes[2 * pair + 1];
      for (int64_t i = 0; i < together(); ++i) {
        const T* const from_x = in.x + (p + i) * a.position_stride + pair * kPair;
        const T* const from_y = in.y + (p + i) * b.position_stride + pair * kPair;
        prefetch(from_x + kPrefetch);
        prefetch(from_y + kPrefetch);
        const LanePair x = load_pair(from_x), y = load_pair(from_y);
        first.add(x.first, y.first);
        second.add(x.second, y.second);
      }
      lanes[2 * pair] = first;
      lanes[2 * pair + 1] = second;
    }
  };
  int64_t p = 0;
  for (; p + kTogether <= positions; p += kTogether) add(p, std::integral_constant<int64_t, kTogether>());
  for (; p < positions; ++p) add(p, std::integral_constant<int64_t, 1>());
  for (int64_t i = 0; i < 2 * pairs; ++i) {
    const auto values = lanes[i].values();
    for (int l = 0; l < kLanes; ++l) {
      double* const out = sums + (i / 2 * kPair + index_in_pair<T>(i % 2, l)) * Op::kSums;
      for (int k = 0; k < Op::kSums; ++k) out[k] = values[k][l];
    }
  }
  for (int64_t c = pairs * kPair; c < channels; ++c) {
    sum_any_strides<Op>(a, b, Operands<T>{in.x + c, in.y + c}, positions, shift == nullptr ? 0.0 : shift[c],
                        sums + c * Op::kSums);
  }
}

// One task: (block_channels, Op::kSums) doubles at most.
template <class Op, class T>
inline void sum_task(const ChannelView& a, const ChannelView& b, const Tasks& tasks, int64_t task, const double* shift,
                     double* sums) {
  const int64_t block = task % tasks.blocks, part = task / tasks.blocks % tasks.parts;
  const int64_t example = task / tasks.blocks / tasks.parts;
  const int64_t first = block * tasks.block_channels, channels = std::min(tasks.block_channels, a.channels - first);
  const int64_t begin = part * kPartPositions, positions = std::min(kPartPositions, a.positions - begin);
  Operands<T> in = {address<T>(a, example, first, begin), address<T>(b, example, first, begin)};
  if (shift != nullptr) shift += first;
  sums += ((example * tasks.parts + part) * a.channels + first) * Op::kSums;

  const bool channels_adjacent = a.channel_stride == 1 && b.channel_stride == 1;
  const bool positions_adjacent = a.position_stride == 1 && b.position_stride == 1;
  if (channels_adjacent && !(positions_adjacent && positions > 1)) {
    return sum_channels_in_lanes<Op>(a, b, in, positions, channels, shift, sums);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double channel_shift = shift == nullptr ? 0.0 : shift[c];
    if (positions_adjacent) {
      sum_positions_in_lanes<Op>(in, positions, channel_shift, sums + c * Op::kSums);
    } else {
      sum_any_strides<Op>(a, b, in, positions, channel_shift, sums + c * Op::kSums);
    }
    in.x += a.channel_stride;
    in.y += b.channel_stride;
  }
}

template <class Op>
PCAFAST_MULTIARCH void sum_tasks(const ChannelView& a, const ChannelView& b, const Tasks& tasks, const double* shift,
                                 double* sums, int64_t begin, int64_t end) {
  with_element_type(a.dtype, [&](auto element) {
    for (int64_t task = begin; task < end; ++task) sum_task<Op, decltype(element)>(a, b, tasks, task, shift, sums);
  });
}

// How many doubles `sums` of sum_over_positions has room for: (examples, parts, channels, kSums).
template <class Op>
int64_t size_of_sums(const ChannelView& x) {
  return x.examples * Tasks(x).parts * x.channels * Op::kSums;
}

// `shift` has one value for each channel, or is null for zeros.
template <class Op>
void sum_over_positions(const ChannelView& a, const ChannelView& b, const double* shift, double* sums) {
  const Tasks tasks(a);
  const int64_t elements = std::min(tasks.block_channels, a.channels) * std::min(kPartPositions, a.positions);
  at::parallel_for(0, a.examples * tasks.parts * tasks.blocks, std::max<int64_t>(1, kGrainElements / elements),
                   [&](int64_t begin, int64_t end) { sum_tasks<Op>(a, b, tasks, shift, sums, begin, end); });
}

}  // namespace pcafast::cpu
