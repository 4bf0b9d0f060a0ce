#include "cpu/gelu.h"

#include "activation.h"

namespace fastlm::cpu {

FASTLM_BIND(gelu_fwd, "args", "tanh", "dtype", "threads");
FASTLM_BIND(gelu_bwd, "args", "tanh", "dtype", "threads");

}  // namespace fastlm::cpu
