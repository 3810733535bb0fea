// Which of the kernels of channel_sums.h reads a batch, and how the work is cut. Both depend on sizes, strides and
// alignment alone, so the result is the same bit for bit every time.
#pragma once

#include <algorithm>

#include "channel_sums.h"
#include "channel_view.h"

namespace pcafast::cuda {

inline int power_of_two(int64_t at_least, int most) {
  int result = 1;
  while (result < at_least && result < most) result *= 2;
  return result;
}

// Aims at kBlocks blocks: an example is cut into parts where there are fewer, and several examples of few positions
// make one unit where there are more, because the Sums of each cost as much traffic as 8 to 16 positions. A block takes
// `rows` of several examples at a time.
inline Plan cut(const ChannelView& x, int64_t tiles, int64_t rows) {
  constexpr int64_t kBlocks = 1024, kFewPositions = 256, kPartPositions = 256, kMostPositions = 1 << 30;
  const int64_t blocks = x.examples * tiles;
  int64_t examples = 1, positions = x.positions;
  if (x.positions < kFewPositions && blocks > kBlocks) {
    examples = rows * std::clamp<int64_t>(blocks / (kBlocks * rows), 1, ceil_div(kFewPositions, x.positions));
  } else {
    const int64_t parts = std::clamp<int64_t>(kBlocks / blocks, ceil_div(x.positions, kMostPositions),
                                              ceil_div(x.positions, kPartPositions));
    positions = ceil_div(ceil_div(x.positions, parts), 64) * 64;
  }
  return {static_cast<int>(examples), static_cast<int>(positions), ceil_div(x.examples, examples),
          static_cast<int>(ceil_div(x.positions, positions)), static_cast<int>(tiles)};
}

template <class Op>
struct Choice {
  void (*kernel)(Op, Plan, Sums*);
  dim3 block;
  Plan plan;
};

// Positions side by side, and vectors of all operands at the same positions of every row.
template <typename T, class Op>
bool rows_fit(const Op& op) {
  const ChannelView& first = op.x[0];
  return std::all_of(std::begin(op.x), std::end(op.x), [&](const ChannelView& x) {
    const uintptr_t apart = reinterpret_cast<uintptr_t>(x.data) - reinterpret_cast<uintptr_t>(first.data);
    return x.position_stride == 1 && apart % 16 == 0 && (x.example_stride - first.example_stride) % kRowWidth<T> == 0 &&
           (x.channel_stride - first.channel_stride) % kRowWidth<T> == 0;
  });
}

// Channels side by side, in aligned groups of kWidth.
template <typename T, int kWidth, class Op>
bool columns_fit(const Op& op) {
  return std::all_of(std::begin(op.x), std::end(op.x), [](const ChannelView& x) {
    return x.channel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % (kWidth * sizeof(T)) == 0 &&
           x.channels % kWidth == 0 && x.example_stride % kWidth == 0 && x.position_stride % kWidth == 0;
  });
}

template <typename T, class Op>
Choice<Op> rows(const Op& op) {
  const ChannelView& x = op.x[0];
  // Two batches of loads to a lane, or fewer, down to one load, where there would be more rows than channels.
  const int few = power_of_two(ceil_div(x.positions, 2 * kRowLoads<Op> * kRowWidth<T>), kWarp);
  const int many = power_of_two(ceil_div(x.positions, kRowWidth<T>), kWarp);
  const int lanes = std::clamp(kThreads / power_of_two(x.channels, kThreads), few, many);
  const dim3 block(lanes, kThreads / lanes);
  return {sum_rows<T, Op>, block, cut(x, ceil_div(x.channels, block.y), 1)};
}

template <typename T, int kWidth, class Op>
Choice<Op> columns(const Op& op) {
  const ChannelView& x = op.x[0];
  const int lanes = power_of_two(ceil_div(x.channels, kWidth), kWarp);
  const dim3 block(lanes, kThreads / lanes);
  return {sum_columns<T, kWidth, Op>, block, cut(x, ceil_div(x.channels, lanes * kWidth), block.y)};
}

template <typename T, class Op>
Choice<Op> choose_for(const Op& op) {
  constexpr int kWidth = sizeof(T) == 8 ? 2 : 4;  // channels to a thread; more would take too many registers
  if (rows_fit<T>(op)) return rows<T>(op);
  if (columns_fit<T, kWidth>(op)) return columns<T, kWidth>(op);
  if (columns_fit<T, 1>(op)) return columns<T, 1>(op);
  return rows<Any>(op);
}

template <class Op>
Choice<Op> choose(const Op& op) {
  const Dtype dtype = op.x[0].dtype;
  if (std::any_of(std::begin(op.x), std::end(op.x), [&](const ChannelView& x) { return x.dtype != dtype; })) {
    return rows<Any>(op);
  }
  switch (dtype) {
    case Dtype::kFloat16:
      return choose_for<Float16>(op);
    case Dtype::kBFloat16:
      return choose_for<BFloat16>(op);
    case Dtype::kFloat32:
      return choose_for<float>(op);
    default:
      return choose_for<double>(op);
  }
}

}  // namespace pcafast::cuda
