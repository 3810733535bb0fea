// Sums over the positions of every channel, in one read, for each of the layouts that activations come in. What is
// summed is up to an Op:
//
//   kOperands          how many tensors are read together, x[kOperands], all of the same sizes
//   kByExample         whether the sums of an example must be whole before they are added to those of the others
//   Sum                what one thread sums over positions of one channel; begin<T>(channel) makes it
//   Sum.add<kMost>(valid, value)   value(operand, k) for the k < kMost that are valid(k)
//   Sum.values         if kByExample: what to add up over the threads before add_example
//   add_example(total, sum)        adds a Sum to the Sums of a channel
//   whole_example(sums)            if kByExample: the same for the Sums of one example that were added up in parts
#pragma once

#include "../kernels.h"
#include "elements.h"

namespace pcafast::cuda {

constexpr int kThreads = 256;

// Of one channel.
constexpr int kSums = 4;
struct alignas(16) Sums {
  double values[kSums];

  __device__ void add(const Sums& other) {
    for (int r = 0; r < kSums; ++r) values[r] += other.values[r];
  }
};

// How the batch is cut into units: groups of examples, each in parts by position. A group of several examples has one
// part. A block sums one unit for one tile of channels.
struct Plan {
  int examples, positions;  // examples in each group, positions in each part
  int64_t groups;
  int parts, tiles;
};

struct Unit {
  int64_t index, first_example, first_position, tile;
  int examples, positions;
};

__device__ inline Unit this_unit(const Plan& plan, const ChannelView& x) {
  const unsigned parts = plan.parts, tiles = plan.tiles, index = blockIdx.x / tiles;
  const int64_t example = int64_t{index / parts} * plan.examples;
  const int64_t position = int64_t{index % parts} * plan.positions;
  return {index,
          example,
          position,
          blockIdx.x % tiles,
          static_cast<int>(min(int64_t{plan.examples}, x.examples - example)),
          static_cast<int>(min(int64_t{plan.positions}, x.positions - position))};
}

// Over neighbouring lanes, a power of two of them; each gets the sum. The whole warp must call it.
template <int kValues>
__device__ void sum_over_lanes(double (&values)[kValues], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    for (double& value : values) value += __shfl_xor_sync(kFullWarp, value, offset);
  }
}

// Takes i = share, share + shares, ... below end, kCount at a time: load(i) of each, in this order, then use(loaded,
// valid). So kCount loads are on their way before the first is needed. loaded[k] is zero unless valid(k). `shares` is a
// power of two.
template <int kCount, typename Load, typename Use>
__device__ void in_batches(int share, int shares, int end, Load load, Use use) {
  const int each = end >> (__ffs(shares) - 1);           // how many every share has,
  const int own = each + (share < end - each * shares);  // and this one
  int done = 0;
  const auto batch = [&](auto valid) {
    decltype(load(0)) loaded[kCount] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (valid(k)) loaded[k] = load(share + (done + k) * shares);
    }
    use(loaded, valid);
  };
  for (; done + kCount <= each; done += kCount) batch([](int) { return true; });
  if (done < own) batch([left = own - done](int k) { return k < left; });
}

// One load of each operand.
template <typename Loaded, int kOperands>
struct Loads {
  Loaded of[kOperands];
};

// Elements to a load where positions lie side by side.
template <typename T>
constexpr int kRowWidth = std::is_same_v<T, Any> ? 1 : 16 / sizeof(T);

// Loads of each operand on their way at once, of a thread that walks along positions.
template <class Op>
constexpr int kRowLoads = 4 / Op::kOperands;

// This lane's share of `count` positions from `start[operand]` on, which counts elements. Unless T is Any they lie side
// by side in memory, whole vectors beginning at the same position in all operands (rows_fit).
template <typename T, class Op>
__device__ void add_row(const Op& op, const int64_t (&start)[Op::kOperands], int count, typename Op::Sum& sum) {
  constexpr int kWidth = kRowWidth<T>, kOperands = Op::kOperands;
  constexpr bool kAny = std::is_same_v<T, Any>;
  const int lane = threadIdx.x, lanes = blockDim.x;
  int head = 0, vectors = 0;  // elements before the first whole vector; vectors
  if constexpr (!kAny) {
    const T* row[kOperands];
    for (int o = 0; o < kOperands; ++o) row[o] = static_cast<const T*>(op.x[o].data) + start[o];
    const int misaligned = reinterpret_cast<uintptr_t>(row[0]) / sizeof(T) % kWidth;
    head = (kWidth - misaligned) % kWidth;
    vectors = (count - head) / kWidth;  // none if count < head
    in_batches<kRowLoads<Op>>(
        lane, lanes, vectors,
        [&](int i) {
          Loads<Vector<T, kWidth>, kOperands> loads;
          for (int o = 0; o < kOperands; ++o) loads.of[o] = load<kWidth>(row[o] + (head + i * kWidth));
          return loads;
        },
        [&](const auto& loads, auto valid) {
#pragma unroll
          for (int k = 0; k < kRowLoads<Op>; ++k) {
            if (!valid(k)) break;
            sum.template add<kWidth>([](int) { return true; },
                                     [&](int o, int i) { return to_real(loads[k].of[o][i]); });
          }
        });
  }
  constexpr int kSingly = kAny ? 8 / kOperands : 4;
  in_batches<kSingly>(
      lane, lanes, count - vectors * kWidth,
      [&](int i) {
        const int64_t position = i < head ? i : i + vectors * kWidth;
        Loads<T, kOperands> loads;
        for (int o = 0; o < kOperands; ++o) {
          const ChannelView& x = op.x[o];
          loads.of[o] = element<T>(x.data, x.dtype, start[o] + (kAny ? position * x.position_stride : position));
        }
        return loads;
      },
      [&](const auto& loads, auto valid) {
        sum.template add<kSingly>(valid, [&](int o, int k) { return to_real(loads[k].of[o]); });
      });
}

// Positions across the lanes (x), channels across the rows of threads (y).
template <typename T, class Op>
__global__ void __launch_bounds__(kThreads, 4) sum_rows(Op op, Plan plan, Sums* units) {
  const Unit unit = this_unit(plan, op.x[0]);
  const int64_t own = unit.tile * blockDim.y + threadIdx.y;
  const int64_t channel = min(own, op.x[0].channels - 1);  // rows to spare repeat the last channel
  Sums total = {};
  auto sum = op.template begin<T>(channel);
  int64_t start[Op::kOperands];
  for (int o = 0; o < Op::kOperands; ++o) {
    const ChannelView& x = op.x[o];
    start[o] =
        unit.first_example * x.example_stride + channel * x.channel_stride + unit.first_position * x.position_stride;
  }
  for (int n = 0; n < unit.examples; ++n) {
    add_row<T>(op, start, unit.positions, sum);
    for (int o = 0; o < Op::kOperands; ++o) start[o] += op.x[o].example_stride;
    if constexpr (Op::kByExample) {
      sum_over_lanes(sum.values, blockDim.x);
      op.add_example(total, sum);
      sum = op.template begin<T>(channel);
    }
  }
  if constexpr (!Op::kByExample) {
    op.add_example(total, sum);
    sum_over_lanes(total.values, blockDim.x);
  }
  if (threadIdx.x == 0 && own == channel) units[unit.index * op.x[0].channels + channel] = total;
}

// Channels across the lanes (x), kWidth to each, which lie side by side in memory. The rows of threads (y) share the
// positions of the unit's example, or its examples if it has several.
template <typename T, int kWidth, class Op>
__global__ void __launch_bounds__(kThreads, kWidth == 1 ? 4 : 2) sum_columns(Op op, Plan plan, Sums* units) {
  constexpr int kOperands = Op::kOperands;
  constexpr int kLoads = kWidth > 1 ? 128 / (kWidth * sizeof(T)) : sizeof(T) < 8 ? 16 : 8;  // on their way at once
  constexpr int kCount = kLoads / kOperands;
  const Unit unit = this_unit(plan, op.x[0]);
  const int lanes = blockDim.x, lane = threadIdx.x, rows = blockDim.y, row = threadIdx.y;
  const int64_t own = (unit.tile * lanes + lane) * kWidth;
  const int64_t channel = min(own, op.x[0].channels - kWidth);  // lanes to spare repeat the last channels
  const bool several = plan.examples > 1;
  Sums total[kWidth] = {};
  typename Op::Sum sum[kWidth];
  for (int i = 0; i < kWidth; ++i) sum[i] = op.template begin<T>(channel + i);
  const int share = several ? 0 : row, shares = several ? 1 : rows;  // of the positions
  int64_t step[kOperands];
  for (int o = 0; o < kOperands; ++o) step[o] = shares * op.x[o].position_stride;
  for (int n = several ? row : 0; n < unit.examples; n += several ? rows : 1) {
    const T* at[kOperands];
    for (int o = 0; o < kOperands; ++o) {
      const ChannelView& x = op.x[o];
      at[o] = static_cast<const T*>(x.data) + (unit.first_example + n) * x.example_stride + channel +
              (unit.first_position + share) * x.position_stride;
    }
    in_batches<kCount>(
        share, shares, unit.positions,
        [&](int) {
          Loads<Vector<T, kWidth>, kOperands> loads;
          for (int o = 0; o < kOperands; ++o) {
            loads.of[o] = load<kWidth>(at[o]);
            at[o] += step[o];
          }
          return loads;
        },
        [&](const auto& loads, auto valid) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            sum[i].template add<kCount>(valid, [&](int o, int k) { return to_real(loads[k].of[o][i]); });
          }
        });
    if constexpr (Op::kByExample) {
      for (int i = 0; i < kWidth; ++i) {
        op.add_example(total[i], sum[i]);
        sum[i] = op.template begin<T>(channel + i);
      }
    }
  }
  if constexpr (!Op::kByExample) {
    for (int i = 0; i < kWidth; ++i) op.add_example(total[i], sum[i]);
  }

  __shared__ double shared[kSums][kThreads];
  const int thread = row * lanes + lane;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kSums; ++r) shared[r][thread] = total[c].values[r];
    __syncthreads();
    // Thread (lane, row) adds up values[row] of its lane.
    if (row < kSums && own == channel) {
      double sum = 0;
      for (int i = 0; i < rows; ++i) sum += shared[row][i * lanes + lane];
      units[unit.index * op.x[0].channels + channel + c].values[row] = sum;
    }
    __syncthreads();
  }
}

}  // namespace pcafast::cuda
