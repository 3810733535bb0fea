// The matrix instructions of csrc/cuda/matrix.h on the CPU. Lanes exchange what they bring through memory of their warp,
// which has two sides: a lane that goes ahead writes to the other one. Sums lose what float has no room for, rounded
// toward zero, as tensor cores do; TF32 operands lose their low 13 bits.
#pragma once

#include <cstdio>

#include "cuda/device.h"

namespace device_host {

struct Brought {
  float left[8], right[4];  // fragments, element by element
  const void* row;
};
inline Brought brought[2][kMaxThreads];
inline bool side[kMaxThreads];  // which a thread uses next

// What all lanes of the warp bring to this place; valid until the next exchange.
inline const Brought* exchange(const Brought& own, Place place) {
  const size_t thread = current;
  const bool used = side[thread];
  side[thread] = !used;
  brought[used][thread] = own;
  meet({place, false, ~0u});
  return brought[used] + thread / kWarp * kWarp;
}

inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isnan(x) || std::fabs(nearest) <= std::fabs(x)) return nearest;
  return std::isinf(nearest) && std::isinf(x) ? nearest : std::nextafter(nearest, 0.0f);
}

template <typename T, size_t kRegisters>
void take_apart(const uint32_t (&registers)[kRegisters], float* elements) {
  for (const uint32_t bits : registers) {
    if constexpr (std::is_same_v<T, float>) {
      *elements++ = __uint_as_float(bits & ~0x1fffu);
    } else {
      *elements++ = pcafast::cuda::to_real(T{static_cast<uint16_t>(bits)});
      *elements++ = pcafast::cuda::to_real(T{static_cast<uint16_t>(bits >> 16)});
    }
  }
}

// Which lane has element (r, k), r that of a row of the left factor or of a column of the right one, and where.
template <typename T>
int lane_of(int r, int k) {
  return r % 8 * 4 + (std::is_same_v<T, float> ? k % 4 : k % 8 / 2);
}
template <typename T>
int place_of(int r, int k, int rows) {  // rows: 16 of the left factor, 8 of the right one
  constexpr bool kPairs = !std::is_same_v<T, float>;
  const int half = kPairs ? k / 8 : k / 4, reg = rows / 8 * half + r / 8;
  return kPairs ? 2 * reg + k % 2 : reg;
}

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};
struct Copies {
  size_t block = 0;
  std::deque<std::vector<Copy>> batches;
  std::vector<Copy> open;
};
inline Copies copies_of[kMaxThreads];

// Of the current thread.
inline Copies& copies() {
  Copies& own = copies_of[current];
  if (own.block != blocks_run) own = {blocks_run, {}, {}};
  return own;
}

// As the sanitizer would say it, because nothing can be thrown out of a thread.
inline void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) std::fputs("runtime error: misaligned address\n", stderr);
}

}  // namespace device_host

namespace pcafast::cuda {

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], T,
                  device_host::Place place = device_host::Place::here()) {
  device_host::Brought own = {};
  device_host::take_apart<T>(left, own.left);
  device_host::take_apart<T>(right, own.right);
  const device_host::Brought* const lanes = device_host::exchange(own, place);
  const int lane = device_host::lane(), depth = std::is_same_v<T, float> ? 8 : 16;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < depth; ++k) {
      sum += double{lanes[device_host::lane_of<T>(row, k)].left[device_host::place_of<T>(row, k, 16)]} *
             lanes[device_host::lane_of<T>(column, k)].right[device_host::place_of<T>(column, k, 8)];
    }
    sums[i] = device_host::toward_zero(sum);
  }
}

inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fffffffu;
  return std::isinf(x) ? bits : (bits + 0x1000u) & ~0x1fffu;
}

template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row, device_host::Place place = device_host::Place::here()) {
  device_host::check_alignment(row);
  device_host::Brought own = {};
  own.row = row;
  const device_host::Brought* const lanes = device_host::exchange(own, place);
  const int lane = device_host::lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r, int c) -> uint32_t {
      return static_cast<const uint16_t*>(lanes[i * 8 + r].row)[c];
    };
    matrices[i] = kTransposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

// A copy is not there before it is waited for.
inline void copy_async(void* shared, const void* global, bool valid) {
  device_host::check_alignment(shared);
  if (valid) device_host::check_alignment(global);
  device_host::copies().open.push_back({shared, global, valid});
}
inline void end_batch_of_copies() {
  device_host::Copies& own = device_host::copies();
  own.batches.push_back(std::move(own.open));
  own.open.clear();
}
template <size_t kLeft>
void wait_for_copies() {
  device_host::Copies& own = device_host::copies();
  for (; own.batches.size() > kLeft; own.batches.pop_front()) {
    for (const device_host::Copy& copy : own.batches.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
  }
}

}  // namespace pcafast::cuda
