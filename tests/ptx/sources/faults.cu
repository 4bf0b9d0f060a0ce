// Kernels with one planted fault each, marked `// fault`. Each has a correct twin, in the branch of CORRECT.
#include <cuda_pipeline.h>

#include <cassert>
#include <cstdint>

#ifndef CORRECT
#define CORRECT 0
#endif

extern "C" {

// Reverses a block through shared memory.
__global__ void race_between_warps(const int* x, int* y) {
  __shared__ int s[128];
  s[threadIdx.x] = x[threadIdx.x];
#if CORRECT
  __syncthreads();
#endif
  y[threadIdx.x] = s[127 - threadIdx.x];  // fault
}

__global__ void race_within_a_warp(const int* x, int* y) {
  __shared__ int s[32];
  s[threadIdx.x] = x[threadIdx.x];
#if CORRECT
  __syncwarp();
#endif
  y[threadIdx.x] = s[31 - threadIdx.x];  // fault
}

// The barrier between the last reads and the next writes is missing.
__global__ void race_of_a_write_after_reads(const int* x, int* y) {
  __shared__ int s[64];
  for (int k = 0; k < 2; ++k) {
    s[threadIdx.x] = x[64 * k + threadIdx.x];  // fault
    __syncthreads();
    y[64 * k + threadIdx.x] = s[63 - threadIdx.x];
#if CORRECT
    __syncthreads();
#endif
  }
}

__global__ void race_between_blocks(int* y) {
#if CORRECT
  atomicAdd(y, int(blockIdx.x));
#else
  if (threadIdx.x == 0) *y += int(blockIdx.x);  // fault
#endif
}

// Only half of the block is ordered by the named barrier.
__global__ void race_past_a_named_barrier(int* y) {
  __shared__ int s[128];
  s[threadIdx.x] = int(threadIdx.x);
#if CORRECT
  asm volatile("bar.sync 1, 128;" ::: "memory");
#else
  if (threadIdx.x < 64)
    asm volatile("bar.sync 1, 64;" ::: "memory");
  else
    asm volatile("bar.sync 2, 64;" ::: "memory");
#endif
  y[threadIdx.x] = s[threadIdx.x ^ 64];  // fault
}

__global__ void async_copy_read_too_early(const int4* x, int4* y) {
  __shared__ int4 s[64];
  for (int k = 0; k < 2; ++k) {
    __pipeline_memcpy_async(&s[32 * k + threadIdx.x], &x[32 * k + threadIdx.x], 16);
    __pipeline_commit();
  }
#if CORRECT
  __pipeline_wait_prior(0);
#else
  __pipeline_wait_prior(1);  // one group too many is left
#endif
  y[threadIdx.x] = s[threadIdx.x];
  y[32 + threadIdx.x] = s[32 + threadIdx.x];  // fault
}

__global__ void bounds_of_global_memory(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
#if CORRECT
  if (i < n)
#endif
    y[i] = 2 * x[i];  // fault
}

__global__ void bounds_of_a_shared_array(const int* x, int* y) {
  __shared__ int a[32];
  __shared__ int b[64];
  b[threadIdx.x] = b[threadIdx.x + 32] = x[threadIdx.x];
#if CORRECT
  a[threadIdx.x] = 1;
#else
  a[threadIdx.x + 1] = 1;  // fault
#endif
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x ^ 1] + b[threadIdx.x];
}

__global__ void bounds_of_dynamic_shared_memory(int* y) {
  extern __shared__ int s[];
  s[threadIdx.x] = 1;  // fault, if the launch gives too little
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void alignment(const float* x, float* y, int offset) {
  float4 v = *reinterpret_cast<const float4*>(x + offset + 4 * threadIdx.x);  // fault, unless offset is a multiple of 4
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void uninitialised_shared_memory(int* y, int n) {
  __shared__ int s[64];
  if (threadIdx.x < n) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // fault, if n < 64
}

__global__ void uninitialised_global_memory(const int* x, int* y) {
  y[threadIdx.x] = x[threadIdx.x];  // fault, if nobody wrote x
}

__global__ void uninitialised_local_memory(int* y, int n) {
  int a[32];
  for (int k = 0; k < n; ++k) a[k] = int(threadIdx.x) * k;
  y[threadIdx.x] = a[(y[threadIdx.x] + threadIdx.x) & 31];  // fault, if n < 32
}

__global__ void divergence_within_a_warp(int* y) {
  if (CORRECT || threadIdx.x % 2) {
    __syncthreads();  // fault
  } else {
    y[threadIdx.x] = 1;
    __syncthreads();
  }
  y[threadIdx.x] = 2;
}

__global__ void divergence_of_warps(int* y) {
  if (CORRECT || threadIdx.x < 32) __syncthreads();  // fault
  y[threadIdx.x] = 2;
}

__global__ void divergence_by_an_early_exit(int* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();  // fault, if n is not the whole block
  y[threadIdx.x] = 2;
}

__global__ void divergence_of_a_shuffle(int* y) {
  int v = int(threadIdx.x);
  if (CORRECT || threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffff, v, 1);  // fault: lanes 16 to 31 never come
  else
    v = __shfl_xor_sync(0xffffffff, v, 2);
  y[threadIdx.x] = v;
}

// Lanes 0 to 15 ask lanes that are not in the mask.
__global__ void unset_register_of_a_shuffle(int* y) {
  int v = int(threadIdx.x);
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffff, v, CORRECT ? 3 : 20);  // fault
}

__global__ void assertion(const int* x, int n) {
  assert(x[threadIdx.x] < n);  // fault, if it is not
}

__global__ void endless(volatile int* flag) {
  while (!CORRECT && *flag == 0) {  // fault
  }
}
}
