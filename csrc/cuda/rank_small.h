// Rank of maps of up to 32 x 32: each belongs to a team of neighbouring lanes, which hold it in registers.
#pragma once

#include "rank_steps.h"

namespace pcafast::cuda::rank {

constexpr int kSmallThreads = 128;

// kRowLanes x kColumnLanes lanes with kRows x kColumns elements each: lane (r, c) has rows r, r + kRowLanes, ... of
// columns c, c + kColumnLanes, ... So all lanes keep some work while the matrix that is left shrinks, and which of a
// lane's registers hold row k and column k is known to the compiler for kRowLanes steps at a time, a phase.
template <int kRowLanes, int kColumnLanes, int kRows, int kColumns>
class Team {
  static_assert(kColumnLanes % kRowLanes == 0, "one phase has one column register");

 public:
  static constexpr int kLanes = kRowLanes * kColumnLanes;
  static constexpr int kSide = kRowLanes * kRows;  // of the largest map
  static_assert(kSide == kColumnLanes * kColumns);

  __device__ Team() : lane(threadIdx.x % kLanes), own_row(lane / kColumnLanes), own_column(lane % kColumnLanes) {}

  // Returns the largest magnitude, infinite if an element is not finite.
  __device__ double load(const Matrices& maps, int64_t map) {
    const int64_t start = maps.start(map);
    double largest = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int row = own_row + i * kRowLanes, column = own_column + j * kColumnLanes;
        a[i][j] = row < maps.rows && column < maps.columns ? maps.element(start, row, column) : 0;
        largest = larger_magnitude(largest, a[i][j]);
      }
    }
    return largest_of_lanes(largest, kLanes);
  }

  __device__ void multiply(double scale) {
#pragma unroll
    for (auto& row : a) {
#pragma unroll
      for (double& element : row) element *= scale;
    }
  }

  // Leaves the bidiagonal form in diagonal[0] ... and above[1] ...
  __device__ void bidiagonalise(int columns, double* diagonal, double* above) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) u[i] = from_column_lane(a[i][0], 0);
    phases<0>(columns, diagonal, above);
  }

 private:
  // Of the lane in the same column of lanes.
  __device__ double from_row_lane(double x, int row) const {
    return __shfl_sync(kFullWarp, x, threadIdx.x % kWarp - lane + row * kColumnLanes + own_column);
  }
  // Of the lane in the same row of lanes.
  __device__ double from_column_lane(double x, int column) const {
    return __shfl_sync(kFullWarp, x, threadIdx.x % kWarp - lane + own_row * kColumnLanes + column);
  }

  template <int kPhase>
  __device__ void phases(int columns, double* diagonal, double* above) {
    if constexpr (kPhase < kRows) {
      const int first = kPhase * kRowLanes;
      for (int k = first; k < min(first + kRowLanes, columns); ++k) step<kPhase>(k, columns, diagonal, above);
      phases<kPhase + 1>(columns, diagonal, above);
    }
  }

  // The reflections that clear column k below its diagonal and row k beyond the entry above it. u is column k from row
  // k on. Both norms come with the products: that of column k with (column k)' A, that of row k with A (row k)'.
  template <int kPhase>
  __device__ void step(int k, int columns, double* diagonal, double* above) {
    constexpr int kFirst = kPhase * kRowLanes / kColumnLanes;  // column registers before it are done
    constexpr int kNext = kFirst + 1 < kColumns ? kFirst + 1 : kFirst;
    const int row_lane = k % kRowLanes, column_lane = k % kColumnLanes, next_lane = (k + 1) % kColumnLanes;

    double y[kColumns] = {}, v[kColumns] = {}, x[kRows] = {}, next[kRows] = {};
#pragma unroll
    for (int j = kFirst; j < kColumns; ++j) {
#pragma unroll
      for (int i = kPhase; i < kRows; ++i) y[j] += u[i] * a[i][j];
#pragma unroll
      for (int offset = kColumnLanes; offset < kLanes; offset *= 2) y[j] += __shfl_xor_sync(kFullWarp, y[j], offset);
      v[j] = from_row_lane(a[kPhase][j], row_lane);
    }
    const Reflection left(from_column_lane(v[kFirst], column_lane), from_column_lane(y[kFirst], column_lane));
    if (own_row == row_lane) u[kPhase] = left.head;
#pragma unroll
    for (int j = kFirst; j < kColumns; ++j) {
      y[j] = (y[j] - left.image * v[j]) * left.inverse;
      v[j] = own_column + j * kColumnLanes > k ? v[j] - left.head * y[j] : 0;
    }
#pragma unroll
    for (int i = kPhase; i < kRows; ++i) {
#pragma unroll
      for (int j = kFirst; j < kColumns; ++j) {
        a[i][j] -= u[i] * y[j];
        x[i] += a[i][j] * v[j];
      }
#pragma unroll
      for (int offset = 1; offset < kColumnLanes; offset *= 2) x[i] += __shfl_xor_sync(kFullWarp, x[i], offset);
      next[i] = from_column_lane(next_lane > 0 ? a[i][kFirst] : a[i][kNext], next_lane);
    }

    const double first = from_column_lane(next_lane > 0 ? v[kFirst] : v[kNext], next_lane);
    const Reflection right(first, from_row_lane(x[kPhase], row_lane));
#pragma unroll
    for (int i = kPhase; i < kRows; ++i) x[i] = (x[i] - right.image * next[i]) * right.inverse;
#pragma unroll
    for (int j = kFirst; j < kColumns; ++j) {
      if (own_column + j * kColumnLanes == k + 1) v[j] = right.head;
#pragma unroll
      for (int i = kPhase; i < kRows; ++i) a[i][j] -= x[i] * v[j];
    }
#pragma unroll
    for (int i = kPhase; i < kRows; ++i) {
      u[i] = own_row + i * kRowLanes > k ? next[i] - x[i] * right.head : 0;
    }
    if (lane == 0) {
      diagonal[k] = left.image;
      if (k + 1 < columns) above[k + 1] = right.image;
    }
  }

  const int lane, own_row, own_column;
  double a[kRows][kColumns];
  double u[kRows];
};

template <class Team>
__global__ void __launch_bounds__(kSmallThreads) rank_small(Matrices maps, Tolerances tolerances, int64_t* ranks) {
  constexpr int kMaps = kSmallThreads / Team::kLanes, kSide = Team::kSide;
  __shared__ double diagonal[kMaps][kSide + 1], above[kMaps][kSide + 1];  // apart by an odd number, for the counting
  __shared__ double squared[kMaps][2 * kSide];
  __shared__ double thresholds[kMaps];  // negative for a map that is not finite

  const int own = threadIdx.x / Team::kLanes;
  const int64_t first = int64_t{blockIdx.x} * kMaps;
  Team team;
  const double largest = team.load(maps, min(first + own, maps.count - 1));  // teams to spare repeat the last map
  const double scale = power_of_two_scale(largest);
  if (scale != 1) team.multiply(scale);
  team.bidiagonalise(maps.columns, diagonal[own], above[own]);
  __syncwarp();
  const double top = largest_singular_value<Team::kLanes>(diagonal[own], above[own], maps.columns, squared[own]);
  if (threadIdx.x % Team::kLanes == 0) {
    thresholds[own] = isfinite(largest) ? max(tolerances.relative * top, tolerances.absolute * scale) : -1;
  }
  __syncthreads();

  // One thread counts for a map, so that those of a block are counted together.
  const int map = threadIdx.x;
  if (map < kMaps && first + map < maps.count) {
    const double threshold = thresholds[map];
    ranks[first + map] = threshold < 0 ? -1 : count_above(diagonal[map], above[map], maps.columns, threshold);
  }
}

}  // namespace pcafast::cuda::rank
