#pragma once

#include "adamw.h"

namespace fastlm::cpu {

// As adamw, with LAMB's update. The maths: fastlm/train/lamb.py.
void lamb(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
          int threads);

}  // namespace fastlm::cpu
