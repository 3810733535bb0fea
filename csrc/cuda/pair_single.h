// Products of float32 (see pair_kinds.h).
#pragma once

#include "pair_kinds.h"

namespace pcafast::cuda {

// float32 as two TF32 numbers: high * high + high * low + low * high.
struct Single {
  using Staged = float;
  using Sum = float;
  static constexpr int kChunk = 32, kStages = 2, kDrain = 32, kResident = 3, kSums = 1;
  static constexpr int kPadOfChannels = 8, kPadOfSamples = 4;

  template <class Tiling>
  class Warp {
    static constexpr int kBlocks = Tiling::kWarpColumns / 8;
    static constexpr int kSteps = 2;  // of matrix instructions that follow each other

   public:
    __device__ explicit Warp(double* sums) : of_channels_(sums) {}
    __device__ void multiply(const float* a, const float* b, int row, int column) {
      const int g = lane() / 4, t = lane() % 4;
#pragma unroll 1
      for (int k = 0; k < kChunk; k += 8 * kSteps) {
        uint32_t high[kSteps][2][4], low[kSteps][2][4];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int channel = row + 16 * m + g + i % 2 * 8, sample = k + 8 * step + t + i / 2 * 4;
              split(a[Tiling::index(channel, sample)], high[step][m][i], low[step][m][i]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          uint32_t right_high[kSteps][2], right_low[kSteps][2];
          float sums[2][4] = {};
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int channel = column + 8 * n + g, sample = k + 8 * step + t + 4 * i;
              split(b[Tiling::index(channel, sample)], right_high[step][i], right_low[step][i]);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add(sums[m], low[step][m], right_high[step], float{});
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add(sums[m], high[step][m], right_low[step], float{});
          }
          // The large products come last, so that few sums of any size are cut off.
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add(sums[m], high[step][m], right_high[step], float{});
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) add_to(sums_[m][n], sums[m]);
        }
      }
    }
    __device__ void add_sums(const float* tile, int row) { of_channels_.add(tile, row); }

    __device__ void drain(float* products, int row, int column, bool first) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          drain_matrix<Tiling::kTile>(sums_[m][n], products, row + 16 * m, column + 8 * n, first);
        }
      }
    }
    __device__ void write_sums(double* out, int row) const { of_channels_.write(out, row); }

   private:
    float sums_[2][kBlocks][4] = {};
    ChannelSum<Tiling> of_channels_;
  };
};

}  // namespace pcafast::cuda
