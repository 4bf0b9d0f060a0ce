// The functions of math.h over arrays, for the test that measures their error.
#include "math.h"

namespace fastlm::cpu {

FASTLM_CLONES void exp_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = fast_exp(x[i]);
}

FASTLM_CLONES void expm1_neg_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = fast_expm1_neg(x[i]);
}

FASTLM_CLONES void erf_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = fast_erf(x[i]);
}

FASTLM_CLONES void tanh_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = fast_tanh(x[i]);
}

}  // namespace fastlm::cpu
