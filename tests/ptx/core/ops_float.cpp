// f32 and f64 arithmetic.
//
// "add.f32" rounds to nearest and keeps subnormals, in a loop that the compiler vectorises; "add.f32+" obeys the
// FloatFlags in aux[0].
#include <algorithm>

#include "float.h"
#include "register.h"

namespace ptx {

namespace {

template <class T>
T min_number(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T max_number(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

struct Add {
  template <class T>
  static T f(T a, T b) {
    return canonical(a + b);
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return canonical(a - b);
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b) {
    return canonical(a * b);
  }
};
struct Fma {
  template <class T>
  static T f(T a, T b, T c) {
    return canonical(std::fma(a, b, c));
  }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    return canonical(a / b);
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return min_number(a, b);
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return max_number(a, b);
  }
};
struct Min3 {
  template <class T>
  static T f(T a, T b, T c) {
    return min_number(min_number(a, b), c);
  }
};
struct Max3 {
  template <class T>
  static T f(T a, T b, T c) {
    return max_number(max_number(a, b), c);
  }
};
struct Rcp {
  template <class T>
  static T f(T a) {
    return canonical(T(1) / a);
  }
};
struct Sqrt {
  template <class T>
  static T f(T a) {
    return canonical(std::sqrt(a));
  }
};
struct Copysign {
  template <class T>
  static T f(T a, T b) {
    return std::copysign(b, a);
  }
};
struct Abs {
  static float f(float a) { return std::bit_cast<float>(std::bit_cast<u32>(a) & 0x7fffffff); }
  static double f(double a) { return std::fabs(a); }
};
struct Neg {
  static float f(float a) { return std::bit_cast<float>(std::bit_cast<u32>(a) ^ 0x80000000); }
  static double f(double a) { return -a; }
};
// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 give the upper word of the result alone.
double upper(double x) { return std::bit_cast<double>(std::bit_cast<u64>(x) & ~0xffffffffull); }
struct RcpUpper {
  static double f(double a) { return upper(1 / a); }
};
struct RsqrtUpper {
  static double f(double a) { return upper(a == 0 ? std::copysign(INFINITY, a) : 1 / std::sqrt(a)); }
};

template <class F, class T>
struct Bind {
  static T f(T a) { return F::f(a); }
  static T f(T a, T b) { return F::f(a, b); }
  static T f(T a, T b, T c) { return F::f(a, b, c); }
};

template <class F, class T, size_t... I>
void general_lanes(Warp& w, const Ins& i, u32 mask, std::index_sequence<I...>) {
  const u32 flags = i.aux[0];
  const u32* s[] = {w.at(i.ops[1 + I])...};
  u32* d = w.at(i.ops[0]);
  Rounding rounding(flags & ROUNDING);
  for_lanes(mask, [&](int l) {
    T in[] = {get<T>(s[I], l)...};
    T sign = T(1);
    bool nan = false;
    for (T& x : in) {
      if (flags & FTZ) x = flush(x);
      if (flags & XORSIGN_ABS) sign = std::copysign(sign, std::signbit(x) ? -sign : sign), x = std::fabs(x);
      nan |= x != x;
    }
    T out = F::f(in[I]...);
    if (flags & XORSIGN_ABS) out = std::copysign(out, sign);
    if (flags & PROPAGATE_NAN && nan) out = canonical(std::numeric_limits<T>::quiet_NaN());
    if (flags & FTZ) out = flush(out);
    if (flags & SAT) out = saturate(out);
    if (flags & RELU) out = out > 0 || out != out ? out : T(0);
    put<T>(d, l, out);
  });
}
template <class F, class T, int N>
void general(Block&, Warp& w, const Ins& i, u32 mask) {
  general_lanes<Bind<F, T>, T>(w, i, mask, std::make_index_sequence<N>{});
}

template <class F, class T, class... S>
void operation(const std::string& name) {
  add(name, lanes<Bind<F, T>, T, S...>);
  add(name + "+", general<F, T, sizeof...(S)>);
}
template <class T>
void arithmetic_of(const std::string& type) {
  operation<Add, T, T, T>("add." + type);
  operation<Sub, T, T, T>("sub." + type);
  operation<Mul, T, T, T>("mul." + type);
  operation<Fma, T, T, T, T>("fma." + type);
  operation<Div, T, T, T>("div." + type);
  operation<Min, T, T, T>("min." + type);
  operation<Max, T, T, T>("max." + type);
  operation<Min3, T, T, T, T>("min3." + type);
  operation<Max3, T, T, T, T>("max3." + type);
  operation<Rcp, T, T>("rcp." + type);
  operation<Sqrt, T, T>("sqrt." + type);
  operation<Copysign, T, T, T>("copysign." + type);
  operation<Abs, T, T>("abs." + type);
  operation<Neg, T, T>("neg." + type);
}

// ---- comparisons: eq is false for NaN, equ is true -----------------------------------------------------------------

enum Comparison : u32 { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };

template <class T>
u32 relation(T a, T b) {
  return a < b ? LESS : a > b ? GREATER : a == b ? EQUAL : UNORDERED;
}
// aux[2]: the Comparison that is true; aux[3]: flush subnormals. The rest as in ops_integer.cpp.
template <class T>
u32 compare(Warp& w, const Ins& i) {
  const u32 *a = w.at(i.ops[i.nd]), *b = w.at(i.ops[i.nd + 1]);
  u32 result = 0;
  for (int l = 0; l < LANES; ++l) {
    T x = get<T>(a, l), y = get<T>(b, l);
    if (i.aux[3]) x = flush(x), y = flush(y);
    result |= u32((relation(x, y) & i.aux[2]) != 0) << l;
  }
  return result;
}
u32 combine(u32 op, u32 a, u32 c) { return op == 1 ? a & c : op == 2 ? a | c : op == 3 ? a ^ c : a; }

template <class T>
void setp(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 result = compare<T>(w, i), c = i.ns > 2 ? w.mask_of(i.ops[i.nd + 2]) : 0;
  for (u32 k = 0; k < i.nd; ++k) {
    u32 *d = w.at(i.ops[k]), value = combine(i.aux[0], k ? ~result : result, c);
    *d = (*d & ~mask) | (value & mask);
  }
}
template <class T>
void set(Block&, Warp& w, const Ins& i, u32 mask) {
  u32 result = combine(i.aux[0], compare<T>(w, i), i.ns > 2 ? w.mask_of(i.ops[3]) : 0);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) { d[l] = result >> l & 1 ? i.aux[1] : 0; });
}

// aux[0]: bits of finite, infinite, number, notanumber, normal, subnormal
template <class T>
void testp(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* a = w.at(i.ops[1]);
  u32 result = 0;
  for_lanes(mask, [&](int l) {
    T x = get<T>(a, l);
    u32 is = u32(std::isfinite(x)) | u32(std::isinf(x)) << 1 | u32(x == x) << 2 | u32(x != x) << 3 |
             u32(std::isnormal(x) || x == 0) << 4 | u32(std::fpclassify(x) == FP_SUBNORMAL) << 5;
    result |= u32((is & i.aux[0]) != 0) << l;
  });
  u32* d = w.at(i.ops[0]);
  *d = (*d & ~mask) | result;
}

}  // namespace

void register_float() {
  arithmetic_of<float>("f32");
  arithmetic_of<double>("f64");
  add("rcp.approx.f64", lanes<RcpUpper, double, double>);
  add("rsqrt.approx.f64", lanes<RsqrtUpper, double, double>);
  add("setp.f32", setp<float>);
  add("setp.f64", setp<double>);
  add("set.f32", set<float>);
  add("set.f64", set<double>);
  add("testp.f32", testp<float>);
  add("testp.f64", testp<double>);
}

}  // namespace ptx
