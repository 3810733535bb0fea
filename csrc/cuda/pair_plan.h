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

// Everything the kernels share; pointers are into the workspace. Groups of few channels are multiplied together,
// several to a tile, of which only products within a group count.
struct PairBatch {
  Samples x;
  int64_t slots, lattice_count;
  int64_t blocks;
  int tile;               // channels
  int64_t bundle, tiles;  // channels that are multiplied with each other, and tiles of them
  int64_t bundles;

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
  __device__ int64_t pair(bool symmetric, int64_t row, int64_t column) const {
    return symmetric ? row * tiles - row * (row - 1) / 2 + column - row : row * tiles + column;
  }
  __host__ __device__ bool is_double() const { return x.dtype == Dtype::kFloat64; }
  // A block leaves sums of the left and of the right samples (2, tile), then products (tile, tile): of doubles if x is
  // of doubles, else of floats.
  __host__ __device__ int64_t record_size() const { return 2 * tile + int64_t{tile} * tile / (is_double() ? 1 : 2); }
  __device__ double* record(int64_t block) const { return records + block * record_size(); }
  __device__ const double* record(const Lattice& lattice, int64_t piece, int64_t of_bundle, int64_t pair) const {
    return record(lattice.first_block + (piece * bundles + of_bundle) * pairs(lattice.symmetric) + pair);
  }
  __device__ double product(const double* record, int64_t row, int64_t column) const {
    const double* const products = record + 2 * tile;
    const int64_t at = row * tile + column;
    return is_double() ? products[at] : reinterpret_cast<const float*>(products)[at];
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
// Where the state is; `right` is null if it is `left`, and so is `patches` where nothing else is counted.
struct PairState {
  double scale;  // samples are taken times this
  double *count, *left, *right, *comoment;
  int64_t* skipped;
  double* patches;
  double added_patches;
};
int64_t pair_workspace(const Samples& x, const PairTables& tables);
void update_pairs(const Samples& x, const PairTables& tables, const PairState& state, double* workspace,
                  cudaStream_t stream);

}  // namespace pcafast::cuda
