// Rank of larger maps: each belongs to a block, in shared memory or, where it does not fit, in a workspace.
#pragma once

#include "rank_steps.h"

namespace pcafast::cuda::rank {

constexpr int kLargeThreads = 256, kWarps = kLargeThreads / kWarp;

// A map by columns, and what the warps exchange. Buffers that are read in one step and written in the next come in
// pairs, taken by turns, so that one barrier per step is enough.
struct LargeMemory {
  double *a, *beside;
  int rows, columns;

  // In doubles, without `a`.
  static constexpr int64_t size(int rows, int columns) { return 2 * kWarps * int64_t{rows} + 6 * columns; }

  __device__ double* column(int c) const { return a + int64_t{c} * rows; }
  __device__ double* sums(int turn) const { return beside + turn % 2 * kWarps * rows; }
  __device__ double* v(int turn) const { return sums(0) + 2 * kWarps * rows + turn % 2 * columns; }
  __device__ double* diagonal() const { return v(0) + 2 * columns; }
  __device__ double* above() const { return v(0) + 3 * columns; }
  __device__ double* squared() const { return v(0) + 4 * columns; }  // 2 * columns
};

// Two sums over the lanes of a warp at once.
__device__ inline void sum_over_warp(double& x, double& y) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
    y += __shfl_xor_sync(kFullWarp, y, offset);
  }
}

// A vector of up to kChunks * kWarp elements over the lanes of a warp, one in a lane and chunk. What is done with it is
// done with the elements from `first` on, rounded down to a whole chunk.
template <int kChunks>
struct Spread {
  double chunks[kChunks];

  // Which element of a chunk is this lane's.
  __device__ static int own(int chunk) { return chunk * kWarp + static_cast<int>(threadIdx.x % kWarp); }

  __device__ Spread() {
#pragma unroll
    for (double& chunk : chunks) chunk = 0;
  }
  // Zero before `first` and from `end` on.
  __device__ static Spread load(const double* from, int first, int end) {
    Spread loaded;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int k = own(i);
      if (first <= k && k < end) loaded.chunks[i] = from[k];
    }
    return loaded;
  }
  __device__ void store(double* to, int first, int end) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int k = own(i);
      if (first <= k && k < end) to[k] = chunks[i];
    }
  }
  __device__ double own_part_of_dot(const Spread& other, int first) const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i >= first / kWarp) sum += chunks[i] * other.chunks[i];
    }
    return sum;
  }
  __device__ void add(const Spread& other, double factor, int first) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i >= first / kWarp) chunks[i] += other.chunks[i] * factor;
    }
  }
  __device__ void multiply(double factor, int first) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i >= first / kWarp) chunks[i] *= factor;
    }
  }
  // Element k, for every lane.
  __device__ double at(int k) const {
    double chunk = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunk = own(i) == k ? chunks[i] : chunk;
    return __shfl_sync(kFullWarp, chunk, k % kWarp);
  }
  __device__ void set(int k, double value) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (own(i) == k) chunks[i] = value;
    }
  }
};

// Leaves the bidiagonal form in memory.diagonal() and, from entry 1 on, in memory.above(). Every warp does the same
// with the vectors, which stay in its registers, and has its own columns of the matrix; each of those is read and
// written once per step. As on the CPU the row reflection of a step is put off to the next, as A -= x v', and A v is
// gathered as A (row k)' and corrected by the first column, since v differs from row k in its first entry alone.
template <int kChunks>
__device__ void bidiagonalise(const LargeMemory& memory) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int rows = memory.rows, columns = memory.columns;
  Spread<kChunks> x;
  double head = 0;  // v[k]
  for (int k = 0; k < columns; ++k) {
    const double* const v = memory.v(k);
    double* const next_v = memory.v(k + 1);

    auto u = Spread<kChunks>::load(memory.column(k), k, rows);
    u.add(x, -head, k);
    double squared = u.own_part_of_dot(u, k), ux = u.own_part_of_dot(x, k);
    sum_over_warp(squared, ux);
    const Reflection left(u.at(k), squared);
    ux -= left.image * x.at(k);
    u.set(k, left.head);
    if (threadIdx.x == 0) memory.diagonal()[k] = left.image;
    if (k + 1 == columns) break;

    Spread<kChunks> sum;
    for (int c = k + 1 + warp; c < columns; c += kWarps) {
      auto a = Spread<kChunks>::load(memory.column(c), k, rows);
      double y = u.own_part_of_dot(a, k);
      for (int offset = kWarp / 2; offset > 0; offset /= 2) y += __shfl_xor_sync(kFullWarp, y, offset);
      const double vc = k > 0 ? v[c] : 0;
      a.add(u, (ux * vc - y) * left.inverse, k);
      a.add(x, -vc, k);
      const double entry = a.at(k);  // of row k
      sum.add(a, entry, k);
      a.store(memory.column(c), k, rows);
      if (lane == 0) next_v[c] = entry;
    }
    sum.store(memory.sums(k) + warp * rows, k, rows);
    __syncthreads();

    x = Spread<kChunks>();
    for (int w = 0; w < kWarps; ++w) x.add(Spread<kChunks>::load(memory.sums(k) + w * rows, k, rows), 1, k);
    const Reflection right(next_v[k + 1], x.at(k));
    head = right.head;
    x.add(Spread<kChunks>::load(memory.column(k + 1), k, rows), -right.image, k);
    x.multiply(right.inverse, k);
    x.set(k, 0);  // row k is done
    if (threadIdx.x == 0) memory.above()[k + 1] = right.image;
  }
}

// Copies a map to memory.a and returns its largest magnitude, infinite if an element is not finite.
__device__ inline double load(const Matrices& maps, int64_t map, const LargeMemory& memory) {
  const int64_t start = maps.start(map);
  double largest = 0;
  for (int i = threadIdx.x; i < maps.rows * maps.columns; i += kLargeThreads) {
    const double element = maps.element(start, i % maps.rows, i / maps.rows);
    memory.a[i] = element;
    largest = larger_magnitude(largest, element);
  }
  largest = largest_of_lanes(largest, kWarp);
  if (threadIdx.x % kWarp == 0) memory.sums(0)[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = max(largest, memory.sums(0)[w]);
  return largest;
}

// kChunks * 32 rows at most. If !kFits, workspace has room for one map per block.
template <int kChunks, bool kFits>
__global__ void __launch_bounds__(kLargeThreads, kChunks == 2 ? 4 : 1)
    rank_large(Matrices maps, Tolerances tolerances, double* workspace, int64_t* ranks) {
  const int rows = maps.rows, columns = maps.columns;
  double* const shared = dynamic_shared<double>();
  const int64_t elements = int64_t{rows} * columns;
  const LargeMemory memory = {kFits ? shared : workspace + blockIdx.x * elements, kFits ? shared + elements : shared,
                              rows, columns};
  for (int64_t map = blockIdx.x; map < maps.count; map += gridDim.x) {
    const double largest = load(maps, map, memory);
    const double scale = power_of_two_scale(largest);
    if (scale != 1) {
      for (int i = threadIdx.x; i < elements; i += kLargeThreads) memory.a[i] *= scale;
    }
    __syncthreads();
    bidiagonalise<kChunks>(memory);
    if (threadIdx.x < kWarp) {  // the form is of thread 0; the other warps are done with all but their registers
      __syncwarp();
      const double top = largest_singular_value<kWarp>(memory.diagonal(), memory.above(), columns, memory.squared());
      const double threshold = max(tolerances.relative * top, tolerances.absolute * scale);
      const int count = count_above(memory.diagonal(), memory.above(), columns, threshold);
      if (threadIdx.x == 0) ranks[map] = isfinite(largest) ? count : -1;
    }
    __syncthreads();  // before the next map takes the place of this one
  }
}

}  // namespace pcafast::cuda::rank
