// The boundary between the operators (ops.cpp, which knows torch) and the kernels (which do not): plain structs
// of pointers, sizes and strides. Strides count elements. ops.cpp has checked everything by the time a kernel
// is called; no size is zero.
#pragma once

#include <cstdint>

namespace pcafast {

enum class Dtype : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

// An activation or gradient, (examples, channels, positions) in whatever order it lies in memory.
struct ChannelView {
  const void* data;
  Dtype dtype;
  int64_t examples, channels, positions;
  int64_t example_stride, channel_stride, position_stride;
};

// A batch of feature maps, (examples, channels, height, width).
struct MapView {
  const void* data;
  Dtype dtype;
  int64_t examples, channels, height, width;
  int64_t example_stride, channel_stride, row_stride, column_stride;
};

// One batch of activation x gradient, added to the running sums.
//
// With s[n, c] = scale * sum over positions of a * g, and P positions, the batch adds
//   sums[0, c] += sum over n of |s| / P          (molchanov2017)
//   sums[1, c] += sum over n of s^2 / P          (molchanov2019)
//   sums[2, c] += sum over n of s                (signed)
//   sums[3, c] += |scale| * sum over n and positions of |a * g|   (absolute)
//   examples += N,  positions += N * P
// unless any of these is NaN or infinite: then the batch is left out and *skipped grows by one.
struct TaylorArgs {
  ChannelView activation, gradient;  // same sizes, each with its own strides; on the CPU of one dtype
  double scale;
  double* examples;
  double* positions;
  double* sums;  // (4, channels), contiguous
  int64_t* skipped;
  double* workspace;  // taylor_workspace(args) doubles, uninitialised
};

// One batch of activations, merged into running moments by the pairwise formula of Chan, Golub and LeVeque (1979).
struct MomentsArgs {
  ChannelView x;
  double* count;            // positions seen
  double* mean;             // (channels,)
  double* centred_squares;  // (channels,)  sum of (x - mean)^2
  double* absolute;         // (channels,)  sum of |x|
  double* zeros;            // (channels,)  how many are exactly zero
  int64_t* skipped;
  double* workspace;  // channel_moments_workspace(args) doubles, uninitialised
};

// One batch merged into a running mean and co-moment, one block of channels per group.
struct CovarianceArgs {
  ChannelView x;
  const double* weight;  // (examples, positions) contiguous, or null for all ones; zero leaves a position out
  int64_t groups;        // divides x.channels
  double scale;          // x is taken times this
  double* count;         // sum of the weights
  double* mean;          // (channels,)
  double* comoment;      // (groups, channels / groups, channels / groups)  sum of (x - mean)(x - mean)'
  int64_t* skipped;
  double* workspace;  // on CUDA, covariance_workspace(args) doubles, uninitialised
};

// A lattice of pixels, and of each its partner, `down` rows below and `right` columns to the right of it.
struct PixelPairs {
  int64_t top, left, rows, columns;
  int64_t down, right;
};

// One batch merged into running co-moments of pixel pairs, from which the covariance of patches is put together
// (pcafast/patches.py). A slot is the union of some lattices of one offset:
//   count[s]    += examples * pixels
//   left[s]      = mean of the first pixels,  right[s] = mean of their partners
//   comoment[s]  = sum of (first - left[s])(partner - right[s])'
// in each of which a pixel (y, x) stands for the channels of all taps: entry c * taps + t is channel c at (y, x) + t.
struct PatchCovarianceArgs {
  MapView x;
  // The map that pixels are counted in: its row y is row source_rows[y] of x, or zeros if that is -1; columns likewise.
  // All lattices, their partners and their taps lie in it.
  int64_t height, width;
  const int64_t *source_rows, *source_columns;
  int64_t taps;
  const int64_t* tap_offsets;     // (taps, 2), rows and columns
  int64_t row_step, column_step;  // between the pixels of a lattice
  int64_t lattices;
  const PixelPairs* pairs;  // (lattices,)
  int64_t slots;
  const int64_t* slot_ends;  // slot s has slot_lattices[slot_ends[s - 1]] up to slot_lattices[slot_ends[s]]
  const int64_t* slot_lattices;
  int64_t groups;  // divides x.channels
  int64_t patches_per_example;
  double* patches;   // += examples * patches_per_example
  double* count;     // (slots,)
  double* left;      // (slots, channels * taps)
  double* right;     // (slots, channels * taps)
  double* comoment;  // (slots, groups, channels * taps / groups, channels * taps / groups)
  int64_t* skipped;
  double* workspace;  // on CUDA, patch_covariance_workspace(args) doubles, uninitialised
  // Whether on CUDA the memory after the channels of a pixel, up to the next pixel, may be read as well, where channels
  // lie side by side.
  int64_t padded;
};

// Number of singular values of every map above max(atol, rtol * largest).
struct RankArgs {
  MapView x;
  double rtol, atol;  // finite, not negative
  int64_t* ranks;     // (examples, channels), contiguous; -1 for a map with a NaN or an infinity
  double* workspace;  // on CUDA, feature_map_rank_workspace(args) doubles, uninitialised
};

namespace cpu {
int64_t taylor_workspace(const TaylorArgs& args);
void taylor_update(const TaylorArgs& args);
int64_t channel_moments_workspace(const MomentsArgs& args);
void channel_moments_update(const MomentsArgs& args);
void covariance_update(const CovarianceArgs& args);
void patch_covariance_update(const PatchCovarianceArgs& args);
void feature_map_rank(const RankArgs& args);
}  // namespace cpu

}  // namespace pcafast
