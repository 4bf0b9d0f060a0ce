#pragma once

#include "activation.h"

namespace fastlm::cpu {

void gelu_fwd(const ActivationForward& args, bool tanh, DType dtype, int threads);
void gelu_bwd(const ActivationBackward& args, bool tanh, DType dtype, int threads);

}  // namespace fastlm::cpu
