// Adds the partial sums of a kernel's blocks in order: the same bits in every run, without atomics.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace fastlm::cuda {

constexpr int kPartialCols = 32, kPartialThreads = 32;

// out (cols,), float32 or T = the sum of partial (count, cols). A block has 32 columns, with 32 threads each.
template <class T>
__global__ void __launch_bounds__(kPartialThreads* kPartialCols)
    sum_partials_kernel(const float* partial, int64_t count, int64_t cols, void* out, bool is_float) {
  __shared__ float sums[kPartialThreads][kPartialCols];
  const int64_t col = int64_t(blockIdx.x) * kPartialCols + threadIdx.x;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 8
    for (int64_t p = threadIdx.y; p < count; p += kPartialThreads) sum += partial[p * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
  for (int k = 1; k < kPartialThreads; ++k) sum += sums[k][threadIdx.x];
  if (is_float) {
    static_cast<float*>(out)[col] = sum;
  } else {
    static_cast<T*>(out)[col] = from_float<T>(sum);
  }
}

template <class T>
void sum_partials(const float* partial, int64_t count, int64_t cols, void* out, bool is_float, Place place) {
  launch(sum_partials_kernel<T>, grid_size((cols + kPartialCols - 1) / kPartialCols),
         dim3(kPartialCols, kPartialThreads), 0, place.stream, partial, count, cols, out, is_float);
}

}  // namespace fastlm::cuda
