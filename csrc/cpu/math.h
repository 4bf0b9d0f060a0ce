// exp, expm1, erf, tanh of float without a branch or a table, so that a loop over them vectorises in every clone.
// Maximum error, in units in the last place of the exact result (tests/test_math.py measures it):
//
//   fast_exp          1.2    x < -86.98 gives 0, x > 88.7228 infinity
//   fast_expm1_neg    1.0    for -86.98 <= x <= 0
//   fast_erf          3.1
//   fast_tanh         2.5
//
// A NaN stays a NaN; an infinity gives the limit. The polynomials are minimax fits made for this file (least squares
// with Lawson's weights, in float64, rounded to float).
#pragma once

#include "simd.h"

namespace fastlm::cpu {

struct Reduced {
  float r;      // x = n ln2 + r, |r| <= ln2 / 2
  float scale;  // 2^(n + bias - 127); 0 where n + bias = 0
};

// bias + n lies in [0, 255).
template <int bias>
FASTLM_INLINE Reduced reduce_exp(float x) {
  constexpr float round = 12582912.0f + bias;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  const float t = x * 1.44269504f + round;
  const float n = t - round;
  // ln2 in two parts; the first has 9 bits, so that n times it is exact without an FMA too.
  return {x - n * 0.693359375f + n * 2.12194440e-4f, bits_to_float(float_to_bits(t) << 23)};
}

FASTLM_INLINE float fast_exp(float x) {
  x = x < -87.3f ? -87.3f : x;  // here n = -126 and the scale is 0
  x = x > 89.0f ? 89.0f : x;    // here the product overflows
  const Reduced e = reduce_exp<126>(x);
  const float r = e.r;
  // 2 exp(r), times 2^(n-1), since float cannot represent 2^128.
  float p = 1.3814539e-3f * 2;
  p = p * r + 8.3687454e-3f * 2;
  p = p * r + 4.1668389e-2f * 2;
  p = p * r + 1.6666521e-1f * 2;
  p = p * r + 4.9999994e-1f * 2;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return p * e.scale;
}

// exp(x) - 1 with a small relative error, for -86.98 <= x <= 0.
FASTLM_INLINE float fast_expm1_neg(float x) {
  const Reduced e = reduce_exp<127>(x);
  const float r = e.r;
  float p = 1.3814539e-3f;
  p = p * r + 8.3687454e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * (r * r) + r;
  return e.scale * p + (e.scale - 1.0f);
}

// erf(x) = sign(x) (1 - exp(-g(|x|))), g(t) = -log(erfc(t)) = t q(t); 1 in float from t = 4 on.
FASTLM_INLINE float fast_erf(float x) {
  const float a = std::fabs(x), t = a > 4.0f ? 4.0f : a;
  float q = -9.2562659e-6f;
  q = q * t + 1.1764128e-4f;
  q = q * t - 6.3283689e-4f;
  q = q * t + 1.6670275e-3f;
  q = q * t - 1.6039611e-4f;
  q = q * t - 1.9153064e-2f;
  q = q * t + 1.0277783e-1f;
  q = q * t + 6.3661939e-1f;
  q = q * t + 1.1283792f;
  return std::copysign(fast_expm1_neg(-t * q), x);
}

// tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2|x|); 1 in float from 10 on.
FASTLM_INLINE float fast_tanh(float x) {
  const float a = std::fabs(x), t = a > 10.0f ? 10.0f : a;
  const float m = fast_expm1_neg(-2.0f * t);
  return std::copysign(m / (m + 2.0f), x);
}

// Over arrays, for the test that measures the errors above.
void exp_array(const float* x, float* y, int64_t n);
void expm1_neg_array(const float* x, float* y, int64_t n);
void erf_array(const float* x, float* y, int64_t n);
void tanh_array(const float* x, float* y, int64_t n);

}  // namespace fastlm::cpu
