// The products of pairs of samples: each block those of two tiles of channels, over one piece of a lattice.
#pragma once

#include "pair_double.h"
#include "pair_half.h"
#include "pair_plan.h"
#include "pair_single.h"
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

struct TilePair {
  int64_t piece;
  unsigned bundle, row, column;
};
__device__ inline TilePair this_pair(const PairBatch& batch, const Lattice& lattice) {
  const unsigned pairs = batch.pairs(lattice.symmetric), bundles = batch.bundles;
  const unsigned index = blockIdx.x - static_cast<unsigned>(lattice.first_block), unit = index / pairs;
  unsigned pair = index - unit * pairs, row = 0;
  for (unsigned length = batch.tiles; pair >= length; ++row) {
    pair -= length;
    if (lattice.symmetric) --length;
  }
  return {unit / bundles, unit % bundles, row, lattice.symmetric ? row + pair : pair};
}

__device__ inline Task task_of(const PairBatch& batch, const Lattice& lattice, const TilePair& pair) {
  const int64_t samples = batch.x.examples * lattice.rows * lattice.columns, begin = pair.piece * lattice.piece;
  Task task = {begin, static_cast<int>(min(lattice.piece, samples - begin)), {}, {}, false};
#pragma unroll
  for (int o = 0; o < 2; ++o) {
    const int64_t within = int64_t{o == 0 ? pair.row : pair.column} * batch.tile;
    task.first[o] = pair.bundle * batch.bundle + within;
    const int64_t channels = min(batch.bundle - within, batch.x.channels - task.first[o]);
    task.channels[o] = static_cast<int>(min(channels, int64_t{batch.tile}));
  }
  task.same = lattice.symmetric && pair.row == pair.column && batch.x.weight == nullptr;
  return task;
}

// Blocks that a multiprocessor has registers for.
template <class Tiling, int kWidth>
constexpr int kResident =
    Tiling::kTile == 64 ? (kWidth > 1 ? Tiling::Kind::kResident : 3) : (Tiling::kWarpRows == 64 ? 2 : 1);

template <class Tiling, template <class, typename, int> class Staging, typename T, int kWidth>
__global__ void __launch_bounds__(Tiling::kThreads, kResident<Tiling, kWidth>)
    multiply_pairs(PairBatch batch, int pass) {
  using Kind = typename Tiling::Kind;
  using Sum = typename Kind::Sum;
  using Staged = typename Kind::Staged;
  if (pass > 0 && !second_pass(batch.verdicts[0], batch.x.dtype)) return;

  const Lattice lattice = this_lattice(batch);
  const TilePair pair = this_pair(batch, lattice);
  const Task task = task_of(batch, lattice, pair);
  const Samples& x = batch.x;
  Staged* const memory = dynamic_shared<Staged>();
  Sum* const offsets = reinterpret_cast<Sum*>(memory + 2 * Kind::kStages * Tiling::kElements);
  Step* const step = reinterpret_cast<Step*>(offsets + 2 * Tiling::kTile);
  if (threadIdx.x == 0) {
    *step = Step(x, lattice, Walk<Tiling, kWidth>::kStep,
                 lattice.partner + (task.first[1] - task.first[0]) * x.channel_stride);
  }
  const Sum unit = pass > 0 ? unit_of_second_pass(batch.verdicts[0], x.dtype) : 1;
  for (int i = threadIdx.x; i < 2 * Tiling::kTile; i += Tiling::kThreads) {  // the channels of both tiles
    const bool of_right = i >= Tiling::kTile;
    const int channel = i % Tiling::kTile;
    const double* const shift = batch.shift + pass * x.channels + (of_right ? task.first[1] : task.first[0]);
    const int channels = of_right ? task.channels[1] : task.channels[0];
    offsets[i] = channel < channels ? static_cast<Sum>(shift[channel]) * unit : 0;
  }
  __syncthreads();

  const int chunks = (task.samples + Tiling::kChunk - 1) / Tiling::kChunk;
  const int warp = threadIdx.x / kWarp, side = warp % 2;
  const int row = warp / 2 * Tiling::kWarpRows, column = side * Tiling::kWarpColumns;
  const bool diagonal = lattice.symmetric && pair.row == pair.column;
  // Or lies beyond the channels, or below the diagonal.
  const bool multiplies =
      row < task.channels[0] && column < task.channels[1] && !(diagonal && row >= column + Tiling::kWarpColumns);
  // One column of warps adds up the left samples, the other one the right ones: each in one of the pairs they are in.
  const bool of_this_pair =
      side == 0 ? diagonal || (!lattice.symmetric && pair.column == 0) : !lattice.symmetric && pair.row == 0;
  const bool adds = of_this_pair && row < (side == 0 ? task.channels[0] : task.channels[1]);
  double* const record = batch.record(blockIdx.x);
  Sum* const out = reinterpret_cast<Sum*>(record + 2 * Tiling::kTile);

  typename Kind::template Warp<Tiling> products(reinterpret_cast<double*>(step + 1) + threadIdx.x * Kind::kSums);
  Staging<Tiling, T, kWidth> staging(x, lattice, task, step, chunks, memory);
  staging.begin(offsets, unit);
  for (int begin = 0; begin < chunks; begin += Kind::kDrain) {
    const int end = min(chunks - begin, Kind::kDrain) + begin;
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
      const Staged* const left = staging.arrive(chunk);
      const Staged* const right = left + (task.same ? 0 : Tiling::kElements);
      if (multiplies) products.multiply(left, right, row, column);
      if (adds) products.add_sums(side == 0 ? left : right, row);
      staging.leave(chunk);
    }
    if (multiplies) products.drain(out, row, column, begin == 0);
  }
  if (adds) products.write_sums(record + side * Tiling::kTile, row);
}

}  // namespace pcafast::cuda
