// Stands in for CUDA in tests: runs a kernel's blocks one after another on the CPU, each thread of a block a fiber
// that runs until it comes to a barrier. Which fiber runs next is up to the schedule, so a result that depends on a
// missing barrier differs between schedules; shared memory starts as NaN in every block; a barrier that only some of
// its threads reach is an error that says where they stand. Compile with -fno-gnu-unique, or libraries loaded together
// have their schedulers and shared memory in common.
#pragma once

#include <link.h>
#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // so that all of it lies in one segment, which find_shared() finds

using std::fabs;
using std::isfinite;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef struct CUstream_st* cudaStream_t;

namespace device_host {

inline uint64_t schedule = 0;  // 0: lowest thread and block first; 1: highest first; others seed a random choice

constexpr size_t kStackBytes = 1 << 16, kMaxThreads = 1024, kMaxDynamicShared = 48 << 10;
constexpr unsigned kWarp = 32;

struct Barrier {
  bool whole_block;
  unsigned lanes;  // of the warp, unless the whole block
  const char* file;
  int line;

  bool operator==(const Barrier& other) const {
    return whole_block == other.whole_block && lanes == other.lanes && line == other.line &&
           std::strcmp(file, other.file) == 0;
  }
};

enum class State : char { kReady, kWaiting, kExited };

struct Fiber {
  dim3 index;
  Barrier barrier;          // where it waits,
  uint64_t sent, received;  // the value it brought there and the one it takes away
  unsigned source;          // the lane that a shuffle reads
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t context;
};

inline std::vector<Fiber> fibers;  // the threads of the running block
inline std::vector<State> states;
inline size_t current;
inline size_t at_block_barrier;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel;
inline std::mt19937_64 random;
inline std::vector<uint64_t> dynamic_memory;

// If the current thread is the last that its barrier waits for, lets them all go on.
inline void arrive() {
  const Barrier barrier = fibers[current].barrier;
  const size_t first = barrier.whole_block ? 0 : current / kWarp * kWarp;
  const size_t last = barrier.whole_block ? fibers.size() : min(first + kWarp, fibers.size());
  const auto member = [&](size_t i) {
    return first <= i && i < last && (barrier.whole_block || (barrier.lanes >> (i - first) & 1));
  };
  if (barrier.whole_block && ++at_block_barrier < fibers.size()) return;
  bool all = true;
  for (size_t i = first; i < last; ++i) {
    if (!member(i)) continue;
    if (states[i] != State::kWaiting || !(fibers[i].barrier == barrier)) return;
    all = all && fibers[i].sent;
  }
  if (barrier.whole_block) at_block_barrier = 0;
  for (size_t i = first; i < last; ++i) {
    if (!member(i)) continue;
    const size_t source = first + fibers[i].source;
    fibers[i].received = barrier.whole_block ? all : member(source) ? fibers[source].sent : ~uint64_t{0};
    states[i] = State::kReady;
  }
}

inline uint64_t wait(Barrier barrier, uint64_t sent = 0, unsigned source = 0) {
  Fiber& self = fibers[current];
  states[current] = State::kWaiting;
  self.barrier = barrier;
  self.sent = sent;
  self.source = source;
  arrive();
  swapcontext(&self.context, &scheduler);
  return self.received;
}

inline void run_thread() {
  (*kernel)();
  states[current] = State::kExited;
}

// The next thread to run, or none.
inline size_t next_ready() {
  const size_t count = fibers.size(), start = schedule < 2 ? 0 : random() % count;
  for (size_t k = 0; k < count; ++k) {
    const size_t i = schedule == 1 ? count - 1 - k : (start + k) % count;
    if (states[i] == State::kReady) return i;
  }
  return count;
}

inline void check_all_exited() {
  std::map<std::string, int> places;
  for (size_t i = 0; i < fibers.size(); ++i) {
    const Barrier& barrier = fibers[i].barrier;
    const bool exited = states[i] == State::kExited;
    ++places[exited ? "exited" : "wait at " + std::string(barrier.file) + ":" + std::to_string(barrier.line)];
  }
  if (places.size() == 1 && places.count("exited")) return;
  std::string message = "divergent barrier: of the block's threads";
  for (const auto& [place, count] : places) message += " " + std::to_string(count) + " " + place + ";";
  throw std::runtime_error(message);
}

inline void run_block() {
  at_block_barrier = 0;
  states.assign(fibers.size(), State::kReady);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    const unsigned row = i / blockDim.x;
    fiber.index = dim3(i % blockDim.x, row % blockDim.y, row / blockDim.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_thread, 0);
  }
  while ((current = next_ready()) < fibers.size()) {
    threadIdx = fibers[current].index;
    swapcontext(&scheduler, &fibers[current].context);
  }
  check_all_exited();
}

struct Segment {
  char* begin;
  size_t bytes;
};

inline thread_local char shared_mark;

// The thread-local variables of this library: the __shared__ ones, and shared_mark.
inline Segment find_shared() {
  Segment found = {&shared_mark, sizeof shared_mark};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          char* const begin = static_cast<char*>(library->dlpi_tls_data);
          const size_t bytes = library->dlpi_phdr[i].p_memsz;
          if (library->dlpi_phdr[i].p_type != PT_TLS || begin == nullptr) continue;
          if (begin <= &shared_mark && &shared_mark < begin + bytes) *static_cast<Segment*>(result) = {begin, bytes};
        }
        return 0;
      },
      &found);
  return found;
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64 || blocks < 1 || grid.x > 0x7fffffffu || grid.y > 0xffffu ||
      grid.z > 0xffffu || shared_bytes > kMaxDynamicShared) {
    throw std::runtime_error("CUDA kernel launch failed: invalid configuration");
  }
  kernel = &body;
  gridDim = grid;
  blockDim = block;
  fibers.resize(threads);
  random.seed(schedule);
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
  const Segment shared = find_shared();
  for (size_t i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    std::memset(shared.begin, 0xff, shared.bytes);
    dynamic_memory.assign((shared_bytes + 7) / 8, ~uint64_t{0});
    run_block();
  }
}

template <typename T>
T shuffle(unsigned lanes, T value, unsigned source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = wait({false, lanes, file, line}, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

}  // namespace device_host

// The names of CUDA. A barrier is known by the place of the call.

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  device_host::wait({true, 0, file, line});
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return device_host::wait({true, 0, file, line}, predicate != 0) != 0;
}
inline void __syncwarp(unsigned lanes = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  device_host::wait({false, lanes, file, line});
}
template <typename T>
T __shfl_sync(unsigned lanes, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return device_host::shuffle(lanes, value, source, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return device_host::shuffle(lanes, value, device_host::lane() ^ mask, file, line);
}
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "sums of floating-point numbers have a fixed order");
  const T old = *address;
  *address += value;
  return old;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const bool finite = (x.bits & 0x7c00u) != 0x7c00u;
  const float value = finite ? __uint_as_float(magnitude) * 0x1p112f : __uint_as_float(magnitude | 0x7f800000u);
  return sign ? -value : value;
}

namespace pcafast::cuda {

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            std::common_type_t<Parameters>... arguments) {
  device_host::run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(device_host::dynamic_memory.data());
}

}  // namespace pcafast::cuda
