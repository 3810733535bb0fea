// The products of a warp with 32 rows and kTile / 2 columns of a tile, in each precision.
//
//   Staged      an element in shared memory
//   Sum         what products are added up in at first
//   kChunk      samples that are in shared memory together;  kStages: of such chunks there are so many
//   kResident   blocks of 64 x 64 channels that share a multiprocessor, at least
//   kDrain      after how many chunks the sums are added to those in memory
//   Warp        adds up: multiply(a, b) and add_sums(tile) chunk by chunk, drain and drain_sums write the results
#pragma once

#include "matrix.h"
#include "pair_tiling.h"

namespace pcafast::cuda {

__device__ inline int lane() { return threadIdx.x % kWarp; }

// 16 x 8 sums of matrix instructions, from `row` and `column` on in (kTile, kTile) products, which they are added to.
template <int kTile>
__device__ void drain_matrix(float (&sums)[4], float* products, int row, int column, bool first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const out = products + (row + lane() / 4 + 8 * half) * kTile + column + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out[i] = first ? sums[2 * half + i] : out[i] + sums[2 * half + i];
      sums[2 * half + i] = 0;
    }
  }
}

// Sums of matrix instructions are cut off, not rounded, so few of them follow each other.
__device__ inline void add_to(float (&sums)[4], const float (&few)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += few[i];
}

// Sums of the samples of a tile: a lane to a channel.
template <class Tiling>
class ChannelSum {
 public:
  using Staged = typename Tiling::Kind::Staged;

  __device__ void add(const Staged* tile, int row) {
    Staged chunk = 0;
#pragma unroll 8
    for (int k = 0; k < Tiling::kChunk; ++k) chunk += tile[Tiling::index(row + lane(), k)];
    sum_ += chunk;
  }
  __device__ void write(double* out, int row) const { out[row + lane()] = sum_; }

 private:
  double sum_ = 0;
};

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

// float32 as two TF32 numbers: high * high + high * low + low * high.
struct Single {
  using Staged = float;
  using Sum = float;
  static constexpr int kChunk = 32, kStages = 2, kDrain = 32, kResident = 3;
  static constexpr int kPadOfChannels = 8, kPadOfSamples = 4;

  template <class Tiling>
  class Warp {
    static constexpr int kBlocks = Tiling::kWarpColumns / 8;
    static constexpr int kSteps = 2;  // of matrix instructions that follow each other

   public:
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
    __device__ static void split(float x, uint32_t& high, uint32_t& low) {
      high = round_to_tf32(x);
      low = round_to_tf32(x - __uint_as_float(high));
    }

    float sums_[2][kBlocks][4] = {};
    ChannelSum<Tiling> of_channels_;
  };
};

struct Double {
  using Staged = double;
  using Sum = double;
  static constexpr int kChunk = 16, kStages = 2, kDrain = 1 << 30, kResident = 2;
  static constexpr int kPadOfChannels = 2, kPadOfSamples = 2;

  // Lane 8 r + c has rows r, r + 4, ... and columns c, c + 8, ...
  template <class Tiling>
  class Warp {
    static constexpr int kRows = kWarpRows / 4, kColumns = Tiling::kWarpColumns / 8;

   public:
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
