// Small kernels, right and wrong, that show what the host header notices.
#include <exception>
#include <string>

#include "cuda/device.h"

namespace {

using pcafast::cuda::dynamic_shared;
using pcafast::cuda::kFullWarp;
using pcafast::cuda::kWarp;

constexpr int kThreads = 96;

// Every kernel here is launched with kThreads threads per block and as many floats of dynamic shared memory.
using Kernel = void (*)(float* out);

template <bool kWithBarrier>
void reverse_block(float* out) {
  __shared__ float memory[kThreads];
  memory[threadIdx.x] = threadIdx.x;
  if (kWithBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
}

template <bool kWithBarrier>
void reverse_warps(float* out) {
  float* const memory = dynamic_shared<float>();
  const int lane = threadIdx.x % kWarp, first = threadIdx.x - lane;
  memory[threadIdx.x] = threadIdx.x;
  if (kWithBarrier) __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[first + kWarp - 1 - lane];
}

// The second barrier keeps a value until its neighbour has read it.
template <bool kWithBarrier>
void rotate_twice(float* out) {
  __shared__ float memory[kThreads];
  float value = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    memory[threadIdx.x] = value;
    __syncthreads();
    value = memory[(threadIdx.x + 1) % kThreads];
    if (kWithBarrier) __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = value;
}

void read_unwritten_static(float* out) {
  __shared__ float memory[kThreads];
  out[blockIdx.x * kThreads + threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x] = 1;  // the next block must not see it
}

void read_unwritten_dynamic(float* out) {
  float* const memory = dynamic_shared<float>();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x] = 1;
}

void shuffles(float* out) {
  const float next = __shfl_sync(kFullWarp, static_cast<float>(threadIdx.x), (threadIdx.x + 1) % kWarp);
  out[blockIdx.x * kThreads + threadIdx.x] = next + __shfl_xor_sync(kFullWarp, threadIdx.x * 1000.0, 5);
}

void votes(float* out) {
  const int all = __syncthreads_and(1);
  const int not_all = __syncthreads_and(threadIdx.x != 40);
  out[blockIdx.x * kThreads + threadIdx.x] = 2 * all + not_all;
}

void half_warps(float* out) {
  const bool low = threadIdx.x % kWarp < 16;
  for (unsigned i = 0; i < 1 + threadIdx.x / 16 % 2; ++i) __syncwarp(low ? 0xffffu : 0xffff0000u);
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

void thread_leaves(float*) {
  if (threadIdx.x == 70) return;
  __syncthreads();
}

void two_barriers(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void lane_skips_shuffle(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
}

void barrier_or_shuffle(float* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
    __syncwarp();
  }
}

struct Named {
  const char* name;
  Kernel kernel;
};
constexpr Named kKernels[] = {
    {"reverse_block", reverse_block<true>},
    {"reverse_block, barrier missing", reverse_block<false>},
    {"reverse_warps", reverse_warps<true>},
    {"reverse_warps, barrier missing", reverse_warps<false>},
    {"rotate_twice", rotate_twice<true>},
    {"rotate_twice, barrier missing", rotate_twice<false>},
    {"read_unwritten_static", read_unwritten_static},
    {"read_unwritten_dynamic", read_unwritten_dynamic},
    {"shuffles", shuffles},
    {"votes", votes},
    {"half_warps", half_warps},
    {"thread_leaves", thread_leaves},
    {"two_barriers", two_barriers},
    {"lane_skips_shuffle", lane_skips_shuffle},
    {"barrier_or_shuffle", barrier_or_shuffle},
};

// Writes the linear index of every thread of the grid where its coordinates say, and counts the threads.
void number_threads(int* out, int* count) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, width = gridDim.x * blockDim.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y, height = gridDim.y * blockDim.y;
  const int z = blockIdx.z * blockDim.z + threadIdx.z;
  out[(z * height + y) * width + x] = atomicAdd(count, 1);
}

template <typename Function>
const char* error_of(uint64_t schedule, Function function) {
  static std::string error;
  device_host::schedule = schedule;
  try {
    function();
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

const char* run_kernel(const char* name, unsigned blocks, float* out, uint64_t schedule) {
  return error_of(schedule, [&] {
    for (const Named& candidate : kKernels) {
      if (std::string(name) != candidate.name) continue;
      pcafast::cuda::launch(candidate.kernel, dim3(blocks), dim3(kThreads), kThreads * sizeof(float), nullptr, out);
      return;
    }
    throw std::runtime_error("no such kernel");
  });
}

const char* run_number_threads(const unsigned* grid, const unsigned* block, int* out, int* count, uint64_t schedule) {
  return error_of(schedule, [&] {
    pcafast::cuda::launch(number_threads, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                          nullptr, out, count);
  });
}
}
