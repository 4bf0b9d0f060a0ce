// The statistics of a row, for the ops with a norm in them.
#pragma once

#include "simd.h"

namespace fastlm::cpu {

struct Statistics {
  float mean, rstd;
};

// The statistics of h (cols,), in two passes: the squares are of h - mean, so nothing cancels. rms: the mean is 0.
FASTLM_INLINE Statistics statistics(const float* h, int64_t cols, float eps, bool rms) {
  float mean = 0.0f;
  if (!rms) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) sum += h[j];
    mean = sum / float(cols);
  }
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < cols; ++j) {
    const float d = h[j] - mean;
    square += d * d;
  }
  return {mean, 1.0f / std::sqrt(square / float(cols) + eps)};
}

}  // namespace fastlm::cpu
