// changed_copy: what fastlm/ops/_low_weights.py asks before it takes the copies that an optimizer wrote.
//
// A sample is two cache misses, and no sample waits for another: the loads of a weight overlap. One call looks at all
// weights; gathered by torch, each weight and each copy takes three calls from Python.
#include "low_copies.h"

#include <algorithm>

namespace fastlm::cpu {

int64_t changed_copy(const std::vector<LowCopy>& copies, int64_t samples) {
  for (size_t i = 0; i < copies.size(); ++i) {
    const auto& [w, low, n] = copies[i];
    const int64_t count = std::min(n, samples), step = std::max<int64_t>(1, n / samples);
    bool same = true;
    for (int64_t s = 0; s < count; ++s) {
      bfloat16 rounded;
      store(&rounded, w[s * step]);
      same &= rounded.bits == low[s * step].bits;
    }
    if (!same) return int64_t(i);
  }
  return -1;
}

}  // namespace fastlm::cpu
