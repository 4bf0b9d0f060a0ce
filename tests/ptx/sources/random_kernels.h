// Operations of random kernels (random_kernels.py), for nvcc and for the host's compiler. C++ defines each of them for
// all operands, and both compilers round floating point to nearest without contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define FN __device__
#define CALLED __device__ __noinline__
#define ON_DEVICE(device, host) device
#else
#define FN static inline
#define CALLED static
#define ON_DEVICE(device, host) host
#endif

using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;
using f64 = double;

template <class T>
using Unsigned = std::make_unsigned_t<T>;
// Unsigned and not promoted to int: its arithmetic wraps.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) < 4, u32, Unsigned<T>>;
template <class T>
constexpr int BITS = 8 * sizeof(T);

struct Parameters {
  i8 a;
  u16 b[5];
  i64 c;
  f32 d;
  u32 e[4];
  f64 f;
  i16 g[3];
};
struct Pair {
  i64 first;
  u16 second;
  f32 third;
};

// ---- integers

template <class T>
FN T add(T a, T b) {
  return T(Wrapping<T>(a) + Wrapping<T>(b));
}
template <class T>
FN T sub(T a, T b) {
  return T(Wrapping<T>(a) - Wrapping<T>(b));
}
template <class T>
FN T mul(T a, T b) {
  return T(Wrapping<T>(a) * Wrapping<T>(b));
}
template <class T>
FN T mad(T a, T b, T c) {
  return T(Wrapping<T>(a) * Wrapping<T>(b) + Wrapping<T>(c));
}
template <class T>
FN T mulhi(T a, T b) {
  using Wide = std::conditional_t<sizeof(T) == 8, __int128, i64>;
  using Wider =
      std::conditional_t<std::is_signed_v<T>, Wide, std::conditional_t<sizeof(T) == 8, unsigned __int128, u64>>;
  return T((Wider(a) * Wider(b)) >> BITS<T>);
}
template <class T>
FN T div(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return sub<T>(0, a);
  return T(a / b);
}
template <class T>
FN T rem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
FN T shl(T a, u32 n) {
  return T(Wrapping<T>(a) << (n & (BITS<T> - 1)));
}
template <class T>
FN T shr(T a, u32 n) {
  return T(a >> (n & (BITS<T> - 1)));
}
template <class T>
FN T shl_all(T a, u32 n) {
  return n < BITS<T> ? T(Wrapping<T>(a) << n) : T(0);
}
template <class T>
FN T shr_all(T a, u32 n) {
  return n < BITS<T> ? T(a >> n) : T(a < 0 ? -1 : 0);
}
template <class T>
FN T rotate(T a, u32 n) {
  using U = Unsigned<T>;
  n &= BITS<T> - 1;
  return n ? T(U(U(U(a) << n) | U(U(a) >> (BITS<T> - n)))) : a;
}
template <class T>
FN T band(T a, T b) {
  return T(a & b);
}
template <class T>
FN T bor(T a, T b) {
  return T(a | b);
}
template <class T>
FN T bxor(T a, T b) {
  return T(a ^ b);
}
template <class T>
FN T bnot(T a) {
  return T(~a);
}
template <class T>
FN T merge(T a, T b, T c) {  // lop3 on the device
  return T((a & b) | (~a & c));
}
template <class T>
FN T field(T a, u32 position, u32 length) {  // bfe
  return T(T(Wrapping<T>(a) << (BITS<T> - position - length)) >> (BITS<T> - length));
}
template <class T>
FN T popcount(T a) {
  return T(ON_DEVICE(__popcll(u64(Unsigned<T>(a))), __builtin_popcountll(u64(Unsigned<T>(a)))));
}
template <class T>
FN T leading(T a) {
  u64 x = u64(Unsigned<T>(a)) | 1;
  return T(ON_DEVICE(__clzll(i64(x)), __builtin_clzll(x)));
}
template <class T>
FN T reverse(T a) {  // of bytes: prmt
  Wrapping<T> x = Unsigned<T>(a), out = 0;
  for (unsigned k = 0; k < sizeof(T); ++k) out |= (x >> (8 * k) & 255) << (8 * (sizeof(T) - 1 - k));
  return T(out);
}

// ---- floating point

template <class T>
FN T number(T x) {  // no NaN: their bits differ between machines
  return x == x ? x : T(1);
}
template <class T>
FN T fma_(T a, T b, T c) {
  return number(std::fma(a, b, c));
}
FN f32 plus(f32 a, f32 b) { return number(ON_DEVICE(__fadd_rn(a, b), a + b)); }
FN f64 plus(f64 a, f64 b) { return number(ON_DEVICE(__dadd_rn(a, b), a + b)); }
FN f32 times(f32 a, f32 b) { return number(ON_DEVICE(__fmul_rn(a, b), a * b)); }
FN f64 times(f64 a, f64 b) { return number(ON_DEVICE(__dmul_rn(a, b), a * b)); }
FN f32 over(f32 a, f32 b) { return number(ON_DEVICE(__fdiv_rn(a, b), a / b)); }
FN f64 over(f64 a, f64 b) { return number(ON_DEVICE(__ddiv_rn(a, b), a / b)); }
FN f32 root(f32 a) { return number(ON_DEVICE(__fsqrt_rn(a), std::sqrt(a))); }
FN f64 root(f64 a) { return number(ON_DEVICE(__dsqrt_rn(a), std::sqrt(a))); }

// ---- conversions

template <class To, class From>
FN To bits(From x) {  // shorter or longer
  To out{};
  memcpy(&out, &x, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  if constexpr (std::is_floating_point_v<To>) out = number(out);
  return out;
}
template <class To, class From>
FN To to(From x) {
  if constexpr (std::is_integral_v<To> && std::is_floating_point_v<From>) {
    constexpr To high = To(Unsigned<To>(-1) >> std::is_signed_v<To>), low = std::is_signed_v<To> ? To(~high) : To(0);
    const From end = From(u64(high / 2) + 1) * 2;
    if (!(x >= (std::is_signed_v<To> ? -end : From(0)))) return low;
    return x < end ? To(x) : high;
  } else {
    return To(x);
  }
}
