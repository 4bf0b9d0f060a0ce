// What layer_norm's kernels share: a row's statistics, and backward's copies of its next rows.
#pragma once

#include <cuda_pipeline.h>

#include "layer_norm.h"
#include "rows.cuh"

namespace fastlm::cuda {

// ---- statistics

// x̂ = (h - mean) rstd - offset. `mean` is rounded; offset is the mean of (h - mean) rstd, what the rounding lost. Far
// from 0 it matters: at a mean of 100, half a unit in the last place is 4e-6. rms: mean and offset are 0.
struct Statistics {
  float mean, offset, rstd;

  __device__ __forceinline__ float normalize(float h) const { return (h - mean) * rstd - offset; }
};

// Adds d = h - mean to the row's sums of d and d².
__device__ __forceinline__ void add_centred(float d, float (&sums)[2]) {
  sums[0] += d;
  sums[1] += d * d;
}

__device__ __forceinline__ Statistics make_statistics(const LayerNormForward& a, float mean, const float (&sums)[2]) {
  const float lost = a.mean ? sums[0] / float(a.cols) : 0.0f;
  const float rstd = 1.0f / sqrtf(fmaxf(sums[1] / float(a.cols) - lost * lost, 0.0f) + a.eps);
  return {mean, lost * rstd, rstd};
}

__device__ __forceinline__ void save(const LayerNormForward& a, int64_t row, const Statistics& s) {
  if (a.mean) a.mean[row] = s.mean, a.mean[a.rows + row] = s.offset;
  a.rstd[row] = s.rstd;
}

__device__ __forceinline__ Statistics saved(const LayerNormBackward& a, int64_t row) {
  if (!a.mean) return {0.0f, 0.0f, a.rstd[row]};
  return {a.mean[row], a.mean[a.rows + row], a.rstd[row]};
}

// ---- the next rows of backward

// The rows that a thread of backward will take next: its packs of dy, h and dh, and the rows' statistics. It copies
// them kStages rows ahead and reads back only what it has copied itself, so no barrier is needed.
template <class T, int N, int BLOCK>
struct Ahead {
  static constexpr int kStages = N * BLOCK <= 512 ? 3 : 2;
  T* packs;        // (kStages, tensors, N, BLOCK), 16 bytes each
  float* figures;  // (kStages, 3, BLOCK): rstd, mean, offset
  int tensors;

  static size_t bytes(bool has_dh) { return size_t(kStages) * BLOCK * ((has_dh ? 3 : 2) * N * 16 + 3 * sizeof(float)); }

  __device__ __forceinline__ Ahead(void* memory, bool has_dh) : tensors(has_dh ? 3 : 2) {
    packs = static_cast<T*>(memory) + threadIdx.x * kVector<T>;
    figures = static_cast<float*>(memory) + kStages * tensors * N * BLOCK * 4 + threadIdx.x;
  }
  __device__ __forceinline__ T* pack(int stage, int tensor, int i) const {
    return packs + ((stage * tensors + tensor) * N + i) * BLOCK * kVector<T>;
  }
  __device__ __forceinline__ float* figure(int stage, int k) const { return figures + (stage * 3 + k) * BLOCK; }

  template <int THREADS>
  __device__ __forceinline__ void fetch(const LayerNormBackward& a, int64_t row, int lane, int stage) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t col = int64_t(i * THREADS + lane) * kVector<T>;
      if (col >= a.cols) continue;
      __pipeline_memcpy_async(pack(stage, 0, i), static_cast<const T*>(a.dy) + row * a.stride_dy + col, 16);
      __pipeline_memcpy_async(pack(stage, 1, i), static_cast<const T*>(a.h) + row * a.stride_h + col, 16);
      if (tensors > 2)
        __pipeline_memcpy_async(pack(stage, 2, i), static_cast<const T*>(a.dh) + row * a.stride_dh + col, 16);
    }
    __pipeline_memcpy_async(figure(stage, 0), a.rstd + row, sizeof(float));
    if (a.mean) {
      __pipeline_memcpy_async(figure(stage, 1), a.mean + row, sizeof(float));
      __pipeline_memcpy_async(figure(stage, 2), a.mean + a.rows + row, sizeof(float));
    }
  }
  __device__ __forceinline__ Statistics statistics(bool has_mean, int stage) const {
    if (!has_mean) return {0.0f, 0.0f, *figure(stage, 0)};
    return {*figure(stage, 1), *figure(stage, 2), *figure(stage, 0)};
  }
};

}  // namespace fastlm::cuda
