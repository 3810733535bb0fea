// A vector of one register, as kernels that are written for its length use it.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "load.h"
#include "multiarch.h"

namespace pcafast::cpu {

// Vector is one register of float or double.
template <class Vector>
struct Lanes {
  using Work = std::remove_reference_t<decltype(std::declval<Vector&>()[0])>;
  static constexpr int kBytes = sizeof(Vector);
  static constexpr int kLanes = kBytes / sizeof(Work);
  // Rows of a tile of products: with three vectors and the factors of both they fill the registers.
  static constexpr int kRows = kBytes == 64 ? 8 : std::min(4, kLanes);

  template <class T>
  static Work element(T x) {
    if constexpr (std::is_same_v<Work, double>) {
      return to_double(x);
    } else {
      return to_float(x);
    }
  }

  template <class T>
  static Vector load(const T* from) {
    Vector loaded;
    if constexpr (std::is_same_v<T, Work>) {
      std::memcpy(&loaded, from, sizeof loaded);
    } else {
      for (int l = 0; l < kLanes; ++l) loaded[l] = element(from[l]);
    }
    return loaded;
  }

  // Lane l of tile[i] becomes lane i of tile[l].
  static void transpose(Vector (&tile)[kLanes]) { exchange<1>(tile, std::make_index_sequence<kLanes>()); }

 private:
  template <int kDistance, size_t... l>
  static void exchange(Vector (&tile)[kLanes], std::index_sequence<l...> lanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (i & kDistance) continue;
      const Vector a = tile[i], b = tile[i + kDistance];
#if PCAFAST_HAS_SHUFFLEVECTOR
      tile[i] = __builtin_shufflevector(a, b, (l & kDistance ? kLanes + (l ^ kDistance) : l)...);
      tile[i + kDistance] = __builtin_shufflevector(a, b, (l & kDistance ? kLanes + l : l ^ kDistance)...);
#else
      ((tile[i][l] = l & kDistance ? b[l ^ kDistance] : a[l]), ...);
      ((tile[i + kDistance][l] = l & kDistance ? b[l] : a[l ^ kDistance]), ...);
#endif
    }
    if constexpr (2 * kDistance < kLanes) exchange<2 * kDistance>(tile, lanes);
  }
};

typedef float Floats16 __attribute__((vector_size(16)));
typedef double Doubles16 __attribute__((vector_size(16)));
typedef float Floats32 __attribute__((vector_size(32)));
typedef double Doubles32 __attribute__((vector_size(32)));
typedef float Floats64 __attribute__((vector_size(64)));
typedef double Doubles64 __attribute__((vector_size(64)));

}  // namespace pcafast::cpu
