// The products of pairs of samples: each block those of two tiles of channels, over one piece of a lattice.
#pragma once

#include "pair_kinds.h"
#include "pair_plan.h"
#include "pair_staging.h"

namespace pcafast::cuda {

// The lattice of this block: the last that begins at it or before.
__device__ inline const Lattice& this_lattice(const PairBatch& batch) {
  int64_t low = 0, high = batch.lattice_count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (batch.lattices[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  return batch.lattices[low];
}

__device__ inline Task this_task(const PairBatch& batch, const Lattice& lattice) {
  const int64_t pairs = batch.pairs(lattice.symmetric), index = blockIdx.x - lattice.first_block;
  const int64_t piece = index / pairs / batch.x.groups;
  int64_t pair = index % pairs, row = 0;
  for (int64_t length = batch.tiles; pair >= length; ++row) {
    pair -= length;
    if (lattice.symmetric) --length;
  }
  const int64_t column = lattice.symmetric ? row + pair : pair;
  const int64_t samples = batch.x.examples * lattice.rows * lattice.columns, begin = piece * batch.piece;
  return {begin, min(begin + batch.piece, samples), index / pairs % batch.x.groups, row, column,
          lattice.symmetric && row == column && batch.x.weight == nullptr};
}

template <class Tiling, template <class, typename, int> class Staging, typename T, int kWidth>
__global__ void __launch_bounds__(Tiling::kThreads) multiply_pairs(PairBatch batch, int pass) {
  using Kind = typename Tiling::Kind;
  using Sum = typename Kind::Sum;
  using Staged = typename Kind::Staged;
  if (pass > 0 && !second_pass(batch.verdicts[0], batch.x.dtype)) return;

  const Lattice lattice = this_lattice(batch);
  const Task task = this_task(batch, lattice);
  const Samples& x = batch.x;
  Staged* const memory = dynamic_shared<Staged>();
  Sum* const offsets = reinterpret_cast<Sum*>(memory + 2 * Kind::kStages * Tiling::kElements);
  const Sum unit = pass > 0 ? unit_of_second_pass(batch.verdicts[0], x.dtype) : 1;
  for (int c = threadIdx.x; c < 2 * Tiling::kTile; c += Tiling::kThreads) {
    const int64_t channel = (c < Tiling::kTile ? task.row : task.column - 1) * Tiling::kTile + c;
    const double shift = batch.shift[pass * x.channels + task.group * x.width() + min(channel, x.width() - 1)];
    offsets[c] = static_cast<Sum>(shift) * unit;
  }
  __syncthreads();

  const int chunks = static_cast<int>((task.end - task.begin + Tiling::kChunk - 1) / Tiling::kChunk);
  const int warp = threadIdx.x / kWarp, row = warp / 2 * kWarpRows, column = warp % 2 * Tiling::kWarpColumns;
  const bool diagonal = lattice.symmetric && task.row == task.column;
  const bool multiplies = !diagonal || row < column + Tiling::kWarpColumns;  // or lies below the diagonal
  // One column of warps adds up the left samples, the other one the right ones: each in one of the pairs they are in.
  const bool adds = warp % 2 == 0 ? (lattice.symmetric ? diagonal : task.column == 0) : !lattice.symmetric && task.row == 0;
  double* const record = batch.records + blockIdx.x * batch.record_size();

  typename Kind::template Warp<Tiling> products;
  Staging<Tiling, T, kWidth> staging(x, lattice, task, chunks, memory);
  staging.begin(offsets, unit);
  int drained = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Staged* const left = staging.arrive(chunk);
    const Staged* const right = left + (task.same ? 0 : Tiling::kElements);
    if (multiplies) products.multiply(left, right, row, column);
    if (adds) products.add_sums(warp % 2 == 0 ? left : right, row);
    staging.leave(chunk);
    if (multiplies && (chunk + 1 == chunks || chunk + 1 - drained == Kind::kDrain)) {
      products.drain(record, row, column, drained == 0);
      drained = chunk + 1;
    }
  }
  if (adds) products.write_sums(record + Tiling::kTile * Tiling::kTile + warp % 2 * Tiling::kTile, row);
}

}  // namespace pcafast::cuda
