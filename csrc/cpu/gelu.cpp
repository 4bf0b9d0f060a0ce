// gelu: y = gelu(x + bias) * gate, forward and backward. The maths: fastlm/ops/gelu.py.
#include "gelu.h"

namespace fastlm::cpu {
void gelu_fwd(const ActivationForward& args, bool tanh, DType dtype, int threads) {
  if (tanh) {
    dtype == DType::f32 ? activation_fwd<float, GeluTanh>(args, threads)
                        : activation_fwd<bfloat16, GeluTanh>(args, threads);
  } else {
    dtype == DType::f32 ? activation_fwd<float, GeluErf>(args, threads)
                        : activation_fwd<bfloat16, GeluErf>(args, threads);
  }
}

void gelu_bwd(const ActivationBackward& args, bool tanh, DType dtype, int threads) {
  if (tanh) {
    dtype == DType::f32 ? activation_bwd<float, GeluTanh>(args, threads)
                        : activation_bwd<bfloat16, GeluTanh>(args, threads);
  } else {
    dtype == DType::f32 ? activation_bwd<float, GeluErf>(args, threads)
                        : activation_bwd<bfloat16, GeluErf>(args, threads);
  }
}

}  // namespace fastlm::cpu
