#pragma once

#include "activation.h"

namespace fastlm::cpu {

// Without a bias: `bias` and `dbias` are null.
void silu_fwd(const ActivationForward& args, DType dtype, int threads);
void silu_bwd(const ActivationBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
