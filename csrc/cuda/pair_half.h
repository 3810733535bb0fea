// Products of 16-bit numbers (see pair_kinds.h).
#pragma once

#include "pair_kinds.h"

namespace pcafast::cuda {

// 16-bit numbers as they are; their products are exact.
template <typename T>
struct Half {
  using Staged = uint16_t;
  using Sum = float;
  static constexpr int kChunk = 32, kStages = 4, kDrain = 64, kResident = 3;
  static constexpr int kPadOfChannels = 8, kPadOfSamples = 8;

  template <class Tiling>
  class Warp {
    static constexpr int kBlocks = Tiling::kWarpColumns / 8;

   public:
    __device__ void multiply(const uint16_t* a, const uint16_t* b, int row, int column) {
      constexpr int kSteps = kChunk / 16;
      uint32_t left[kSteps][2][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int m = 0; m < 2; ++m) load_left(left[step][m], a, row + 16 * m, 16 * step);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        float sums[2][2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int channel = column + n * 8 + lane() / 16 * 8, sample = 16 * step + lane() / 8 % 2 * 8;
          uint32_t right[4];
          load_at(right, b, channel, sample);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t pair[2] = {right[2 * half], right[2 * half + 1]};
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add(sums[m][half], left[step][m], pair, T{});
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) add_to(sums_[m][n + half], sums[m][half]);
        }
      }
    }

    // By a product with ones.
    __device__ void add_sums(const uint16_t* tile, int row) {
      constexpr uint32_t kOnes = std::is_same_v<T, Float16> ? 0x3c003c00u : 0x3f803f80u;
      const uint32_t ones[2] = {kOnes, kOnes};
      float chunk[2][4] = {};
#pragma unroll
      for (int k = 0; k < kChunk; k += 16) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t left[4];
          load_left(left, tile, row + 16 * m, k);
          multiply_add(chunk[m], left, ones, T{});
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        of_channels_[m][0] += chunk[m][0];
        of_channels_[m][1] += chunk[m][2];
      }
    }

    __device__ void drain(float* products, int row, int column, bool first) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          drain_matrix<Tiling::kTile>(sums_[m][n], products, row + 16 * m, column + 8 * n, first);
        }
      }
    }
    __device__ void write_sums(double* out, int row) const {
      if (lane() % 4 != 0) return;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) out[row + 16 * m + 8 * half + lane() / 4] = of_channels_[m][half];
      }
    }

   private:
    // This lane gives the address of eight neighbours that include (channel, sample).
    __device__ static void load_at(uint32_t (&matrices)[4], const uint16_t* tile, int channel, int sample) {
      if constexpr (Tiling::kChannelsInside) {
        load_matrices<true>(matrices, tile + Tiling::index(channel, sample + lane() % 8));
      } else {
        load_matrices<false>(matrices, tile + Tiling::index(channel + lane() % 8, sample));
      }
    }
    __device__ static void load_left(uint32_t (&matrices)[4], const uint16_t* tile, int row, int k) {
      load_at(matrices, tile, row + lane() / 8 % 2 * 8, k + lane() / 16 * 8);
    }

    float sums_[2][kBlocks][4] = {};
    double of_channels_[2][2] = {};
  };
};

}  // namespace pcafast::cuda
