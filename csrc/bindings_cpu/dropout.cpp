#include "cpu/dropout.h"

#include "ops.h"

FASTLM_FIELDS(fastlm::cpu::DropoutForward) {
  FIELD(x);
  FIELD(y);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(relu);
  FIELD(dropout);
}

FASTLM_FIELDS(fastlm::cpu::DropoutBackward) {
  FIELD(dy);
  FIELD(y);
  FIELD(dx);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(relu);
  FIELD(dropout);
}

namespace fastlm::cpu {

FASTLM_BIND(dropout_fwd, "args", "dtype", "threads");
FASTLM_BIND(dropout_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
