// How the products of a batch are cut into blocks, and what lies where in the workspace. Both depend on sizes, strides,
// alignment and the device alone, so the result is the same bit for bit every time.
#pragma once

#include <vector>

#include "pair_samples.h"

namespace pcafast::cuda {

// A union of lattices, entries[begin] ... entries[end - 1], in device memory.
struct Slot {
  int64_t begin, end, symmetric;
  double count;  // of its samples
};

// What is known of the sums of a batch, as numbers that are zero or not.
struct Verdict {
  double nonfinite, uncentred, huge, sizeable;  // sizeable: squares are in float's range, and not all so small or zero
};

// Everything the kernels share; pointers are into the workspace.
struct PairBatch {
  Samples x;
  int64_t slots, lattice_count, tiles;  // tiles: of channels of a group
  int64_t piece;                        // samples of a lattice that a block takes
  int64_t blocks;
  int tile;  // channels

  Verdict* verdicts;  // of the first and the second pass
  double* weight;     // sum of the weights, if x has any
  Lattice* lattices;
  Slot* slot;
  int64_t* entries;
  double* shift;                  // [2][channels], of each pass
  double *left, *right, *square;  // [slots][channels]: means about the shift; sums of squares of symmetric slots
  double* records;                // of each block

  __host__ __device__ int64_t pairs(bool symmetric) const {
    return symmetric ? tiles * (tiles + 1) / 2 : tiles * tiles;
  }
  // Of tiles (row, column), row <= column if symmetric.
  __host__ __device__ int64_t pair(bool symmetric, int64_t row, int64_t column) const {
    return symmetric ? row * tiles - row * (row - 1) / 2 + column - row : row * tiles + column;
  }
  // A block leaves products (tile, tile), then sums of the left and of the right samples (tile).
  __host__ __device__ int64_t record_size() const { return int64_t{tile} * tile + 2 * tile; }
  __device__ const double* record(const Lattice& lattice, int64_t piece, int64_t group, int64_t pair) const {
    const int64_t all = pairs(lattice.symmetric);
    return records + (lattice.first_block + (piece * x.groups + group) * all + pair) * record_size();
  }
  __device__ double count(const Slot& slot) const { return x.weight == nullptr ? slot.count : *weight; }
};

// Very large and very small float32 are multiplied in the second pass, in other units.
__device__ inline double unit_of_second_pass(const Verdict& first, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return 1;
  return first.huge != 0 ? 0x1p-80 : first.sizeable != 0 ? 1 : 0x1p100;
}
__device__ inline bool second_pass(const Verdict& first, Dtype dtype) {
  return first.uncentred != 0 || (dtype != Dtype::kFloat64 && first.huge != 0) ||
         ((dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16) && first.sizeable == 0);
}

// Sums of the products of a batch: called by covariance.cu and patch_covariance.cu.
struct PairTables {
  std::vector<Lattice> lattices;  // all but first_block and pieces
  std::vector<Slot> slots;
  std::vector<int64_t> entries;
};
// Where the state is; `right` is null if it is `left`, `examples` and `patches` count what is not counted by slots.
struct PairState {
  double scale;
  double *count, *left, *right, *comoment;
  int64_t* skipped;
  double* patches;
  double added_patches;
};
int64_t pair_workspace(const Samples& x, const PairTables& tables);
void update_pairs(const Samples& x, const PairTables& tables, const PairState& state, double* workspace,
                  cudaStream_t stream);

}  // namespace pcafast::cuda
