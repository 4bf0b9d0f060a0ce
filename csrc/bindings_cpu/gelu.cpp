#include "cpu/gelu.h"

#include "ops.h"

FASTLM_FIELDS(fastlm::cpu::GeluForward) {
  FIELD(x);
  FIELD(bias);
  FIELD(gate);
  FIELD(y);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_gate);
  FIELD(tanh);
}

FASTLM_FIELDS(fastlm::cpu::GeluBackward) {
  FIELD(dy);
  FIELD(x);
  FIELD(bias);
  FIELD(gate);
  FIELD(dx);
  FIELD(dgate);
  FIELD(dbias);
  FIELD(partial);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(stride_x);
  FIELD(stride_gate);
  FIELD(tanh);
}

namespace fastlm::cpu {

FASTLM_BIND(gelu_fwd, "args", "dtype", "threads");
FASTLM_BIND(gelu_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
