// From a batch to the Sums of each of its channels.
#pragma once

#include "channel_plan.h"

namespace pcafast::cuda {

// A block to each channel: adds up its units. `lanes` neighbours share the parts of a group of examples, or, if there
// is but one group, all threads do.
template <class Op>
__global__ void __launch_bounds__(kThreads) sum_units(const Sums* units, Plan plan, int lanes, Sums* batch) {
  const int64_t channel = blockIdx.x, channels = gridDim.x;
  const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  const bool one_group = plan.groups == 1;
  Sums total = {};
  for (int64_t first = 0; first < plan.groups; first += groups) {
    const int64_t group = first + threadIdx.x / lanes;
    Sums sum = {};
    in_batches<4>(
        lane, lanes, group < plan.groups ? plan.parts : 0,
        [&](int part) { return units[(group * plan.parts + part) * channels + channel]; },
        [&](const auto& loaded, auto) {
          for (const Sums& unit : loaded) sum.add(unit);
        });
    if (!one_group) {
      sum_over_lanes(sum.values, lanes);
      if constexpr (Op::kByExample) {
        if (plan.examples == 1) Op::whole_example(sum);  // blocks, or threads of one, had parts of it
      }
    }
    if (one_group || lane == 0) total.add(sum);
  }

  __shared__ Sums shared[kThreads / kWarp];
  sum_over_lanes(total.values, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total.add(shared[warp]);
  if constexpr (Op::kByExample) {
    if (one_group && plan.examples == 1) Op::whole_example(total);
  }
  batch[channel] = total;
}

// How many doubles sum_channels needs.
template <class Op>
int64_t sums_workspace(const Op& op) {
  const Plan plan = choose(op).plan;
  return (plan.groups * plan.parts + 1) * op.x[0].channels * kSums;
}

// Leaves the Sums of every channel at the beginning of the workspace.
template <class Op>
void sum_channels(const Op& op, double* workspace, cudaStream_t stream) {
  const int64_t channels = op.x[0].channels;
  Sums* const batch = reinterpret_cast<Sums*>(workspace);
  Sums* const units = batch + channels;
  auto [kernel, block, plan] = choose(op);
  launch(kernel, dim3(plan.groups * plan.parts * plan.tiles), block, 0, stream, op, plan, units);
  if (!Op::kByExample) {  // whose unit it is does not matter
    plan.parts *= plan.groups;
    plan.groups = 1;
  }
  const int lanes = power_of_two(plan.parts, plan.groups == 1 ? kThreads : kWarp);
  const int threads = power_of_two(std::max<int64_t>(plan.groups * lanes, kWarp), kThreads);
  launch(sum_units<Op>, dim3(channels), dim3(threads), 0, stream, units, plan, lanes, batch);
}

constexpr int kCommitThreads = 1024;  // of the one block that then adds the batch to the state

// Whether the batch counts. The whole block must call it.
__device__ inline bool all_finite(const Sums* batch, int64_t channels) {
  bool finite = true;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    for (double value : batch[c].values) finite &= isfinite(value);
  }
  return __syncthreads_and(finite);
}

}  // namespace pcafast::cuda
