// Taylor sums on the GPU, in three launches. First every example and channel is summed over its positions, in units of
// a part of one example, one example or several; then the units of each channel are put together; then one block adds
// the batch to the running sums, if all of it is finite. Every sum has a fixed order, and how the work is cut depends
// on sizes, strides and alignment alone, so the result is the same bit for bit every time.
#include <algorithm>

#include "device.h"
#include "kernels_cuda.h"
#include "taylor_sums.h"

namespace pcafast::cuda {
namespace {

using namespace taylor;

// A block to each channel. `lanes` neighbours share the parts of a group of examples.
__global__ void __launch_bounds__(kThreads)
    sum_units(const Sums* units, Plan plan, int64_t positions, int lanes, Sums* batch) {
  const int64_t channel = blockIdx.x, channels = gridDim.x;
  const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  Sums total;
  for (int64_t first = 0; first < plan.groups; first += groups) {
    const int64_t group = first + threadIdx.x / lanes;
    Sums sum;
    for (int64_t part = lane; group < plan.groups && part < plan.parts; part += lanes) {
      const Sums unit = units[(group * plan.parts + part) * channels + channel];
      for (int r = 0; r < kSums; ++r) sum.values[r] += unit.values[r];
    }
    for (double& value : sum.values) value = sum_over_lanes(value, lanes);
    if (plan.examples == 1) {  // only now whole: blocks, or threads of one, had parts of it
      const double s = sum.values[kSigned];
      sum.values[kMagnitude] = fabs(s);
      sum.values[kSquare] = s * s;
    }
    for (int r = 0; r < kSums; ++r) total.values[r] += lane == 0 ? sum.values[r] : 0;
  }

  __shared__ double shared[kSums][kThreads / kWarp];
  for (int r = 0; r < kSums; ++r) {
    const double sum = sum_over_lanes(total.values[r], kWarp);
    if (threadIdx.x % kWarp == 0) shared[r][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int r = threadIdx.x;
    double sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += shared[r][warp];
    batch[channel].values[r] = r == kMagnitude || r == kSquare ? sum / positions : sum;
  }
}

// One block.
__global__ void __launch_bounds__(kThreads) commit(TaylorArgs args, const Sums* batch, int64_t channels) {
  bool finite = true;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    for (double value : batch[c].values) finite &= isfinite(value);
  }
  finite = __syncthreads_and(finite);
  for (int64_t c = threadIdx.x; finite && c < channels; c += blockDim.x) {
    for (int r = 0; r < kSums; ++r) args.sums[r * channels + c] += batch[c].values[r];
  }
  if (threadIdx.x > 0) return;
  if (finite) {
    *args.examples += args.activation.examples;
    *args.positions += args.activation.examples * args.activation.positions;
  } else {
    *args.skipped += 1;
  }
}

using Kernel = void (*)(ChannelView, ChannelView, double, Plan, Sums*);

struct Choice {
  Kernel kernel;
  dim3 block;
  Plan plan;
};

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int power_of_two(int64_t at_least, int most) {
  int result = 1;
  while (result < at_least && result < most) result *= 2;
  return result;
}

// Aims at kBlocks blocks: an example is cut into parts where there are fewer, and several examples of few positions
// make one unit where there are more, because the Sums of each cost as much traffic as 8 to 16 positions. A block takes
// `rows` of several examples at a time.
Plan cut(const ChannelView& x, int64_t tiles, int64_t rows) {
  constexpr int64_t kBlocks = 1024, kFewPositions = 256, kPartPositions = 512;
  const int64_t blocks = x.examples * tiles;
  Plan plan = {1, x.examples, x.positions, 1, static_cast<int>(tiles)};
  if (x.positions < kFewPositions && blocks > kBlocks) {
    plan.examples = rows * std::clamp<int64_t>(blocks / (kBlocks * rows), 1, ceil_div(kFewPositions, x.positions));
    plan.groups = ceil_div(x.examples, plan.examples);
  } else {
    const int64_t parts = std::clamp<int64_t>(kBlocks / blocks, 1, ceil_div(x.positions, kPartPositions));
    plan.positions = ceil_div(ceil_div(x.positions, parts), 64) * 64;
    plan.parts = static_cast<int>(ceil_div(x.positions, plan.positions));
  }
  return plan;
}

// The stride of a dimension of size one is arbitrary; zero suits every layout.
ChannelView normalised(ChannelView x) {
  if (x.examples == 1) x.example_stride = 0;
  if (x.channels == 1) x.channel_stride = 0;
  if (x.positions == 1) x.position_stride = 0;
  return x;
}

// Positions side by side, and vectors of both operands at the same positions of every row.
template <typename T>
bool rows_fit(const ChannelView& a, const ChannelView& g) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(g.data);
  return a.position_stride == 1 && g.position_stride == 1 && apart % 16 == 0 &&
         (a.example_stride - g.example_stride) % kRowWidth<T> == 0 &&
         (a.channel_stride - g.channel_stride) % kRowWidth<T> == 0;
}

// Channels side by side, in aligned groups of `width`.
template <typename T>
bool columns_fit(const ChannelView& x, int width) {
  return x.channel_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % (width * sizeof(T)) == 0 &&
         x.channels % width == 0 && x.example_stride % width == 0 && x.position_stride % width == 0;
}

template <typename T>
Choice rows(const ChannelView& a) {
  const int lanes = power_of_two(ceil_div(a.positions, 2 * kRowWidth<T>), kWarp);
  const dim3 block(lanes, kThreads / lanes);
  return {sum_rows<T>, block, cut(a, ceil_div(a.channels, block.y), 1)};
}

template <typename T, int kWidth>
Choice columns(const ChannelView& a) {
  const int lanes = power_of_two(ceil_div(a.channels, kWidth), kWarp);
  const dim3 block(lanes, kThreads / lanes);
  return {sum_columns<T, kWidth>, block, cut(a, ceil_div(a.channels, lanes * kWidth), block.y)};
}

template <typename T>
Choice choose(const ChannelView& a, const ChannelView& g) {
  constexpr int kWidth = sizeof(T) == 8 ? 2 : 4;  // channels to a thread; more would take too many registers
  if (rows_fit<T>(a, g)) return rows<T>(a);
  if (columns_fit<T>(a, kWidth) && columns_fit<T>(g, kWidth)) return columns<T, kWidth>(a);
  if (columns_fit<T>(a, 1) && columns_fit<T>(g, 1)) return columns<T, 1>(a);
  return rows<Any>(a);
}

Choice choose(const ChannelView& a, const ChannelView& g) {
  if (a.dtype != g.dtype) return rows<Any>(a);
  switch (a.dtype) {
    case Dtype::kFloat16:
      return choose<Float16>(a, g);
    case Dtype::kBFloat16:
      return choose<BFloat16>(a, g);
    case Dtype::kFloat32:
      return choose<float>(a, g);
    default:
      return choose<double>(a, g);
  }
}

bool empty(const ChannelView& x) { return x.examples == 0 || x.channels == 0 || x.positions == 0; }

}  // namespace

int64_t taylor_workspace(const TaylorArgs& args) {
  if (empty(args.activation)) return 0;
  const Plan plan = choose(normalised(args.activation), normalised(args.gradient)).plan;
  return (plan.groups * plan.parts + 1) * args.activation.channels * kSums;
}

void taylor_update(const TaylorArgs& args, cudaStream_t stream) {
  const ChannelView a = normalised(args.activation), g = normalised(args.gradient);
  Sums* const batch = reinterpret_cast<Sums*>(args.workspace);
  Sums* const units = batch + a.channels;
  if (!empty(a)) {
    const auto [kernel, block, plan] = choose(a, g);
    const int64_t blocks = plan.groups * plan.parts * plan.tiles;
    launch(kernel, dim3(blocks), block, 0, stream, a, g, args.scale, plan, units);
    const int lanes = power_of_two(plan.parts, kWarp);
    const int threads = power_of_two(std::max<int64_t>(plan.groups * lanes, kWarp), kThreads);
    launch(sum_units, dim3(a.channels), dim3(threads), 0, stream, units, plan, a.positions, lanes, batch);
  }
  launch(commit, dim3(1), dim3(kThreads), 0, stream, args, batch, empty(a) ? 0 : a.channels);
}

}  // namespace pcafast::cuda
