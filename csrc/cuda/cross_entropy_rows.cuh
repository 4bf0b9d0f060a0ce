// Shared by the kernels of cross_entropy: what they compute of a logit, and their modes.
#pragma once

#include <cmath>

namespace fastlm::cuda {

// What a kernel computes besides loss and gradient. A softcap and the figures of a row are rarely asked for; kAll tests
// for each option at run time, the other kernels have no code for them.
constexpr int kPlain = 0, kSmooths = 1, kAll = 2;

__device__ __forceinline__ float exp_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// tanh for losses in float32: nvcc's tanhf is two approximations of the chip, ex2 and rcp, whose errors add up in the
// lse of a row. Below 0.625, where 1 - e cancels, the polynomial of Cephes (tanhf.c), whose error is 1e-7 of the value.
__device__ __forceinline__ float tanh_float32(float x) {
  const float u = fabsf(x), e = expf(-2.0f * u), s = u * u;
  const float p = ((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s + 1.33314422036e-1f;
  const float small = u + u * s * (p * s - 3.33332819422e-1f);
  return copysignf(u < 0.625f ? small : __fdiv_rn(1.0f - e, 1.0f + e), x);
}

template <class T>
__device__ __forceinline__ float capped(float x, float cap) {
  if constexpr (sizeof(T) == 4) return cap * tanh_float32(x / cap);
  return cap * tanhf(x / cap);
}

// The derivative of `capped`, 1 - tanh², from e = exp(-2|x / cap|): 1 - t² would cancel.
__device__ __forceinline__ float cap_slope(float x, float cap) {
  const float e = exp_of(-2.0f * fabsf(x / cap)), sum = 1.0f + e;
  return 4.0f * e / (sum * sum);
}

}  // namespace fastlm::cuda
