// Small kernels, right and wrong, that show what the host header notices.
#include "cuda/matrix.h"
#include "entry.h"

namespace {

using pcafast::cuda::dynamic_shared;
using pcafast::cuda::kFullWarp;
using pcafast::cuda::kWarp;

constexpr int kThreads = 96;

// Every kernel here is launched with kThreads threads per block, and with as many floats of dynamic shared memory or
// more.
using Kernel = void (*)(float* out);

void reverse_block(float* out) {
  __shared__ float memory[kThreads];
  memory[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
}

void reverse_warps(float* out) {
  float* const memory = dynamic_shared<float>();
  const int lane = threadIdx.x % kWarp, first = threadIdx.x - lane;
  memory[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[first + kWarp - 1 - lane];
}

// The second barrier keeps a value until its neighbour has read it.
void rotate_twice(float* out) {
  __shared__ float memory[kThreads];
  float value = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    memory[threadIdx.x] = value;
    __syncthreads();
    value = memory[(threadIdx.x + 1) % kThreads];
    __syncthreads();
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

// The last barrier is not needed.
void one_too_many(float* out) {
  __shared__ float memory[kThreads], other[kThreads];
  memory[threadIdx.x] = threadIdx.x;
  __syncthreads();
  other[threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
  __syncthreads();
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = other[kThreads - 1 - threadIdx.x];
}

void write_beyond_shared(float*) { dynamic_shared<float>()[kThreads + threadIdx.x] = 1; }

void shuffles(float* out) {
  const float next = __shfl_sync(kFullWarp, static_cast<float>(threadIdx.x), (threadIdx.x + 1) % kWarp);
  const int first = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x), 0);
  const double other = __shfl_xor_sync(kFullWarp, threadIdx.x * 1000.0, 5);
  out[blockIdx.x * kThreads + threadIdx.x] = next + other + 1e5 * first;
}

void votes(float* out) {
  const int all = __syncthreads_and(1);
  const int not_all = __syncthreads_and(threadIdx.x != 40);
  out[blockIdx.x * kThreads + threadIdx.x] = 2 * all + not_all;
}

void warp_votes(float* out) {
  const unsigned odd = __ballot_sync(kFullWarp, threadIdx.x % 2);
  const bool low = threadIdx.x % kWarp < 16;
  const unsigned third = __ballot_sync(low ? 0xffffu : 0xffff0000u, threadIdx.x % kWarp == 3);
  const int sixty = __any_sync(kFullWarp, threadIdx.x == 60);
  const bool right = odd == 0xaaaaaaaau && third == (low ? 8u : 0u);
  out[blockIdx.x * kThreads + threadIdx.x] = right ? __popc(odd) + sixty : -1;
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

struct alignas(16) Four {
  float values[4];
};

// Copies that a thread itself made are there after the wait, if they are of a batch that it waits for.
template <int kLeft>
void copy_ahead(float* out) {
  static const Four source = {{1, 2, 3, 4}};
  Four* const memory = dynamic_shared<Four>();
  for (int batch = 0; batch < 2; ++batch) {
    pcafast::cuda::copy_async<16>(memory + 2 * threadIdx.x + batch, &source, threadIdx.x != 5);
    pcafast::cuda::end_batch_of_copies();
  }
  pcafast::cuda::wait_for_copies<kLeft>();
  out[blockIdx.x * kThreads + threadIdx.x] = memory[2 * threadIdx.x + 1].values[3];
}

struct Named {
  const char* name;
  Kernel kernel;
};
constexpr Named kKernels[] = {
    {"reverse_block", reverse_block},
    {"reverse_warps", reverse_warps},
    {"rotate_twice", rotate_twice},
    {"read_unwritten_static", read_unwritten_static},
    {"read_unwritten_dynamic", read_unwritten_dynamic},
    {"one_too_many", one_too_many},
    {"write_beyond_shared", write_beyond_shared},
    {"shuffles", shuffles},
    {"votes", votes},
    {"warp_votes", warp_votes},
    {"half_warps", half_warps},
    {"thread_leaves", thread_leaves},
    {"two_barriers", two_barriers},
    {"lane_skips_shuffle", lane_skips_shuffle},
    {"barrier_or_shuffle", barrier_or_shuffle},
    {"copy_and_wait", copy_ahead<0>},
    {"copy_and_wait_for_one", copy_ahead<1>},
};

// Writes the linear index of every thread of the grid where its coordinates say, and counts the threads.
void number_threads(int* out, int* count) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, width = gridDim.x * blockDim.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y, height = gridDim.y * blockDim.y;
  const int z = blockIdx.z * blockDim.z + threadIdx.z;
  out[(z * height + y) * width + x] = atomicAdd(count, 1);
}

// One warp: the product of a (16, kDepth) and an (8, kDepth) matrix, fragments taken as the PTX manual says.
template <typename T, int kDepth>
void multiply_matrices(const float* left, const float* right, float* out) {
  constexpr int kEach = kDepth / 8;  // elements of a register
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto registers = [&](const float* row, int k) {
    if constexpr (kEach == 1) {
      return __float_as_uint(row[k + t]);
    } else {  // a float that a bfloat16 holds
      return __float_as_uint(row[k + 2 * t]) >> 16 | (__float_as_uint(row[k + 2 * t + 1]) & 0xffff0000u);
    }
  };
  const float *low = left + g * kDepth, *high = left + (g + 8) * kDepth, *column = right + g * kDepth;
  constexpr int kHalf = kDepth / 2;
  const uint32_t a[4] = {registers(low, 0), registers(high, 0), registers(low, kHalf), registers(high, kHalf)};
  const uint32_t b[2] = {registers(column, 0), registers(column, kHalf)};
  float sums[4] = {100, 100, 100, 100};
  pcafast::cuda::multiply_add(sums, a, b, T{});
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// One warp: rows of four 8 x 8 matrices of 16 bits, one after another, to the registers of every lane.
template <bool kTransposed>
void load_four(const uint16_t* matrices, uint32_t* out) {
  uint32_t loaded[4];
  pcafast::cuda::load_matrices<kTransposed>(loaded, matrices + 8 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = loaded[i];
}

}  // namespace

extern "C" {

const char* run_multiply_matrices(int depth, const float* left, const float* right, float* out) {
  return error_of([&] {
    const auto kernel = depth == 8 ? multiply_matrices<float, 8> : multiply_matrices<pcafast::cuda::BFloat16, 16>;
    pcafast::cuda::launch(kernel, dim3(1), dim3(kWarp), 0, nullptr, left, right, out);
  });
}

const char* run_load_four(bool transposed, const uint16_t* matrices, uint32_t* out) {
  return error_of([&] {
    const auto kernel = transposed ? load_four<true> : load_four<false>;
    pcafast::cuda::launch(kernel, dim3(1), dim3(kWarp), 0, nullptr, matrices, out);
  });
}

void split(float x, float* parts) {
  uint32_t bits[2];
  pcafast::cuda::split(x, bits[0], bits[1]);
  std::memcpy(parts, bits, sizeof bits);
}

const char* run_kernel(const char* name, unsigned blocks, size_t shared_bytes, float* out) {
  return error_of([&] {
    for (const Named& candidate : kKernels) {
      if (std::string(name) != candidate.name) continue;
      pcafast::cuda::launch(candidate.kernel, dim3(blocks), dim3(kThreads), shared_bytes, nullptr, out);
      return;
    }
    throw std::runtime_error("no such kernel");
  });
}

const char* run_number_threads(const unsigned* grid, const unsigned* block, int* out, int* count) {
  return error_of([&] {
    pcafast::cuda::launch(number_threads, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
                          nullptr, out, count);
  });
}

size_t max_shared_bytes() { return pcafast::cuda::max_shared_bytes(); }
}
