// Shared by kernels over rows: 128-bit loads and stores as float, sums over the threads of a row, dropout bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ops.h"
#include "philox.h"

namespace fastlm::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Elements of a 16-byte access.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

// N values as float, in accesses of at most 16 bytes; if not `wide`, one access per value. A thread holds the same
// values either way, so the order of a sum is the same.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N], bool wide = true) {
  if (!wide) {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = to_float(from[k]);
    return;
  }
  constexpr int kStep = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int k = 0; k < N; k += kStep) {
    const auto pack = *reinterpret_cast<const Pack<T, kStep>*>(from + k);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[k + j] = to_float(pack.item[j]);
  }
}

// A pack in as few registers as it needs: a Pack of 16-bit items takes one for each of them between two branches.
template <class T, int N>
using Raw = std::conditional_t<sizeof(T) * N == 16, uint4, Pack<T, N>>;

template <class T, int N>
__device__ __forceinline__ void unpack(const Raw<T, N>& raw, float (&to)[N]) {
  const auto pack = reinterpret_cast<const Pack<T, N>&>(raw);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = to_float(pack.item[j]);
}

// The N packs of a row that a thread of THREADS holds, as far as there are columns. The choice by `wide` is made once:
// in the loop, each load would wait for the last.
template <int THREADS, int VEC, int N, class T>
__device__ __forceinline__ void load_packs(const T* row, int lane, int64_t cols, Raw<T, VEC> (&to)[N], bool wide) {
  auto each = [&](auto load_pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t col = int64_t(i * THREADS + lane) * VEC;
      if (col < cols) load_pack(to[i], row + col);
    }
  };
  if (wide) {
    each([](Raw<T, VEC>& raw, const T* from) { raw = *reinterpret_cast<const Raw<T, VEC>*>(from); });
  } else {
    each([](Raw<T, VEC>& raw, const T* from) {
      Pack<T, VEC> pack;
#pragma unroll
      for (int j = 0; j < VEC; ++j) pack.item[j] = from[j];
      raw = reinterpret_cast<const Raw<T, VEC>&>(pack);
    });
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  constexpr int kStep = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int k = 0; k < N; k += kStep) {
    Pack<T, kStep> pack;
#pragma unroll
    for (int j = 0; j < kStep; ++j) pack.item[j] = from_float<T>(from[k + j]);
    *reinterpret_cast<Pack<T, kStep>*>(to + k) = pack;
  }
}

// A parameter (cols,) that is float32, or has the dtype T of the activations.
template <int N, class T>
__device__ __forceinline__ void load_parameter(const void* from, bool is_float, int64_t at, float (&to)[N], bool wide) {
  if (is_float) {
    load<N>(static_cast<const float*>(from) + at, to, wide);
  } else {
    load<N>(static_cast<const T*>(from) + at, to, wide);
  }
}

// Whether rows from p on, `stride` elements apart, can be read 16 bytes at a time. True for a null pointer.
inline bool is_wide(const void* p, int64_t stride, size_t item) {
  return !p || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * int64_t(item) % 16 == 0);
}

// The sum over the THREADS threads that share a row, returned to all of them, in a fixed order. If THREADS exceeds a
// warp, it is the whole block, and each call needs another `buffer` (32 floats of shared memory) or a barrier before
// it.
template <int THREADS>
__device__ __forceinline__ float row_sum(float x, float* buffer) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  if constexpr (THREADS > 32) {
    constexpr int kWarps = THREADS / 32;
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < kWarps ? buffer[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int offset = kWarps / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    x = __shfl_sync(0xFFFFFFFFu, x, 0);
  }
  return x;
}

// The maximum over the threads of a block, returned to all of them; `buffer` as for row_sum.
template <int THREADS>
__device__ __forceinline__ float row_max(float x, float* buffer) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  if constexpr (THREADS > 32) {
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = x;
    __syncthreads();
    x = buffer[threadIdx.x % (THREADS / 32)];
#pragma unroll
    for (int offset = THREADS / 64; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  }
  return x;
}

// row_sum of K values, with one barrier for all; K buffers.
template <int THREADS, int K>
__device__ __forceinline__ void row_sums(float (&x)[K], float (*buffer)[32]) {
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = row_sum<32>(x[k], nullptr);
  if constexpr (THREADS > 32) {
    constexpr int kWarps = THREADS / 32;
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k][threadIdx.x / 32] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = row_sum<32>(lane < kWarps ? buffer[k][lane] : 0.0f, nullptr);
  }
}

// Dropout of N columns from `col` on. N and col are multiples of 4, or N is 1. One Philox call serves four columns.
template <int N>
__device__ __forceinline__ void drop(float (&x)[N], int64_t row, int64_t col, const Dropout& dropout, Key key) {
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const Words w = philox(uint32_t((col + k) / 4), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0u, key);
    const uint32_t words[4] = {w.r0, w.r1, w.r2, w.r3};
    if constexpr (N == 1) {
      const uint32_t word = col % 4 == 0 ? w.r0 : col % 4 == 1 ? w.r1 : col % 4 == 2 ? w.r2 : w.r3;
      x[0] = word < dropout.threshold ? 0.0f : x[0] * dropout.scale;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[k + j] = words[j] < dropout.threshold ? 0.0f : x[k + j] * dropout.scale;
    }
  }
}

}  // namespace fastlm::cuda
