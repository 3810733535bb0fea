// The products of a warp with kWarpRows rows and kTile / 2 columns of a tile, in each precision.
//
//   Staged      an element in shared memory
//   Sum         what products are added up in at first
//   kChunk      samples that are in shared memory together;  kStages: of such chunks there are so many
//   kResident   blocks of 64 x 64 channels that a multiprocessor has registers for, if loads are wide
//   kDrain      after how many chunks the sums are added to those in memory
//   kSums       sums of channels that a thread keeps in shared memory, since registers are scarce
//   Warp        adds up: multiply(a, b) and add_sums(tile) chunk by chunk, drain and write_sums write the results
#pragma once

#include "matrix.h"
#include "pair_tiling.h"

namespace pcafast::cuda {

__device__ inline int lane() { return threadIdx.x % kWarp; }

struct alignas(8) Two {
  float values[2];
};

// 16 x 8 sums of matrix instructions, from `row` and `column` on in (kTile, kTile) products, which they are added to,
// or written if they are the first.
template <int kTile>
__device__ void drain_matrix(float (&sums)[4], float* products, int row, int column, bool first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const place = products + (row + lane() / 4 + 8 * half) * kTile + column + lane() % 4 * 2;
    Two two = {};
    if (!first) two = *reinterpret_cast<const Two*>(place);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      two.values[i] += sums[2 * half + i];
      sums[2 * half + i] = 0;
    }
    *reinterpret_cast<Two*>(place) = two;
  }
}

// Sums of matrix instructions are cut off, not rounded, so few of them follow each other.
__device__ inline void add_to(float (&sums)[4], const float (&few)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += few[i];
}

// Sums of the samples of a tile: a lane to a channel of a warp's 32.
template <class Tiling>
class ChannelSum {
 public:
  using Staged = typename Tiling::Kind::Staged;
  static_assert(Tiling::kWarpRows == kWarp);

  __device__ explicit ChannelSum(double* sum) : sum_(sum) { *sum = 0; }
  __device__ void add(const Staged* tile, int row) {
    Staged chunk = 0;
#pragma unroll 8
    for (int k = 0; k < Tiling::kChunk; ++k) chunk += tile[Tiling::index(row + lane(), k)];
    *sum_ += chunk;
  }
  __device__ void write(double* out, int row) const { out[row + lane()] = *sum_; }

 private:
  double* const sum_;
};

}  // namespace pcafast::cuda
