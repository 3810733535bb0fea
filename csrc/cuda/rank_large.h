// Rank of larger maps: each belongs to a block, in shared memory or, where it does not fit, in a workspace.
#pragma once

#include "rank_steps.h"

namespace pcafast::cuda::rank {

constexpr int kLargeThreads = 256, kWarps = kLargeThreads / kWarp;

// A map by columns, and what the warps exchange. Columns are `height` apart, a multiple of a warp, and end in zeros.
// Buffers that are read in one step and written in the next come in pairs, taken by turns, so that one barrier per step
// is enough.
struct LargeMemory {
  double *a, *beside;
  int height, columns;

  // In doubles, without `a`.
  static constexpr int64_t size(int height, int columns) { return 2 * kWarps * int64_t{height} + 6 * columns; }

  __device__ double* column(int c) const { return a + int64_t{c} * height; }
  __device__ double* sums(int turn) const { return beside + turn % 2 * kWarps * height; }
  __device__ double* v(int turn) const { return sums(0) + 2 * kWarps * height + turn % 2 * columns; }
  __device__ double* diagonal() const { return v(0) + 2 * columns; }
  __device__ double* above() const { return v(0) + 3 * columns; }
  __device__ double* squared() const { return v(0) + 4 * columns; }  // 2 * columns
};

// Sums over the lanes of a warp, several at once.
template <int kCount>
__device__ void sum_over_warp(double (&x)[kCount]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (double& one : x) one += __shfl_xor_sync(kFullWarp, one, offset);
  }
}

// A vector of kChunks * kWarp elements over the lanes of a warp, one in a lane and chunk. Chunks before kFirst are left
// alone; those from there on, kOpen of them, may have elements that are done with.
template <int kChunks, int kFirst>
struct Spread {
  static constexpr int kOpen = (kChunks + 3) / 4;
  double (&chunks)[kChunks];

  // Which element of a chunk is this lane's.
  __device__ static int own(int chunk) { return chunk * kWarp + static_cast<int>(threadIdx.x % kWarp); }

  __device__ void clear() const {
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) chunks[i] = 0;
  }
  __device__ void load(const double* from) const {
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) chunks[i] = from[own(i)];
  }
  __device__ void store(double* to) const {
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) to[own(i)] = chunks[i];
  }
  __device__ double own_part_of_dot(const Spread& other) const {
    double sum = 0;
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) sum += chunks[i] * other.chunks[i];
    return sum;
  }
  __device__ void add(const Spread& other, double factor) const {
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) chunks[i] += other.chunks[i] * factor;
  }
  __device__ void multiply(double factor) const {
#pragma unroll
    for (int i = kFirst; i < kChunks; ++i) chunks[i] *= factor;
  }
  // Elements before `end`, which lies in an open chunk or at the end of one.
  __device__ void clear_before(int end) const {
#pragma unroll
    for (int i = kFirst; i < min(kFirst + kOpen, kChunks); ++i) {
      if (own(i) < end) chunks[i] = 0;
    }
  }
  // Element k of an open chunk, for every lane.
  __device__ double at(int k) const {
    double chunk = chunks[kFirst];
#pragma unroll
    for (int i = kFirst + 1; i < min(kFirst + kOpen, kChunks); ++i) chunk = k >= i * kWarp ? chunks[i] : chunk;
    return __shfl_sync(kFullWarp, chunk, k % kWarp);
  }
  __device__ void set(int k, double value) const {
#pragma unroll
    for (int i = kFirst; i < min(kFirst + kOpen, kChunks); ++i) {
      if (own(i) == k) chunks[i] = value;
    }
  }
};

// Leaves the bidiagonal form in memory.diagonal() and, from entry 1 on, in memory.above(). Every warp does the same
// with the vectors, which stay in its registers, and has its own columns of the matrix; each of those is read and
// written once per step. As on the CPU the row reflection of a step is put off to the next, as A -= x v', and A v is
// gathered as A (row k)' and corrected by the first column, since v differs from row k in its first entry alone. Rows
// that are done keep what they last had; the vectors are zero there.
template <int kChunks>
class Bidiagonal {
 public:
  __device__ explicit Bidiagonal(const LargeMemory& memory) : memory_(memory) { steps<0>(); }

 private:
  // Steps whose row lies in one of the open chunks: four phases, in each of which the compiler knows what is left.
  template <int kFirst>
  __device__ void steps() {
    if constexpr (kFirst < kChunks) {
      constexpr int kNext = kFirst + Spread<kChunks, kFirst>::kOpen;
      const int columns = memory_.columns;
      for (int k = kFirst * kWarp; k < min(kNext * kWarp, columns); ++k) step<kFirst>(k);
      steps<kNext>();
    }
  }

  template <int kFirst>
  __device__ void step(int k) {
    using Part = Spread<kChunks, kFirst>;
    double own_u[kChunks], own_sum[kChunks];
    const Part x{x_}, u{own_u}, sum{own_sum};
    u.load(memory_.column(k));
    u.add(x, -head_);
    u.clear_before(k);
    double dots[2] = {u.own_part_of_dot(u), u.own_part_of_dot(x)};
    sum_over_warp(dots);
    const Reflection left(u.at(k), dots[0]);
    const double ux = dots[1] - left.image * x.at(k);
    u.set(k, left.head);
    if (threadIdx.x == 0) memory_.diagonal()[k] = left.image;
    if (k + 1 == memory_.columns) return;

    sum.clear();
    const int warp = threadIdx.x / kWarp;
    int c = k + 1 + warp;
    for (; c + kWarps < memory_.columns; c += 2 * kWarps) reflect<2>(k, c, x, u, left.inverse, ux, sum);
    if (c < memory_.columns) reflect<1>(k, c, x, u, left.inverse, ux, sum);
    sum.store(memory_.sums(k) + warp * memory_.height);
    __syncthreads();

    x.clear();
    for (int w = 0; w < kWarps; ++w) {
      double own_share[kChunks];
      const Part share{own_share};
      share.load(memory_.sums(k) + w * memory_.height);
      x.add(share, 1);
    }
    const Reflection right(memory_.v(k + 1)[k + 1], x.at(k));
    head_ = right.head;
    double own_first[kChunks];
    const Part first{own_first};
    first.load(memory_.column(k + 1));
    x.add(first, -right.image);
    x.multiply(right.inverse);
    x.clear_before(k + 1);  // row k is done
    if (threadIdx.x == 0) memory_.above()[k + 1] = right.image;
  }

  // Columns c, c + kWarps ..., kCount of them at once.
  template <int kCount, class Part>
  __device__ void reflect(int k, int c, const Part& x, const Part& u, double inverse, double ux, const Part& sum) {
    double own_a[kCount][kChunks], y[kCount], v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Part a{own_a[i]};
      a.load(memory_.column(c + i * kWarps));
      v[i] = memory_.v(k)[c + i * kWarps];
      y[i] = u.own_part_of_dot(a);
    }
    sum_over_warp(y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Part a{own_a[i]};
      a.add(u, (ux * v[i] - y[i]) * inverse);
      a.add(x, -v[i]);
      const double entry = a.at(k);  // of row k
      sum.add(a, entry);
      a.store(memory_.column(c + i * kWarps));
      if (threadIdx.x % kWarp == 0) memory_.v(k + 1)[c + i * kWarps] = entry;
    }
  }

  const LargeMemory memory_;
  double x_[kChunks] = {};
  double head_ = 0;  // v[k]
};

// Copies a map to memory.a, and zeros to where steps read before they write. Returns its largest magnitude, infinite if
// an element is not finite.
template <int kHeight>
__device__ double load(const Matrices& maps, int64_t map, const LargeMemory& memory) {
  const int64_t start = maps.start(map);
  double largest = 0;
  for (int i = threadIdx.x; i < kHeight * maps.columns; i += kLargeThreads) {
    const int row = i % kHeight;
    const double element = row < maps.rows ? maps.element(start, row, i / kHeight) : 0;
    memory.a[i] = element;
    largest = larger_magnitude(largest, element);
  }
  for (int i = threadIdx.x; i < maps.columns; i += kLargeThreads) memory.v(0)[i] = 0;
  largest = largest_of_lanes(largest, kWarp);
  if (threadIdx.x % kWarp == 0) memory.sums(0)[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = max(largest, memory.sums(0)[w]);
  return largest;
}

// kChunks * 32 rows at most. If !kFits, workspace has room for one map per block.
template <int kChunks, bool kFits>
__global__ void __launch_bounds__(kLargeThreads, kFits&& kChunks == 2 ? 4 : 1)
    rank_large(Matrices maps, Tolerances tolerances, double* workspace, int64_t* ranks) {
  constexpr int kHeight = kChunks * kWarp;
  const int columns = maps.columns;
  double* const shared = dynamic_shared<double>();
  const int64_t elements = int64_t{kHeight} * columns;
  const LargeMemory memory = {kFits ? shared : workspace + blockIdx.x * elements, kFits ? shared + elements : shared,
                              kHeight, columns};
  for (int64_t map = blockIdx.x; map < maps.count; map += gridDim.x) {
    const double largest = load<kHeight>(maps, map, memory);
    const double scale = power_of_two_scale(largest);
    if (scale != 1) {
      for (int i = threadIdx.x; i < elements; i += kLargeThreads) memory.a[i] *= scale;
    }
    __syncthreads();
    const Bidiagonal<kChunks> form(memory);
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
