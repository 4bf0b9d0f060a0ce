#include "partials.h"

#include "simd.h"

namespace fastlm::cpu {

FASTLM_CLONES void sum_partials(const float* partial, int64_t blocks, int64_t cols, float* out) {
  for (int64_t j = 0; j < cols; ++j) out[j] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) out[j] += partial[b * cols + j];
  }
}

}  // namespace fastlm::cpu
