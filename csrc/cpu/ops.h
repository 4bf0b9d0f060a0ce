// The CPU kernels' entry points. Plain pointers and sizes; contiguous rows with a stride in elements where one is
// named. Dtype codes, and the functions, are bound in csrc/bindings_cpu; the maths stands in fastlm/ops/<op>.py.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

enum class DType : int { f32 = 0, bf16 = 1 };

// Dropout of one call: dropped where a word is below `threshold` = floor(p·2^32); scale = 1/(1-p). threshold 0: none.
struct Dropout {
  uint64_t threshold;
  float scale;
  const int64_t* rng;  // (seed, step)
  uint32_t site;
};

}  // namespace fastlm::cpu
