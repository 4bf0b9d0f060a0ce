// The types that the entry points of the CPU kernels share. The arguments are plain pointers and sizes. The elements of
// a row are contiguous; a row stride, if there is one, counts elements. csrc/bindings_cpu/ binds the functions to
// Python; the maths is in fastlm/ops/<op>.py.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

enum class DType : int { f32 = 0, bf16 = 1 };

// Dropout of one call. A word below `threshold` = floor(p·2^32) drops; scale = 1/(1-p). threshold 0: no dropout.
struct Dropout {
  uint64_t threshold;
  float scale;
  const int64_t* rng;  // (seed, step)
  uint32_t site;
};

}  // namespace fastlm::cpu
