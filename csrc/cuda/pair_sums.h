// What is decided between the passes and before a batch is merged into the state.
#pragma once

#include "elements.h"
#include "pair_plan.h"

namespace pcafast::cuda {

constexpr int kSumThreads = 256;

// One block.
__global__ void __launch_bounds__(1024) add_weights(PairBatch batch) {
  __shared__ double sums[1024 / kWarp];
  const int64_t samples = batch.slot[0].count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < samples; i += blockDim.x) sum += batch.x.weight[i];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) sum += sums[warp];
  *batch.weight = sum;
}

// Numbers that come with a launch, so that it can be recorded and played again.
struct Numbers {
  static constexpr int kMost = 448;
  int64_t* out;
  int count;
  int64_t values[kMost];
};
// One block. Takes the tables to the workspace.
__global__ void __launch_bounds__(kSumThreads) write_numbers(Numbers numbers) {
  for (int i = threadIdx.x; i < numbers.count; i += blockDim.x) numbers.out[i] = numbers.values[i];
}

// The shift of the first pass, near the mean of every channel: a warp takes a few samples of it from all over a
// lattice. Those as they are need none.
__global__ void __launch_bounds__(kSumThreads)
    choose_shift(PairBatch batch, Lattice lattice, bool raw, Numbers numbers) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) batch.verdicts[0] = batch.verdicts[1] = {};
    for (int i = threadIdx.x; i < numbers.count; i += blockDim.x) numbers.out[i] = numbers.values[i];
  }
  const int64_t channel = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) / kWarp;
  if (channel >= batch.x.channels) return;
  const Samples& x = batch.x;
  constexpr int kSamples = 64;
  double sum = 0, taken = 0;
  for (int i = threadIdx.x % kWarp; i < kSamples && !raw; i += kWarp) {
    const auto part = [&](int64_t size, int odd) { return size * (i * odd % kSamples) / kSamples; };
    const int64_t example = part(x.examples, 1), row = part(lattice.rows, 37), column = part(lattice.columns, 23);
    if (x.weight != nullptr && x.weight[(example * lattice.rows + row) * lattice.columns + column] == 0) continue;
    const int64_t offset = lattice.first + example * x.example_stride + row * x.row_stride + column * x.column_stride;
    sum += to_real(element<Any>(x.data, x.dtype, offset + channel * x.channel_stride));
    ++taken;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
    taken += __shfl_xor_sync(kFullWarp, taken, offset);
  }
  if (threadIdx.x % kWarp > 0) return;
  double shift = taken > 0 && isfinite(sum) ? sum / taken : 0;
  if (x.dtype != Dtype::kFloat64) shift = static_cast<float>(shift);
  batch.shift[channel] = shift;
}

// Whether the first pass will do for a channel, of all samples that are their own partners; and the shift of the second
// one.
__device__ inline void judge_channel(const PairBatch& batch, bool raw, int64_t channel, double sum, double square,
                                     double count) {
  const double mean = count > 0 ? sum / count : 0;
  double shift = batch.shift[channel] + (isfinite(mean) ? mean : 0);
  if (batch.x.dtype != Dtype::kFloat64) shift = static_cast<float>(shift);
  batch.shift[batch.x.channels + channel] = isfinite(shift) ? shift : 0;

  constexpr double kLargest = 0x1p90, kSmallest = 0x1p-90;
  Verdict& verdict = batch.verdicts[0];
  if (!(square <= kLargest * count)) verdict.huge = 1;
  if (square >= kSmallest * count) verdict.sizeable = 1;
  if (sum * mean > (raw ? 8.0 / 9 : 0.5) * square) verdict.uncentred = 1;
}

// A thread to a channel.
__global__ void __launch_bounds__(kSumThreads) judge(PairBatch batch, bool raw) {
  const int64_t channel = int64_t{blockIdx.x} * kSumThreads + threadIdx.x, channels = batch.x.channels;
  if (channel >= channels) return;
  double sum = 0, square = 0, count = 0;
  for (int64_t s = 0; s < batch.slots; ++s) {
    const Slot& slot = batch.slot[s];
    if (!slot.symmetric) continue;
    sum += batch.left[s * channels + channel] * slot.count;
    square += batch.square[s * channels + channel];
    count += slot.count;
  }
  judge_channel(batch, raw, channel, sum, square, count);
}

// A warp to a channel of a slot: adds up what the blocks left of it. If there is but one slot, it needs no judge.
__global__ void __launch_bounds__(kSumThreads) add_channel_sums(PairBatch batch, int pass, bool raw) {
  if (pass > 0 && !second_pass(batch.verdicts[0], batch.x.dtype)) return;
  const int64_t channel = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) / kWarp;
  if (channel >= batch.x.channels) return;
  const unsigned bundle = static_cast<unsigned>(channel) / static_cast<unsigned>(batch.bundle);
  const unsigned in_bundle = channel - bundle * batch.bundle, side = batch.tile, tile = in_bundle / side;
  const unsigned within = in_bundle % side;
  const Slot& slot = batch.slot[blockIdx.y];
  double left = 0, right = 0, square = 0;
  for (int64_t e = slot.begin; e < slot.end; ++e) {
    const Lattice& lattice = batch.lattices[batch.entries[e]];
    const int64_t of_left = batch.pair(slot.symmetric, tile, slot.symmetric ? tile : 0);
    const int64_t apart = batch.record(lattice, kWarp, bundle, of_left) - batch.record(lattice, 0, bundle, of_left);
    const int lane = threadIdx.x % kWarp;
    const double* of_row = batch.record(lattice, lane, bundle, of_left);
    const double* of_column = batch.record(lattice, lane, bundle, tile);
    for (int rest = lattice.pieces - lane; rest > 0; rest -= kWarp, of_row += apart, of_column += apart) {
      left += of_row[within];
      if (slot.symmetric) {
        square += batch.product(of_row, within, within);
      } else {
        right += of_column[side + within];
      }
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    left += __shfl_xor_sync(kFullWarp, left, offset);
    right += __shfl_xor_sync(kFullWarp, right, offset);
    square += __shfl_xor_sync(kFullWarp, square, offset);
  }
  if (threadIdx.x % kWarp > 0) return;
  const double count = batch.count(slot),
               inverse = pass > 0 ? 1 / unit_of_second_pass(batch.verdicts[0], batch.x.dtype) : 1;
  if (pass == 0 && batch.slots == 1) {
    slot.symmetric ? judge_channel(batch, raw, channel, left, square, count)
                   : judge_channel(batch, raw, channel, 0, 0, 0);
  }
  if (!isfinite(left + right + square)) batch.verdicts[pass].nonfinite = 1;
  if (slot.symmetric) right = left;
  const int64_t at = blockIdx.y * batch.x.channels + channel;
  batch.left[at] = count > 0 ? left / count * inverse : 0;
  batch.right[at] = count > 0 ? right / count * inverse : 0;
  batch.square[at] = square * inverse * inverse;
}

}  // namespace pcafast::cuda
