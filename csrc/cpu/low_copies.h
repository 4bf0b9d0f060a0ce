#pragma once

#include <vector>

#include "ops.h"
#include "simd.h"

namespace fastlm::cpu {

// A weight and its copy in bfloat16: n elements each, in one order.
struct LowCopy {
  const float* w;
  const bfloat16* low;
  int64_t n;
};

// The index of the first copy that is not its weight rounded, as `samples` elements of each show that lie evenly in
// memory; -1: there is none.
int64_t changed_copy(const std::vector<LowCopy>& copies, int64_t samples);

}  // namespace fastlm::cpu
