#pragma once

#include "activation.h"

namespace fastlm::cpu {

constexpr float kSqrtHalf = 0.707106781f, kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f, kCubic = 0.044715f;

struct GeluErf {
  FASTLM_INLINE Activation at(float h) {
    const float cdf = 0.5f + 0.5f * fast_erf(h * kSqrtHalf);
    return {cdf, cdf + h * kInvSqrt2Pi * fast_exp(-0.5f * h * h)};
  }
};

// (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and (1 - tanh(u)²)/4 = e/(1 + e)² with e = exp(-2|u|): neither cancels, where
// 1 - tanh(u)² would, times an h that is large there.
struct GeluTanh {
  FASTLM_INLINE Activation at(float h) {
    const float u = kSqrt2OverPi * (h + kCubic * h * h * h);
    const float e = fast_exp(-2.0f * std::fabs(u)), r = 1.0f / (1.0f + e);
    const float cdf = u < 0.0f ? e * r : r;
    return {cdf, cdf + h * 2.0f * kSqrt2OverPi * (e * r * r) * (1.0f + 3.0f * kCubic * h * h)};
  }
};

void gelu_fwd(const ActivationForward& args, bool tanh, DType dtype, int threads);
void gelu_bwd(const ActivationBackward& args, bool tanh, DType dtype, int threads);

}  // namespace fastlm::cpu
