// The one read of the Taylor kernels: sums over positions, for each of the layouts that activations come in.
#pragma once

#include "../kernels.h"
#include "device.h"

namespace pcafast::cuda::taylor {

constexpr int kThreads = 256;

// The rows of TaylorArgs::sums, here for one channel.
enum { kMagnitude, kSquare, kSigned, kAbsolute, kSums };
struct alignas(16) Sums {
  double values[kSums] = {};
};

// How the batch is cut into units: groups of examples, each in parts by position. A group of several examples has one
// part. A block sums one unit for one tile of channels.
struct Plan {
  int64_t examples, groups;  // examples in each group
  int64_t positions;         // positions in each part
  int parts, tiles;
};

struct Unit {
  int64_t index, first_example, last_example, first_position, last_position, tile;
};

__device__ inline Unit this_unit(const Plan& plan, const ChannelView& x) {
  const unsigned index = blockIdx.x / plan.tiles;
  const int64_t example = index / plan.parts * plan.examples;
  const int64_t position = index % plan.parts * plan.positions;
  return {index,
          example,
          min(example + plan.examples, x.examples),
          position,
          min(position + plan.positions, x.positions),
          blockIdx.x % plan.tiles};
}

// Sums of a * g and of |a * g|: chains of at most eight products in Real, which is float unless an operand may be
// double; chains in double. So products of 16-bit values are exact, and one beyond float's range counts as infinite.
template <typename Real>
struct Products {
  Real plain = 0, absolute = 0;

  __device__ void add(Real activation, Real gradient) {
    const Real product = activation * gradient;
    plain += product;
    absolute += fabs(product);
  }
  template <typename Short>
  __device__ void add(const Products<Short>& chain) {
    plain += chain.plain;
    absolute += chain.absolute;
  }
};

__device__ inline void add_example(Sums& total, const Products<double>& sum, double scale) {
  const double s = scale * sum.plain;
  total.values[kMagnitude] += fabs(s);
  total.values[kSquare] += s * s;
  total.values[kSigned] += s;
  total.values[kAbsolute] += fabs(scale) * sum.absolute;
}

// Over neighbouring lanes, a power of two of them; each gets the sum. The whole warp must call it.
__device__ inline double sum_over_lanes(double x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// kCount vectors of each operand, a step apart: all on their way before the first is used.
template <typename T, int kWidth, int kCount>
struct Vectors {
  Vector<T, kWidth> activation[kCount], gradient[kCount];

  __device__ Vectors(const T* a, int64_t a_step, const T* g, int64_t g_step) {
    for (int k = 0; k < kCount; ++k) {
      activation[k] = load<kWidth>(a + k * a_step);
      gradient[k] = load<kWidth>(g + k * g_step);
    }
  }
  __device__ void add_to(Products<Real<T>>& chain, int k, int i) const {
    chain.add(to_real(activation[k].values[i]), to_real(gradient[k].values[i]));
  }
};

// An element type known only at run time.
struct Any {};

template <typename T>
__device__ auto element(const ChannelView& x, int64_t index) {
  if constexpr (std::is_same_v<T, Any>) {
    switch (x.dtype) {
      case Dtype::kFloat16:
        return double{element<Float16>(x, index)};
      case Dtype::kBFloat16:
        return double{element<BFloat16>(x, index)};
      case Dtype::kFloat32:
        return double{element<float>(x, index)};
      default:
        return element<double>(x, index);
    }
  } else {
    return to_real(static_cast<const T*>(x.data)[index]);
  }
}

template <typename T>
constexpr int kRowWidth = 16 / sizeof(T);
template <>
constexpr int kRowWidth<Any> = 1;

template <int kCount, typename T>
__device__ void add_row_vectors(const T* a, const T* g, int64_t step, Products<double>& sum) {
  const Vectors<T, kRowWidth<T>, kCount> vectors(a, step, g, step);
  for (int k = 0; k < kCount; ++k) {
    Products<Real<T>> chain;
    for (int i = 0; i < kRowWidth<T>; ++i) vectors.add_to(chain, k, i);
    sum.add(chain);
  }
}

// This lane's share of `count` positions of one example and channel. Unless T is Any they lie side by side in memory,
// whole vectors beginning at the same position in both operands (rows_fit).
template <typename T>
__device__ Products<double> sum_row(const ChannelView& a, int64_t a_row, const ChannelView& g, int64_t g_row,
                                    int64_t count) {
  constexpr int kWidth = kRowWidth<T>;
  const int lane = threadIdx.x, lanes = blockDim.x;
  int64_t head = 0, vectors = 0;  // elements before the first whole vector; vectors
  Products<double> sum;
  if constexpr (!std::is_same_v<T, Any>) {
    const T* const activation = static_cast<const T*>(a.data) + a_row;
    const T* const gradient = static_cast<const T*>(g.data) + g_row;
    const int64_t misaligned = reinterpret_cast<uintptr_t>(activation) / sizeof(T) % kWidth;
    head = min((kWidth - misaligned) % kWidth, count);
    vectors = (count - head) / kWidth;
    const int64_t step = lanes * kWidth;
    int64_t i = lane;
    for (; i + lanes < vectors; i += 2 * lanes) {
      add_row_vectors<2>(activation + head + i * kWidth, gradient + head + i * kWidth, step, sum);
    }
    if (i < vectors) {
      add_row_vectors<1>(activation + head + i * kWidth, gradient + head + i * kWidth, step, sum);
    }
  }
  for (int64_t i = lane; i < count - vectors * kWidth; i += lanes) {
    const int64_t position = i < head ? i : i + vectors * kWidth;
    Products<decltype(element<T>(a, 0))> product;
    product.add(element<T>(a, a_row + position * a.position_stride),
                element<T>(g, g_row + position * g.position_stride));
    sum.add(product);
  }
  return sum;
}

// Positions across the lanes (x), channels across the rows of threads (y).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_rows(ChannelView a, ChannelView g, double scale, Plan plan, Sums* units) {
  const Unit unit = this_unit(plan, a);
  const int64_t own = unit.tile * blockDim.y + threadIdx.y;
  const int64_t channel = min(own, a.channels - 1);  // rows to spare repeat the last channel
  const int64_t count = unit.last_position - unit.first_position;
  Sums total;
  for (int64_t n = unit.first_example; n < unit.last_example; ++n) {
    Products<double> sum =
        sum_row<T>(a, n * a.example_stride + channel * a.channel_stride + unit.first_position * a.position_stride, g,
                   n * g.example_stride + channel * g.channel_stride + unit.first_position * g.position_stride, count);
    sum.plain = sum_over_lanes(sum.plain, blockDim.x);
    sum.absolute = sum_over_lanes(sum.absolute, blockDim.x);
    add_example(total, sum, scale);
  }
  if (threadIdx.x == 0 && own == channel) units[unit.index * a.channels + channel] = total;
}

template <int kCount, int kWidth, typename T>
__device__ void add_column_vectors(const T* a, int64_t a_step, const T* g, int64_t g_step,
                                   Products<double> (&sum)[kWidth]) {
  const Vectors<T, kWidth, kCount> vectors(a, a_step, g, g_step);
  for (int i = 0; i < kWidth; ++i) {
    Products<Real<T>> chain;
    for (int k = 0; k < kCount; ++k) vectors.add_to(chain, k, i);
    sum[i].add(chain);
  }
}

// Channels across the lanes (x), kWidth to each, which lie side by side in memory. The rows of threads (y) share the
// positions of the unit's example, or its examples if it has several.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_columns(ChannelView a, ChannelView g, double scale, Plan plan, Sums* units) {
  constexpr int kCount = kWidth == 1 ? 8 : 4;
  const Unit unit = this_unit(plan, a);
  const int lanes = blockDim.x, lane = threadIdx.x, rows = blockDim.y, row = threadIdx.y;
  const int64_t own = (unit.tile * lanes + lane) * kWidth;
  const int64_t channel = min(own, a.channels - kWidth);  // lanes to spare repeat the last channels
  const bool several = plan.examples > 1;
  const int64_t step = several ? 1 : rows, a_step = step * a.position_stride, g_step = step * g.position_stride;
  Sums total[kWidth];
  for (int64_t n = unit.first_example + (several ? row : 0); n < unit.last_example; n += several ? rows : 1) {
    const T* const activation = static_cast<const T*>(a.data) + n * a.example_stride + channel;
    const T* const gradient = static_cast<const T*>(g.data) + n * g.example_stride + channel;
    Products<double> sum[kWidth];
    int64_t p = unit.first_position + (several ? 0 : row);
    for (; p + (kCount - 1) * step < unit.last_position; p += kCount * step) {
      add_column_vectors<kCount>(activation + p * a.position_stride, a_step, gradient + p * g.position_stride, g_step,
                                 sum);
    }
    for (; p < unit.last_position; p += step) {
      add_column_vectors<1>(activation + p * a.position_stride, a_step, gradient + p * g.position_stride, g_step, sum);
    }
    for (int i = 0; i < kWidth; ++i) add_example(total[i], sum[i], scale);
  }

  __shared__ double shared[kSums][kThreads];
  const int thread = row * lanes + lane;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kSums; ++r) shared[r][thread] = total[c].values[r];
    __syncthreads();
    // Thread (lane, row) adds up values[row] of its lane.
    if (row < kSums && own == channel) {
      double sum = 0;
      for (int i = 0; i < rows; ++i) sum += shared[row][i * lanes + lane];
      units[unit.index * a.channels + channel + c].values[row] = sum;
    }
    __syncthreads();
  }
}

}  // namespace pcafast::cuda::taylor
