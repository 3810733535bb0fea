// Products of float64 (see pair_kinds.h).
#pragma once

#include "pair_kinds.h"

namespace pcafast::cuda {

struct Double {
  using Staged = double;
  using Sum = double;
  static constexpr int kChunk = 16, kStages = 2, kDrain = 1 << 30, kResident = 3, kSums = 1;
  static constexpr int kPadOfChannels = 2, kPadOfSamples = 2;

  // Lane 8 r + c has rows r, r + 4, ... and columns c, c + 8, ...
  template <class Tiling>
  class Warp {
    static constexpr int kRows = Tiling::kWarpRows / 4, kColumns = Tiling::kWarpColumns / 8;

   public:
    __device__ explicit Warp(double* sums) : of_channels_(sums) {}
    __device__ void multiply(const double* a, const double* b, int row, int column) {
#pragma unroll 2
      for (int k = 0; k < kChunk; ++k) {
        double left[kRows], right[kColumns];
#pragma unroll
        for (int i = 0; i < kRows; ++i) left[i] = a[Tiling::index(row + lane() / 8 + 4 * i, k)];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) right[j] = b[Tiling::index(column + lane() % 8 + 8 * j, k)];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums_[i][j] = fma(left[i], right[j], sums_[i][j]);
        }
      }
    }
    __device__ void add_sums(const double* tile, int row) { of_channels_.add(tile, row); }

    __device__ void drain(double* products, int row, int column, bool) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          products[(row + lane() / 8 + 4 * i) * Tiling::kTile + column + lane() % 8 + 8 * j] = sums_[i][j];
        }
      }
    }
    __device__ void write_sums(double* out, int row) const { of_channels_.write(out, row); }

   private:
    double sums_[kRows][kColumns] = {};
    ChannelSum<Tiling> of_channels_;
  };
};

}  // namespace pcafast::cuda
