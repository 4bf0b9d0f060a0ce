#include "cpu/silu.h"

#include "activation.h"

namespace fastlm::cpu {

FASTLM_BIND(silu_fwd, "args", "dtype", "threads");
FASTLM_BIND(silu_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
