// Products of 16-bit numbers (see pair_kinds.h).
#pragma once

#include "pair_kinds.h"

namespace pcafast::cuda {

// 16-bit numbers as they are; their products are exact.
template <typename T>
struct Half {
  using Staged = uint16_t;
  using Sum = float;
  static constexpr int kChunk = 32, kStages = 4, kDrain = 64, kResident = 5, kSums = 2;
  static constexpr int kPadOfChannels = 8, kPadOfSamples = 8;

  template <class Tiling>
  class Warp {
    static constexpr int kRowBlocks = Tiling::kWarpRows / 16, kBlocks = Tiling::kWarpColumns / 8;

   public:
    __device__ explicit Warp(double* sums) : of_channels_(sums) { sums[0] = sums[1] = 0; }
    __device__ void multiply(const uint16_t* a, const uint16_t* b, int row, int column) {
      constexpr int kSteps = kChunk / 16;
      uint32_t left[kSteps][kRowBlocks][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) load_left(left[step][m], a, row + 16 * m, 16 * step);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t right[kSteps][4];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int channel = column + n * 8 + lane() / 16 * 8, sample = 16 * step + lane() / 8 % 2 * 8;
          load_at(right[step], b, channel, sample);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            float sums[4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              const uint32_t pair[2] = {right[step][2 * half], right[step][2 * half + 1]};
              multiply_add(sums, left[step][m], pair, T{});
            }
            add_to(sums_[m][n + half], sums);
          }
        }
      }
    }

    // By a product with ones, whose columns are all the same. Of the four lanes that get those of a row each keeps
    // another block of rows.
    __device__ void add_sums(const uint16_t* tile, int row) {
      constexpr uint32_t kOnes = std::is_same_v<T, Float16> ? 0x3c003c00u : 0x3f803f80u;
      const uint32_t ones[2] = {kOnes, kOnes};
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        float chunk[4] = {};
#pragma unroll
        for (int k = 0; k < kChunk; k += 16) {
          uint32_t left[4];
          load_left(left, tile, row + 16 * m, k);
          multiply_add(chunk, left, ones, T{});
        }
        if (lane() % 4 != m) continue;
        of_channels_[0] += chunk[0];
        of_channels_[1] += chunk[2];
      }
    }

    __device__ void drain(float* products, int row, int column, bool first) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          drain_matrix<Tiling::kTile>(sums_[m][n], products, row + 16 * m, column + 8 * n, first);
        }
      }
    }
    __device__ void write_sums(double* out, int row) const {
      const int m = lane() % 4;
      if (m >= kRowBlocks) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) out[row + 16 * m + 8 * half + lane() / 4] = of_channels_[half];
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

    float sums_[kRowBlocks][kBlocks][4] = {};
    double* const of_channels_;
  };
};

}  // namespace pcafast::cuda
