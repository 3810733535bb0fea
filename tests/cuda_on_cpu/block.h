// Runs the blocks of a kernel one after another on the CPU, each thread of a block a fiber that runs until it comes to
// a barrier. Which fiber runs next is up to the schedule, so a result that depends on a missing barrier differs between
// schedules. Shared memory starts as NaN in every block; a barrier that only some of its threads reach is an error
// that says where they stand, and so is a write beyond dynamic shared memory. Compile with -fno-gnu-unique, or
// libraries loaded together have their schedulers and shared memory in common, and without _FORTIFY_SOURCE, which
// takes a jump to another stack for an error.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace device_host {

inline uint64_t schedule = 0;  // 0: lowest thread and block first; 1: highest first; others seed a random choice
inline size_t max_shared_bytes = 227 << 10;  // that a launch may ask for; a test may pretend a smaller device
inline int multiprocessors = 2;              // or a larger one

struct Launch {
  size_t kernel;  // where it is in its library
  size_t blocks, threads, shared_bytes;
};
inline bool recording = false;  // launches are noted here, not run
inline std::vector<Launch> launches;

constexpr size_t kStackBytes = 1 << 18, kMaxThreads = 1024, kGuardWords = 64;
constexpr unsigned kWarp = 32;

struct Place {  // of a call in a kernel
  const char* file;
  int line;

  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

inline std::vector<Place> barriers_met;  // __syncthreads, its votes, and __syncwarp
inline std::string absent_barrier;       // the place of one that threads pass without waiting

struct Meeting {
  Place place;
  bool whole_block;
  unsigned lanes;  // of the warp, unless the whole block

  bool operator==(const Meeting& other) const {
    return whole_block == other.whole_block && lanes == other.lanes && place == other.place;
  }
};

enum class State : char { kReady, kWaiting, kExited };

struct Fiber {
  dim3 index;
  Meeting meeting;          // where it waits,
  uint64_t sent, received;  // the value it brought there and the one it takes away
  unsigned source;          // the lane whose value it takes
  unsigned votes;           // the lanes of a warp that brought anything but zero, or how many threads of the block
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf jump;
};

inline std::deque<Fiber> fibers;   // never moved; the first of them are
inline std::vector<State> states;  // the threads of the running block
inline size_t current;
inline size_t at_block_barrier;
inline size_t blocks_run;
inline jmp_buf scheduler;
inline const std::function<void()>* kernel;
inline std::mt19937_64 random;
inline std::vector<uint64_t> dynamic_memory;

// If the current thread is the last that its meeting waits for, lets them all go on.
inline void arrive() {
  const Meeting meeting = fibers[current].meeting;
  const size_t first = meeting.whole_block ? 0 : current / kWarp * kWarp;
  const size_t last = meeting.whole_block ? states.size() : std::min(first + kWarp, states.size());
  const auto member = [&](size_t i) {
    return first <= i && i < last && (meeting.whole_block || (meeting.lanes >> (i - first) & 1));
  };
  if (meeting.whole_block && ++at_block_barrier < states.size()) return;
  unsigned votes = 0;
  for (size_t i = first; i < last; ++i) {
    if (!member(i)) continue;
    if (states[i] != State::kWaiting || !(fibers[i].meeting == meeting)) return;
    if (fibers[i].sent != 0) votes += meeting.whole_block ? 1 : 1u << (i - first);
  }
  if (meeting.whole_block) at_block_barrier = 0;
  for (size_t i = first; i < last; ++i) {
    if (!member(i)) continue;
    const size_t source = first + fibers[i].source;
    fibers[i].received = member(source) ? fibers[source].sent : ~uint64_t{0};
    fibers[i].votes = votes;
    states[i] = State::kReady;
  }
}

// swapcontext would ask the operating system for the signal mask each time.
inline void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

inline const Fiber& meet(Meeting meeting, uint64_t sent = 0, unsigned source = 0) {
  Fiber& self = fibers[current];
  states[current] = State::kWaiting;
  self.meeting = meeting;
  self.sent = sent;
  self.source = source;
  arrive();
  jump(self.jump, scheduler);
  return self;
}

// Whether threads wait here.
inline bool barrier_stands(Place place) {
  if (std::find(barriers_met.begin(), barriers_met.end(), place) == barriers_met.end()) barriers_met.push_back(place);
  return absent_barrier.empty() || place.text() != absent_barrier;
}

inline void run_thread() {
  while (true) {
    (*kernel)();
    states[current] = State::kExited;
    jump(fibers[current].jump, scheduler);
  }
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_thread, 0);
  fiber.started = true;
  if (_setjmp(scheduler) == 0) setcontext(&fiber.start);
}

// The next thread to run, or none.
inline size_t next_ready() {
  const size_t count = states.size(), start = schedule < 2 ? 0 : random() % count;
  for (size_t k = 0; k < count; ++k) {
    const size_t i = schedule == 1 ? count - 1 - k : (start + k) % count;
    if (states[i] == State::kReady) return i;
  }
  return count;
}

inline void check_all_exited() {
  std::map<std::string, int> places;
  for (size_t i = 0; i < states.size(); ++i) {
    ++places[states[i] == State::kExited ? "exited" : "wait at " + fibers[i].meeting.place.text()];
  }
  if (places.size() == 1 && places.count("exited")) return;
  for (Fiber& fiber : fibers) fiber.started = false;
  std::string message = "divergent barrier: of the block's threads";
  for (const auto& [place, count] : places) message += " " + std::to_string(count) + " " + place + ";";
  throw std::runtime_error(message);
}

inline void run_block() {
  at_block_barrier = 0;
  ++blocks_run;
  std::fill(states.begin(), states.end(), State::kReady);
  while ((current = next_ready()) < states.size()) {
    Fiber& fiber = fibers[current];
    threadIdx = fiber.index;
    fiber.started ? jump(scheduler, fiber.jump) : start(fiber);
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

inline size_t offset_in_library(const void* address) {
  Dl_info library;
  dladdr(address, &library);
  return static_cast<const char*>(address) - static_cast<const char*>(library.dli_fbase);
}

inline void run_grid(const void* address, dim3 grid, dim3 block, size_t shared_bytes,
                     const std::function<void()>& body) {
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64 || blocks < 1 || grid.x > 0x7fffffffu || grid.y > 0xffffu ||
      grid.z > 0xffffu || shared_bytes > max_shared_bytes) {
    throw std::runtime_error("CUDA kernel launch failed: invalid configuration");
  }
  if (recording) {
    launches.push_back({offset_in_library(address), blocks, threads, shared_bytes});
    return;
  }
  kernel = &body;
  gridDim = grid;
  blockDim = block;
  states.resize(threads);
  if (fibers.size() < threads) fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    const size_t row = i / block.x;
    fibers[i].index = dim3(i % block.x, row % block.y, row / block.y);
  }
  random.seed(schedule);
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
  const Segment shared = find_shared();
  const size_t words = (shared_bytes + 7) / 8;
  for (size_t i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    std::memset(shared.begin, 0xff, shared.bytes);
    dynamic_memory.assign(words + kGuardWords, ~uint64_t{0});
    run_block();
    const auto guard = dynamic_memory.begin() + words;
    if (std::count(guard, dynamic_memory.end(), ~uint64_t{0}) != kGuardWords) {
      throw std::runtime_error("a write beyond the " + std::to_string(shared_bytes) +
                               " bytes of dynamic shared memory");
    }
  }
}

}  // namespace device_host
