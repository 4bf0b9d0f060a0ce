#include "cuda/cross_entropy.h"

#include "cuda/sm90/cross_entropy.h"
#include "ops.h"

FASTLM_FIELDS(fastlm::cuda::CrossEntropyForward) {
  FIELD(x);
  FIELD(target);
  FIELD(weight);
  FIELD(weight_sum);
  FIELD(parts);
  FIELD(dloss);
  FIELD(loss);
  FIELD(z);
  FIELD(accuracy);
  FIELD(dx);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_dx);
  FIELD(ignore_index);
  FIELD(label_smoothing);
  FIELD(z_loss);
  FIELD(softcap);
}

FASTLM_FIELDS(fastlm::cuda::TargetCount) {
  FIELD(target);
  FIELD(weight);
  FIELD(parts);
  FIELD(rows);
  FIELD(cols);
  FIELD(ignore_index);
}

FASTLM_FIELDS(fastlm::cuda::LossSum) {
  FIELD(loss);
  FIELD(parts);
  FIELD(scratch);
  FIELD(out);
  FIELD(rows);
}

FASTLM_FIELDS(fastlm::cuda::CrossEntropyBackward) {
  FIELD(x);
  FIELD(dloss);
  FIELD(y);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_y);
  FIELD(per_row);
}

namespace fastlm::cuda {

FASTLM_CONSTANT(LOSS_PARTS, kLossParts);
FASTLM_CONSTANT(CLUSTER_ROW_BYTES, kClusterRowBytes);
FASTLM_BIND(cross_entropy_fwd, "args", "dtype", "place");
FASTLM_BIND(cross_entropy_fwd_sm90, "args", "dtype", "place");
FASTLM_BIND(cross_entropy_count, "args", "place");
FASTLM_BIND(cross_entropy_sum, "args", "place");
FASTLM_BIND(cross_entropy_bwd, "args", "dtype", "place");

}  // namespace fastlm::cuda
