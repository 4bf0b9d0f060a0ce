#include "cpu/cross_entropy.h"

#include "ops.h"

FASTLM_FIELDS(fastlm::cpu::CrossEntropy) {
  FIELD(logits);
  FIELD(target);
  FIELD(weight);
  FIELD(dloss);
  FIELD(loss);
  FIELD(z);
  FIELD(accuracy);
  FIELD(dlogits);
  FIELD(rows);
  FIELD(vocabulary);
  FIELD(stride_x);
  FIELD(stride_dx);
  FIELD(ignore_index);
  FIELD(label_smoothing);
  FIELD(z_loss);
  FIELD(softcap);
  FIELD(denominator);
}

FASTLM_FIELDS(fastlm::cpu::CrossEntropyBackward) {
  FIELD(dlogits);
  FIELD(dloss);
  FIELD(out);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_y);
  FIELD(per_row);
}

namespace fastlm::cpu {

// (the first row whose target is outside, or -1; the sum of the targets' weights)
inline PyObject* to_python(const TargetCount& count) {
  return python::to_python(std::pair(count.outside, count.weight));
}

FASTLM_BIND(cross_entropy_count, "target", "weight", "rows", "vocabulary", "ignore_index");
FASTLM_BIND(cross_entropy_fwd, "args", "dtype", "threads");
FASTLM_BIND(cross_entropy_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
