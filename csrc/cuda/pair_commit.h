// Merges a batch into the state by the pairwise formula of Chan, Golub and LeVeque (1979), unless it is not finite.
#pragma once

#include "pair_sums.h"

namespace pcafast::cuda {

constexpr unsigned kCommitRows = 16;  // rows of threads of a block, at most

__device__ inline int last_pass(const PairBatch& batch) { return second_pass(batch.verdicts[0], batch.x.dtype); }
__device__ inline bool is_finite(const PairBatch& batch) { return batch.verdicts[last_pass(batch)].nonfinite == 0; }

// Lanes (x) take neighbouring columns of a row of a slot's matrix; neighbours in y, `shares` of them, share the pieces.
__global__ void __launch_bounds__(kWarp* kCommitRows)
    commit_products(PairBatch batch, PairState state, unsigned shares) {
  __shared__ double shared[kCommitRows][kWarp];
  const unsigned width = batch.x.channels / batch.x.groups, strips = (width + kWarp - 1) / kWarp;
  const unsigned rows = blockDim.y / shares, line = blockIdx.x / strips, strip = blockIdx.x % strips;
  const unsigned lines = (width + rows - 1) / rows, group = line / lines, first_row = line % lines * rows;
  const unsigned row = first_row + threadIdx.y / shares, share = threadIdx.y % shares;
  const unsigned column = strip * kWarp + threadIdx.x;
  const Slot& slot = batch.slot[blockIdx.y];
  const double added = batch.count(slot);
  if (added == 0 || !is_finite(batch) || (slot.symmetric && (strip + 1) * kWarp <= first_row)) return;

  // Where the products are: (i, j) are channels, threads to spare repeat the last row and column.
  const unsigned tile = batch.tile, i = group * width + min(row, width - 1), j = group * width + min(column, width - 1);
  const unsigned bundle = i / static_cast<unsigned>(batch.bundle), before = bundle * batch.bundle;
  const unsigned upper = slot.symmetric ? max(i, j) : j;  // below the diagonal there are none
  const int64_t pair = batch.pair(slot.symmetric, (i - before) / tile, (upper - before) / tile);
  const unsigned tile_row = (i - before) % tile, tile_column = (upper - before) % tile;
  double sum = 0;
  for (int64_t e = slot.begin; e < slot.end; ++e) {
    const Lattice& lattice = batch.lattices[batch.entries[e]];
    const int64_t apart = batch.record(lattice, shares, bundle, pair) - batch.record(lattice, 0, bundle, pair);
    const double* record = batch.record(lattice, share, bundle, pair);
#pragma unroll 4
    for (int left = lattice.pieces - share; left > 0; left -= shares, record += apart) {
      sum += batch.product(record, tile_row, tile_column);
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (share > 0 || row >= width || column >= width || (slot.symmetric && column < row)) return;
  for (unsigned other = 1; other < shares; ++other) sum += shared[threadIdx.y + other][threadIdx.x];

  const int pass = last_pass(batch);
  const double unit = pass > 0 ? unit_of_second_pass(batch.verdicts[0], batch.x.dtype) : 1;
  const int64_t channels = batch.x.channels, of_slot = blockIdx.y * channels;
  const double left = batch.left[of_slot + i], right = batch.right[of_slot + j];
  const double count = state.count[blockIdx.y], total = count + added;
  const double* const shift = batch.shift + pass * channels;
  const double* const right_means = state.right == nullptr ? state.left : state.right;
  const double from_left = (shift[i] + left) * state.scale - state.left[of_slot + i];
  const double from_right = (shift[j] + right) * state.scale - right_means[of_slot + j];
  const double centred = sum / unit / unit - added * left * right;
  double* const square = state.comoment + (blockIdx.y * channels + group * width) * width;
  double& at = square[int64_t{row} * width + column];
  at += centred * state.scale * state.scale + from_left * from_right * (count * added / total);
  if (slot.symmetric) square[int64_t{column} * width + row] = at;
}

// A block to a slot: means, then the count.
__global__ void __launch_bounds__(kSumThreads) commit_means(PairBatch batch, PairState state) {
  const Slot& slot = batch.slot[blockIdx.x];
  const double added = batch.count(slot), count = state.count[blockIdx.x], total = count + added;
  const int64_t channels = batch.x.channels, of_slot = blockIdx.x * channels;
  const double* const shift = batch.shift + last_pass(batch) * channels;
  const bool finite = is_finite(batch);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (!finite) *state.skipped += 1;
    if (finite && state.patches != nullptr) *state.patches += state.added_patches;
  }
  if (added == 0 || !finite) return;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const auto merge = [&](double& mean, double of_batch) {
      mean += ((shift[c] + of_batch) * state.scale - mean) * (added / total);
    };
    merge(state.left[of_slot + c], batch.left[of_slot + c]);
    if (state.right != nullptr) merge(state.right[of_slot + c], batch.right[of_slot + c]);
  }
  __syncthreads();
  if (threadIdx.x == 0) state.count[blockIdx.x] = total;
}

}  // namespace pcafast::cuda
