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

// Each block writes a value of its own into the element that it shares with its neighbour.
__global__ void race_between_blocks_that_write(int* y) {
  if (threadIdx.x < (CORRECT ? 31 : 32)) y[blockIdx.x * 31 + threadIdx.x] = int(blockIdx.x);  // fault
}

// A block reads what the one before it writes.
__global__ void race_between_a_block_that_reads_and_one_that_writes(const int* x, int* y) {
  int i = blockIdx.x * 32 + threadIdx.x;
  int left = CORRECT || i == 0 ? x[i] : y[i - 1];  // fault
  y[i] = left + 1;
}

// The last block adds up what the others stored, which nothing published.
__global__ void race_without_a_fence(int* partial, unsigned* arrived, int* out) {
  if (threadIdx.x) return;
  partial[blockIdx.x] = int(blockIdx.x);
#if CORRECT
  __threadfence();
#endif
  if (atomicAdd(arrived, 1u) != gridDim.x - 1) return;
#if CORRECT
  __threadfence();
#endif
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];  // fault
  *out = sum;
}

// The same, with fences that only the block's own threads see.
__global__ void race_past_a_fence_of_the_block(int* partial, unsigned* arrived, int* out) {
  if (threadIdx.x) return;
  partial[blockIdx.x] = int(blockIdx.x);
  CORRECT ? __threadfence() : __threadfence_block();
  if (atomicAdd(arrived, 1u) != gridDim.x - 1) return;
  CORRECT ? __threadfence() : __threadfence_block();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];  // fault
  *out = sum;
}

// Atomic for the block's own threads, and for no others.
__global__ void race_of_atomics_of_the_block(int* y) {
#if CORRECT
  atomicAdd(y, 1);
#else
  atomicAdd_block(y, 1);  // fault
#endif
}

// The copy may arrive while the other warp still reads.
__global__ void race_of_an_async_copy(const int* x, int* y) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
#if CORRECT
  __syncthreads();
#endif
  __pipeline_memcpy_async(&s[threadIdx.x], &x[64 + threadIdx.x], 4);  // fault
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[64 + threadIdx.x] = s[threadIdx.x];
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

// Local memory: the index is known when the kernel runs.
__global__ void bounds_of_a_local_array(int* y, int n) {
  int a[8];
  for (int k = 0; k < 8; ++k) a[k] = y[k];
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x % n];  // fault, if n > 8
}

__global__ void bounds_of_an_async_copy(const int4* x, int4* y, int n) {
  __shared__ int4 s[32];
  if (!CORRECT || threadIdx.x < n)
    __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);  // fault, if n < 32
  else
    s[threadIdx.x] = make_int4(0, 0, 0, 0);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void alignment(const float* x, float* y, int offset) {
  float4 v = *reinterpret_cast<const float4*>(x + offset + 4 * threadIdx.x);  // fault, unless offset is a multiple of 4
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void alignment_of_shared_memory(float* y, int offset) {
  __shared__ __align__(16) float s[68];
  s[threadIdx.x] = s[threadIdx.x + 34] = 1;
  __syncthreads();
  float4 v = *reinterpret_cast<const float4*>(&s[offset + threadIdx.x % 16 * 4]);  // fault, unless offset is 0 or 4
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void alignment_of_an_atomic(char* y, int offset) {
  atomicAdd(reinterpret_cast<int*>(y + offset), 1);  // fault, unless offset is a multiple of 4
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

__global__ void unset_register(int* y) {
  int v = int(threadIdx.x);
  if (CORRECT)
    v += 1;
  else
    asm volatile("{ .reg .b32 unset; add.s32 %0, %0, unset; }" : "+r"(v));
  y[threadIdx.x] = v;  // fault
}

// Lanes 0 to 15 ask lanes that are not in the mask.
__global__ void unset_register_of_a_shuffle(int* y) {
  int v = int(threadIdx.x);
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffff, v, CORRECT ? 3 : 20);  // fault
}

__global__ void assertion(const int* x, int n) {
  assert(x[threadIdx.x] < n);  // fault, if it is not
}

__global__ void trapped(const int* x, int n) {
  if (x[threadIdx.x] >= n) __trap();  // fault, if it is
}

__global__ void endless(volatile int* flag) {
  while (!CORRECT && *flag == 0) {  // fault
  }
}
}
