// Eight doubles at a time, as GCC and clang vector extensions: the compiler maps them to whatever the
// instruction set at hand has.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "load.h"

namespace pcafast::cpu {

constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef int64_t LaneMask __attribute__((vector_size(8 * kLanes)));

inline Lanes broadcast(double value) { return Lanes{} + value; }

typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));

// Spelt out, of this GCC makes one conversion; but of floats that come from memory it makes eight.
inline Lanes widen(FloatLanes x) { return Lanes{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}; }

// Two vectors of neighbouring elements: the first half and the second, or the even and the odd ones, which is how
// bfloat16 is taken apart without a shuffle.
constexpr int kPair = 2 * kLanes;
struct LanePair {
  Lanes first, second;
};
template <class T>
constexpr int index_in_pair(int second, int lane) {
  return std::is_same_v<T, c10::BFloat16> ? 2 * lane + second : second * kLanes + lane;
}

inline LanePair load_pair(const double* from) {
  LanePair pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

inline LanePair load_pair(const float* from) {
  FloatLanes first, second;
  std::memcpy(&first, from, sizeof first);
  std::memcpy(&second, from + kLanes, sizeof second);
  return {__builtin_convertvector(first, Lanes), __builtin_convertvector(second, Lanes)};
}

inline LanePair load_pair(const c10::BFloat16* from) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  Words words;
  std::memcpy(&words, from, sizeof words);
  return {widen((FloatLanes)(words << 16)), widen((FloatLanes)(words & 0xffff0000u))};
}

inline LanePair load_pair(const c10::Half* from) {
  LanePair pair;
  for (int l = 0; l < kLanes; ++l) {
    pair.first[l] = to_double(from[l]);
    pair.second[l] = to_double(from[kLanes + l]);
  }
  return pair;
}

inline double absolute(double x) { return __builtin_fabs(x); }
inline Lanes absolute(Lanes x) { return (Lanes)((LaneMask)x & std::numeric_limits<int64_t>::max()); }

// Counting with integers in the lanes is faster.
template <class Value>
using CountOf = std::conditional_t<std::is_same_v<Value, Lanes>, LaneMask, double>;

inline double is_zero(double x) { return x == 0 ? 1.0 : 0.0; }
inline LaneMask is_zero(Lanes x) { return -(x == 0.0); }
inline double as_value(double count) { return count; }
inline Lanes as_value(LaneMask count) { return __builtin_convertvector(count, Lanes); }

inline double sum_of_lanes(Lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

}  // namespace pcafast::cpu
