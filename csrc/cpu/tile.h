// A tile of products of channels: rows of single elements times vectors of columns, summed over samples in registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "multiarch.h"
#include "vectors.h"

namespace pcafast::cpu {

// Consecutive samples (steps apart), and those that they are multiplied with.
struct Run {
  int64_t first, partner, length;
};

// Where a tile's operands lie: elements row[sample * kLanes + r] and vectors column[sample + v * stride].
template <class Vector>
struct Operands {
  const typename Lanes<Vector>::Work* row;
  const Vector* column;
  int64_t stride;
  const Run *begin, *end;
  int64_t step;
};

// Products are added, times `factor`, to the first rows and columns of a tile of a matrix.
struct Target {
  double* out;
  int64_t stride, rows, columns;
  double factor;
};

template <class Vector, int kRows, int kVectors>
inline void add_tile(const Operands<Vector>& of, const Target& to) {
  using Work = typename Lanes<Vector>::Work;
  constexpr int kLanes = Lanes<Vector>::kLanes;
  Vector sum[kRows][kVectors] = {};
  for (const Run* run = of.begin; run < of.end; ++run) {
    const Work* row = of.row + run->first * kLanes;
    const Vector* column = of.column + run->partner;
    for (int64_t k = 0; k < run->length; ++k, row += of.step * kLanes, column += of.step) {
      Vector sample[kVectors];
      for (int v = 0; v < kVectors; ++v) sample[v] = column[v * of.stride];
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] += sample[v] * row[r];
      }
    }
  }
  Vector stored[kRows][kVectors];  // or the sums would not stay in registers
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) stored[r][v] = sum[r][v];
  }
  const bool whole = to.rows >= kRows && to.columns >= kVectors * kLanes;
  for (int64_t r = 0; r < (whole ? kRows : std::min<int64_t>(kRows, to.rows)); ++r) {
    const Work* const from = (const Work*)stored[r];
    double* const out = to.out + r * to.stride;
    if (whole) {
      for (int c = 0; c < kVectors * kLanes; ++c) out[c] += from[c] * to.factor;
    } else {
      for (int64_t c = 0; c < std::min<int64_t>(kVectors * kLanes, to.columns); ++c) out[c] += from[c] * to.factor;
    }
  }
}

// A function of its own for every tile: inlined into its callers it would lose registers to them.
#define PCAFAST_TILES(Name, ...)                                                                          \
  struct Name {                                                                                           \
    template <class Vector, int kRows, int kVectors>                                                      \
    __VA_ARGS__ __attribute__((noinline)) static void add(const Operands<Vector>& of, const Target& to) { \
      add_tile<Vector, kRows, kVectors>(of, to);                                                          \
    }                                                                                                     \
  };

PCAFAST_TILES(Tiles128)
#if PCAFAST_INSTRUCTION_SETS
PCAFAST_TILES(Tiles256, PCAFAST_V3)
PCAFAST_TILES(Tiles512, PCAFAST_V4)
template <class Vector>
using Tiles =
    std::conditional_t<sizeof(Vector) == 64, Tiles512, std::conditional_t<sizeof(Vector) == 32, Tiles256, Tiles128>>;
#else
template <class Vector>
using Tiles = Tiles128;
#endif

#undef PCAFAST_TILES

}  // namespace pcafast::cpu
