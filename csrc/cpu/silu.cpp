// silu: y = silu(x) * gate, forward and backward. The maths: fastlm/ops/silu.py.
#include "silu.h"

namespace fastlm::cpu {
namespace {

// σ(h) = 1/(1 + exp(-h)), and σ(h) (1 - σ(h)) = e/(1 + e)² with e = exp(-|h|), where 1 - σ(h) would cancel for a large
// h.
struct Logistic {
  FASTLM_INLINE Activation at(float h) {
    const float e = fast_exp(-std::fabs(h)), r = 1.0f / (1.0f + e);
    const float cdf = h < 0.0f ? e * r : r;
    return {cdf, cdf + h * (e * r * r)};
  }
};

}  // namespace

void silu_fwd(const ActivationForward& args, DType dtype, int threads) {
  dtype == DType::f32 ? activation_fwd<float, Logistic>(args, threads)
                      : activation_fwd<bfloat16, Logistic>(args, threads);
}

void silu_bwd(const ActivationBackward& args, DType dtype, int threads) {
  dtype == DType::f32 ? activation_bwd<float, Logistic>(args, threads)
                      : activation_bwd<bfloat16, Logistic>(args, threads);
}

}  // namespace fastlm::cpu
