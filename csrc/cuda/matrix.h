// Matrix products of a warp, and copies to shared memory that nobody waits for, as the PTX manual describes them. In a
// fragment, lane 4 g + t has these elements of a tile:
//   16 x 16 of 16 bits, two to a register, columns c and c + 1:
//     (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   16 x 8 TF32: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   the right factor, 16 x 8 of 16 bits, rows r and r + 1: (2t, g), (2t + 8, g);  8 x 8 TF32: (t, g), (t + 4, g)
//   sums, 16 x 8: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include "device.h"

#ifndef __CUDACC__
#include "matrix_host.h"
#endif

namespace pcafast::cuda {

#ifdef __CUDACC__

// sums += left * right; volatile, so that it stays where the whole warp is
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], Float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}
// Of TF32: float32 whose low 13 bits do not count.
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// Four 8 x 8 matrices of 16 bits in shared memory: lane 8 i + r gives the address of row r of matrix i, aligned to 16
// bytes. Lane 4 g + t gets (g, 2t) and (g, 2t + 1) of each, or, transposed, (2t, g) and (2t + 1, g).
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  }
}

// kBytes, 8 or 16, to shared memory, both aligned to so many, or zeros unless `valid`; there after wait_for_copies.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(global), "r"(bytes), "n"(kBytes)
                 : "memory");
  }
}
// What this thread copied since the last time is one batch.
__device__ inline void end_batch_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All batches but the last kLeft are there, as far as this thread copied them.
template <int kLeft>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

// x = high + low, as far as TF32 holds `low`. `high` is x to ten bits after the point, halves away from zero; a NaN may
// leave it, but not `low`.
__device__ inline void split(float x, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
  low = __float_as_uint(x - __uint_as_float(high));
}

}  // namespace pcafast::cuda
