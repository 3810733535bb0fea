// Rank of feature maps on the CPU: the number of singular values above a threshold, without a singular value
// decomposition. A map is brought to bidiagonal form, one map in each lane of a vector, or its Gram matrix to
// tridiagonal form, where maps are large and the threshold leaves room for the squared condition number. The form gives
// the largest singular value by bisection and the count by one Sturm sequence.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../kernels.h"
#include "bidiagonal.h"
#include "load.h"
#include "multiarch.h"
#include "sturm.h"
#include "tridiagonal.h"

namespace pcafast::cpu {
namespace {

// Several large maps together are slow, since they do not fit into the cache. One alone is slow if it is small.
constexpr int64_t kLargeSide = 64;

double relative_threshold(const RankArgs& args) {
  const double rounding = std::max(args.x.height, args.x.width) * std::numeric_limits<double>::epsilon();
  return std::max(args.rtol, rounding);
}

// Whether the eigenvalues of the Gram matrix tell singular values 0.1 % above the threshold from those below: they are
// wrong by as much as rounding the sums of squares, and 0.1 % of a singular value is 0.2 % of its square.
bool gram_is_accurate(const RankArgs& args) {
  const double rounding = 4 * std::max(args.x.height, args.x.width) * std::numeric_limits<double>::epsilon();
  return 0.002 * args.rtol * args.rtol >= rounding;
}

template <class Lanes>
inline void rank_maps(const RankArgs& args, int64_t begin, int64_t end) {
  using Maps = BidiagonalMaps<Lanes>;
  Maps maps(args.x.height, args.x.width);
  const double relative = relative_threshold(args);
  for (int64_t first = begin; first < end; first += Maps::kLanes) {
    Lanes scale{};
    with_element_type(args.x.dtype,
                      [&](auto zero) { scale = maps.template load<decltype(zero)>(args.x, first, end - 1); });
    maps.bidiagonalise();
    const auto finite = maps.finite();
    const Lanes threshold = larger(relative * maps.largest_singular_value(), args.atol * scale);
    const auto count = maps.count_above(threshold);
    for (int l = 0; l < Maps::kLanes && first + l < end; ++l) args.ranks[first + l] = finite[l] ? count[l] : -1;
  }
}

template <class Lanes>
inline void rank_large_maps(const RankArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Gram<Lanes>::kLanes;
  const int64_t size = std::min(args.x.height, args.x.width);
  const double relative = relative_threshold(args);
  Gram<Lanes> gram(args.x.height, args.x.width);
  const std::unique_ptr<Lanes[]> memory(new Lanes[4 * size]());
  Lanes *const diagonal = memory.get(), *const beside = diagonal + size, *const search = beside + size;
  for (int64_t first = begin; first < end; first += kLanes) {
    Lanes scale{};
    const int64_t lanes = std::min(kLanes, end - first);
    for (int64_t l = 0; l < lanes; ++l) {
      with_element_type(args.x.dtype, [&](auto zero) {
        scale[l] = gram.multiply(map_at<decltype(zero)>(args.x, first + l), args.x);
      });
      if (scale[l] != 0) gram.tridiagonalise((double*)diagonal + l, (double*)beside + l, kLanes);
    }
    std::copy(diagonal, search, search);
    const Lanes largest = square_root(largest_eigenvalue(search, search + size, size));
    const Lanes threshold = larger(relative * largest, args.atol * scale);
    const auto count = count_above(diagonal, beside, size, threshold * threshold);
    for (int64_t l = 0; l < lanes; ++l) args.ranks[first + l] = scale[l] != 0 ? count[l] : -1;
  }
}

template <class Lanes>
inline void rank_range_in(const RankArgs& args, int64_t begin, int64_t end) {
  if (std::min(args.x.height, args.x.width) > kLargeSide && gram_is_accurate(args)) {
    rank_large_maps<Lanes>(args, begin, end);
  } else {
    rank_maps<Lanes>(args, begin, end);
  }
}

// Lanes must be one register of the instruction set at hand: GCC makes very slow code of a wider vector. So
// each instruction set has a function of its own, into which all of the above is inlined.
typedef double TwoLanes __attribute__((vector_size(16)));

#if PCAFAST_INSTRUCTION_SETS
typedef double FourLanes __attribute__((vector_size(32)));
typedef double EightLanes __attribute__((vector_size(64)));

PCAFAST_V4 void rank_avx512(const RankArgs& args, int64_t begin, int64_t end) {
  rank_range_in<EightLanes>(args, begin, end);
}

PCAFAST_V3 void rank_avx2(const RankArgs& args, int64_t begin, int64_t end) {
  rank_range_in<FourLanes>(args, begin, end);
}

const auto rank_range = __builtin_cpu_supports("x86-64-v4")   ? rank_avx512
                        : __builtin_cpu_supports("x86-64-v3") ? rank_avx2
                                                              : rank_range_in<TwoLanes>;
#else
const auto rank_range = rank_range_in<TwoLanes>;
#endif

}  // namespace

void feature_map_rank(const RankArgs& args) {
  constexpr int64_t kGroup = 8;  // a multiple of every vector's length
  const int64_t maps = args.x.examples * args.x.channels;
  const int64_t shorter = std::min(args.x.height, args.x.width);
  const int64_t multiply_adds = args.x.height * args.x.width * shorter * kGroup;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / multiply_adds);
  at::parallel_for(0, (maps + kGroup - 1) / kGroup, grain,
                   [&](int64_t begin, int64_t end) { rank_range(args, begin * kGroup, std::min(end * kGroup, maps)); });
}

}  // namespace pcafast::cpu
