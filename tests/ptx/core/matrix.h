// What mma.sync and wgmma share: elements of a word, and how a chip adds products.
#pragma once

#include <algorithm>

#include "float.h"

namespace ptx {

struct Tf32 {};

// Element k of a 32-bit word.
template <class T>
inline float element(u32 word, int k) {
  if constexpr (std::is_same_v<T, BF16>)
    return std::bit_cast<float>(k ? word & 0xffff0000 : word << 16);
  else if constexpr (std::is_same_v<T, F16>)
    return to_float<F16>(u16(word >> (16 * k)));
  else
    return std::bit_cast<float>(word & ~0x1fffu);  // the hardware ignores the low bits
}
// The next of x towards 0 if its rounding went away from 0.
inline float towards_zero(double x) {
  const float y = float(x);
  return std::isfinite(y) && std::fabs(y) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

// As std::ilogb; of subnormals what the format's least exponent is.
inline int exponent(float x) { return std::max(int(std::bit_cast<u32>(x) >> 23 & 255), 1) - 127; }

constexpr int AMPERE = 24, HOPPER = 25;  // bits kept below the largest

// c plus the products of n pairs, at most sixteen, as a tensor core adds them: all exact products and c are aligned to
// the largest exponent, cut after BITS bits below it, added, and cut to fp32. An exponent is the sum of those of the
// factors. sm_80 takes eight pairs at a time; sm_90 keeps one more bit and takes sixteen. Fasi, Higham, Mikaitis,
// Pranesh 2021 (doi:10.7717/peerj-cs.330); Xie et al. 2025 (arXiv:2511.10909).
template <int BITS>
float truncated(const float* a, const float* b, int stride, int n, float c) {
  double terms[17] = {c}, plain = c;
  int top = c == 0 ? INT32_MIN : exponent(c);
  for (int k = 0; k < n; ++k) {
    const float x = a[k], y = b[k * stride];
    plain += terms[k + 1] = double(x) * y;
    if (terms[k + 1] != 0) top = std::max(top, exponent(x) + exponent(y));
  }
  if (!std::isfinite(plain) || top == INT32_MIN) return float(plain);
  const double unit = std::ldexp(1.0, top - BITS), units = 1 / unit;
  double sum = 0;
  for (int k = 0; k <= n; ++k) sum += std::trunc(terms[k] * units);
  return towards_zero(sum * unit);
}

}  // namespace ptx
