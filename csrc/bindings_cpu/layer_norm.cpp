#include "cpu/layer_norm.h"

#include "ops.h"

FASTLM_FIELDS(fastlm::cpu::LayerNormForward) {
  FIELD(x);
  FIELD(residual);
  FIELD(weight);
  FIELD(bias);
  FIELD(h);
  FIELD(y);
  FIELD(mean);
  FIELD(rstd);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_residual);
  FIELD(eps);
  FIELD(rms);
  FIELD(dropout);
}

FASTLM_FIELDS(fastlm::cpu::LayerNormBackward) {
  FIELD(dy);
  FIELD(dh);
  FIELD(h);
  FIELD(weight);
  FIELD(mean);
  FIELD(rstd);
  FIELD(dresidual);
  FIELD(dx);
  FIELD(dweight);
  FIELD(dbias);
  FIELD(sum_dx);
  FIELD(partial);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(stride_dh);
  FIELD(stride_h);
  FIELD(rms);
  FIELD(dropout);
}

namespace fastlm::cpu {

FASTLM_BIND(layer_norm_fwd, "args", "dtype", "threads");
FASTLM_BIND(layer_norm_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
