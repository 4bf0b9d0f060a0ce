#include "cuda/layer_norm.h"

#include "ops.h"

FASTLM_FIELDS(fastlm::cuda::LayerNormForward) {
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
  FIELD(weight_is_float);
  FIELD(bias_is_float);
  FIELD(dropout);
}

FASTLM_FIELDS(fastlm::cuda::LayerNormBackward) {
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
  FIELD(partial);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(stride_dh);
  FIELD(stride_h);
  FIELD(weight_is_float);
  FIELD(dropout);
}

namespace fastlm::cuda {

FASTLM_BIND(layer_norm_fwd, "args", "dtype", "place");
FASTLM_BIND(layer_norm_bwd, "args", "dtype", "place");

}  // namespace fastlm::cuda
