#include "cpu/transpose.h"

#include "fields.h"

FASTLM_FIELDS(fastlm::cpu::Transpose) {
  FIELD(x);
  FIELD(y);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
}

namespace fastlm::cpu {

FASTLM_BIND(transpose16, "args", "threads");

}  // namespace fastlm::cpu
