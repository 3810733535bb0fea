// The matrix instructions of csrc/cuda/matrix.h on the CPU. Lanes exchange what they bring through memory of their
// warp, which has two sides: a lane that goes ahead writes to the other one. Sums lose what float has no room for,
// rounded toward zero, as tensor cores do; TF32 operands lose their low 13 bits.
#pragma once

#include <cstdio>

#include "cuda/device.h"

namespace device_host {

struct Exchange {
  float left[16][16], right[8][16];  // by row and column of the factors, each with the summed index last
  const void* rows[kWarp];
};
inline Exchange exchanges[kMaxThreads / kWarp][2];
inline bool sides[kMaxThreads];  // which a thread uses next

// The lane gives with bring(exchange) what it has; the result is what all lanes of the warp gave, valid until the next
// exchange.
template <typename Bring>
const Exchange& exchange(Bring bring, Place place) {
  Exchange& own = exchanges[current / kWarp][sides[current]];
  sides[current] = !sides[current];
  bring(own);
  meet({place, false, ~0u});
  return own;
}

inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isnan(x) || std::fabs(nearest) <= std::fabs(x)) return nearest;
  return std::isinf(nearest) && std::isinf(x) ? nearest : std::nextafter(nearest, 0.0f);
}

// Element i of a fragment of T, two to a register or one.
template <typename T, size_t kRegisters>
float element_of(const uint32_t (&registers)[kRegisters], int i) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(registers[i] & ~0x1fffu);
  } else {
    return pcafast::cuda::to_real(T{static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16))});
  }
}

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
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
inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) std::fputs("runtime error: misaligned address\n", stderr);
}

}  // namespace device_host

namespace pcafast::cuda {

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], T,
                  device_host::Place place = device_host::Place::here()) {
  constexpr bool kPairs = !std::is_same_v<T, float>;
  constexpr int kDepth = kPairs ? 16 : 8, kEach = kPairs ? 2 : 1;  // elements of a register
  const int lane = device_host::lane(), g = lane / 4, t = lane % 4;
  const auto bring = [&](device_host::Exchange& own) {
    for (int i = 0; i < kEach; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = kEach * t + i + half * kDepth / 2;
        own.left[g][k] = device_host::element_of<T>(left, 2 * half * kEach + i);
        own.left[g + 8][k] = device_host::element_of<T>(left, (2 * half + 1) * kEach + i);
        own.right[g][k] = device_host::element_of<T>(right, half * kEach + i);
      }
    }
  };
  const device_host::Exchange& all = device_host::exchange(bring, place);
  for (int i = 0; i < 4; ++i) {
    const float *row = all.left[g + i / 2 * 8], *column = all.right[2 * t + i % 2];
    double sum = sums[i];
    for (int k = 0; k < kDepth; ++k) sum += double{row[k]} * column[k];
    sums[i] = device_host::toward_zero(sum);
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row, device_host::Place place = device_host::Place::here()) {
  device_host::check_alignment(row, 16);
  const int lane = device_host::lane(), g = lane / 4, t = lane % 4;
  const device_host::Exchange& all =
      device_host::exchange([&](device_host::Exchange& own) { own.rows[lane] = row; }, place);
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r, int c) -> uint32_t { return static_cast<const uint16_t*>(all.rows[i * 8 + r])[c]; };
    matrices[i] = kTransposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

// A copy is not there before it is waited for.
template <size_t kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  device_host::check_alignment(shared, kBytes);
  if (valid) device_host::check_alignment(global, kBytes);
  device_host::copies().open.push_back({shared, global, kBytes, valid});
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
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
  }
}

}  // namespace pcafast::cuda
