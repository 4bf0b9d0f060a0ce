// gelu: y = gelu(x + bias) * gate, forward and backward. The maths: fastlm/ops/gelu.py.
#include "gelu.h"

namespace fastlm::cpu {
namespace {

constexpr float kSqrtHalf = 0.707106781f, kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f, kCubic = 0.044715f;

struct Erf {
  FASTLM_INLINE Activation at(float h) {
    const float cdf = 0.5f + 0.5f * fast_erf(h * kSqrtHalf);
    return {cdf, cdf + h * kInvSqrt2Pi * fast_exp(-0.5f * h * h)};
  }
};

// (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and (1 - tanh(u)²)/4 = e/(1 + e)² with e = exp(-2|u|): neither cancels, where
// 1 - tanh(u)² would, times an h that is large there.
struct Tanh {
  FASTLM_INLINE Activation at(float h) {
    const float u = kSqrt2OverPi * (h + kCubic * h * h * h);
    const float e = fast_exp(-2.0f * std::fabs(u)), r = 1.0f / (1.0f + e);
    const float cdf = u < 0.0f ? e * r : r;
    return {cdf, cdf + h * 2.0f * kSqrt2OverPi * (e * r * r) * (1.0f + 3.0f * kCubic * h * h)};
  }
};

}  // namespace

void gelu_fwd(const ActivationForward& args, bool tanh, DType dtype, int threads) {
  if (tanh) {
    dtype == DType::f32 ? activation_fwd<float, Tanh>(args, threads) : activation_fwd<bfloat16, Tanh>(args, threads);
  } else {
    dtype == DType::f32 ? activation_fwd<float, Erf>(args, threads) : activation_fwd<bfloat16, Erf>(args, threads);
  }
}

void gelu_bwd(const ActivationBackward& args, bool tanh, DType dtype, int threads) {
  if (tanh) {
    dtype == DType::f32 ? activation_bwd<float, Tanh>(args, threads) : activation_bwd<bfloat16, Tanh>(args, threads);
  } else {
    dtype == DType::f32 ? activation_bwd<float, Erf>(args, threads) : activation_bwd<bfloat16, Erf>(args, threads);
  }
}

}  // namespace fastlm::cpu
