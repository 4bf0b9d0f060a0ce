// Floating-point formats and rounding. The core is compiled without contraction, so that what is written is what is
// done.
#pragma once

#include <cfenv>
#include <cmath>
#include <limits>

#include "core.h"

namespace ptx {

enum RoundingMode : u32 { RN, RZ, RM, RP, RNA };

// aux[0] of floating-point instructions.
enum FloatFlags : u32 { FTZ = 8, SAT = 16, RELU = 32, PROPAGATE_NAN = 64, XORSIGN_ABS = 128, ROUNDING = 7 };

constexpr u32 NAN32 = 0x7fffffff;  // PTX's canonical NaN
constexpr u16 NAN16 = 0x7fff;

inline float canonical(float x) { return x == x ? x : std::bit_cast<float>(NAN32); }
inline double canonical(double x) { return x; }
inline float flush(float x) {
  u32 bits = std::bit_cast<u32>(x);
  return bits & 0x7f800000 ? x : std::bit_cast<float>(bits & 0x80000000);
}
inline double flush(double x) { return x; }
// .sat: [0, 1], and 0 for NaN
template <class T>
inline T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}

// The host's rounding mode, restored at the end of the scope. The barriers keep arithmetic inside.
class Rounding {
  int before;

 public:
  explicit Rounding(u32 mode) : before(fegetround()) {
    static constexpr int MODES[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    fesetround(MODES[mode]);
    asm volatile("" ::: "memory");
  }
  ~Rounding() {
    asm volatile("" ::: "memory");
    fesetround(before);
  }
};

// A double that stands for an exact value s + error: the neighbour with an odd last bit, if it is inexact. Rounded once
// more to a shorter format, it gives what rounding the exact value gives.
inline double odd(double s, double error) {
  u64 bits = std::bit_cast<u64>(s);
  if (error == 0 || !std::isfinite(s) || bits & 1) return s;
  return std::bit_cast<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}
inline double add_odd(double a, double b) {
  double s = a + b, bb = s - a;
  return odd(s, (a - (s - bb)) + (b - bb));
}
inline double from_int_odd(i64 x) {
  double s = double(x);
  return odd(s, double(__int128(x) - __int128(s)));
}
inline double from_int_odd(u64 x) {
  double s = double(x);
  return odd(s, double(__int128(x) - __int128(s)));
}

struct F16 {
  static constexpr int MANTISSA = 10, BIAS = 15;
};
struct BF16 {
  static constexpr int MANTISSA = 7, BIAS = 127;
};

inline double to_double(F16, u16 h) {
  u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return std::bit_cast<float>(mantissa ? NAN32 : sign | 0x7f800000);
  if (exponent == 0) return std::bit_cast<float>(sign | 0x3f800000) * (mantissa * 0x1p-24);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline double to_double(BF16, u16 h) {
  float x = std::bit_cast<float>(u32(h) << 16);
  return canonical(x);
}
template <class H>
inline float to_float(u16 h) {
  return float(to_double(H{}, h));
}

// To 16 bits in any rounding mode.
template <class H>
inline u16 round_half(double x, u32 mode = RN) {
  if (x != x) return NAN16;
  u64 bits = std::bit_cast<u64>(x);
  u16 sign = u16(bits >> 48 & 0x8000);
  bool negative = sign;
  constexpr u16 INFINITE = u16((2 * H::BIAS + 1) << H::MANTISSA);
  if (std::isinf(x)) return sign | INFINITE;
  if (x == 0) return sign;
  int exponent = int(bits >> 52 & 2047) - 1023;
  u64 mantissa = bits & ((1ull << 52) - 1);
  if (exponent == -1023)
    exponent = -1022;  // far below anything that is kept
  else
    mantissa |= 1ull << 52;
  int below = std::max(0, 1 - H::BIAS - exponent);  // bits that a subnormal loses
  int shift = std::min(52 - H::MANTISSA + below, 60);
  u64 kept = mantissa >> shift, rest = mantissa & ((1ull << shift) - 1), half = 1ull << (shift - 1);
  bool up = mode == RN    ? rest > half || (rest == half && kept & 1)
            : mode == RNA ? rest >= half
            : mode == RM  ? rest && negative
            : mode == RP  ? rest && !negative
                          : false;
  u64 result = kept + up;
  if (!below) result += u64(exponent + H::BIAS - 1) << H::MANTISSA;
  if (result >= INFINITE) {
    bool to_infinity = mode == RN || mode == RNA || mode == (negative ? RM : RP);
    return sign | u16(to_infinity ? INFINITE : INFINITE - 1);
  }
  return sign | u16(result);
}

template <class H>
inline u16 half_flush(u16 h, u32 flags) {
  return flags & FTZ && !(h & ((2 * H::BIAS + 1) << H::MANTISSA)) ? u16(h & 0x8000) : h;
}
template <class H>
inline u16 half_finish(u16 h, u32 flags) {
  h = half_flush<H>(h, flags);
  if (flags & SAT) {
    double x = to_double(H{}, h);
    h = round_half<H>(saturate(x));
  }
  if (flags & RELU && (h & 0x8000) && (h & 0x7fff) <= u16((2 * H::BIAS + 1) << H::MANTISSA)) h = 0;
  return h;
}
template <class H>
inline u16 half_add(u16 a, u16 b, u32 flags = 0) {
  double x = to_double(H{}, half_flush<H>(a, flags)), y = to_double(H{}, half_flush<H>(b, flags));
  return half_finish<H>(round_half<H>(add_odd(x, y), flags & ROUNDING), flags);
}

}  // namespace ptx
