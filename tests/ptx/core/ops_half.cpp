// f16 and bf16 arithmetic, alone and in pairs. Every operation is computed in double, exactly but for a last odd bit
// (float.h), and rounded once. aux[0]: FloatFlags.
#include <algorithm>

#include "float.h"
#include "register.h"

namespace ptx {

namespace {

struct Add {
  static double f(double a, double b) { return add_odd(a, b); }
};
struct Sub {
  static double f(double a, double b) { return add_odd(a, -b); }
};
struct Mul {
  static double f(double a, double b) { return a * b; }
};  // exact
struct Fma {
  static double f(double a, double b, double c) { return add_odd(a * b, c); }
};
struct Min {
  static double f(double a, double b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
  }
};
struct Max {
  static double f(double a, double b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
  }
};
struct Ex2 {
  static double f(double a) { return std::exp2(a); }
};
struct Tanh {
  static double f(double a) { return std::tanh(a); }
};

template <class F, class H, size_t... I>
u16 one(const u16* in, u32 flags, std::index_sequence<I...>) {
  double x[] = {to_double(H{}, half_flush<H>(in[I], flags))...};
  bool nan = false;
  double sign = 1;
  for (double& v : x) {
    nan |= v != v;
    if (flags & XORSIGN_ABS) sign = std::signbit(v) ? -sign : sign, v = std::fabs(v);
  }
  double out = F::f(x[I]...);
  if (flags & XORSIGN_ABS) out = std::copysign(out, sign);
  if (flags & PROPAGATE_NAN && nan) return NAN16;
  return half_finish<H>(round_half<H>(out, flags & ROUNDING), flags);
}

// PAIR: both halves of 32 bits
template <class F, class H, bool PAIR, int N>
void half(Block&, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u32 out = 0;
    for (int k = 0; k <= PAIR; ++k) {
      u16 in[N];
      for (int j = 0; j < N; ++j) in[j] = u16(w.at(i.ops[1 + j])[l] >> (16 * k));
      out |= u32(one<F, H>(in, i.aux[0], std::make_index_sequence<N>{})) << (16 * k);
    }
    w.at(i.ops[0])[l] = out;
  });
}

// Of the sign bit alone; aux[1]: the mask to flip, aux[2]: the mask to keep.
template <class H, bool PAIR>
void sign_bits(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* a = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) {
    u32 x = a[l];
    u32 low = half_flush<H>(u16(x), i.aux[0]), high = half_flush<H>(u16(x >> 16), i.aux[0]);
    d[l] = ((PAIR ? high << 16 | low : low) ^ i.aux[1]) & i.aux[2];
  });
}

enum Comparison : u32 { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };
template <class H>
u32 relation(u16 a, u16 b, bool ftz) {
  double x = to_double(H{}, half_flush<H>(a, ftz ? u32(FTZ) : 0)),
         y = to_double(H{}, half_flush<H>(b, ftz ? u32(FTZ) : 0));
  return x < y ? LESS : x > y ? GREATER : x == y ? EQUAL : UNORDERED;
}
u32 combine(u32 op, u32 a, u32 c) { return op == 1 ? a & c : op == 2 ? a | c : op == 3 ? a ^ c : a; }

// aux as in ops_float.cpp. Of pairs, the second predicate is that of the upper half.
template <class H, bool PAIR>
void setp(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[i.nd]), *b = w.at(i.ops[i.nd + 1]);
  u32 c = i.ns > 2 ? w.mask_of(i.ops[i.nd + 2]) : 0;
  u32 results[2] = {};
  for (int k = 0; k <= PAIR; ++k) {
    for (int l = 0; l < LANES; ++l) {
      u32 r = relation<H>(u16(a[l] >> (16 * k)), u16(b[l] >> (16 * k)), i.aux[3]);
      results[k] |= u32((r & i.aux[2]) != 0) << l;
    }
  }
  if (!PAIR) results[1] = ~results[0];
  for (u32 k = 0; k < i.nd; ++k) {
    u32 *d = w.at(i.ops[k]), value = combine(i.aux[0], results[k], c);
    *d = (*d & ~mask) | (value & mask);
  }
}
// aux[1]: the value of true, in 16 bits (pairs) or 32
template <class H, bool PAIR>
void set(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]);
  u32 c = i.ns > 2 ? w.mask_of(i.ops[3]) : 0;
  for_lanes(mask, [&](int l) {
    u32 out = 0;
    for (int k = 0; k <= PAIR; ++k) {
      u32 r = relation<H>(u16(a[l] >> (16 * k)), u16(b[l] >> (16 * k)), i.aux[3]);
      if (combine(i.aux[0], (r & i.aux[2]) != 0, c >> l & 1) & 1) out |= i.aux[1] << (16 * k);
    }
    w.at(i.ops[0])[l] = out;
  });
}

template <class F, class H, int N>
void operation(const std::string& name, const std::string& type) {
  add(name + "." + type, half<F, H, false, N>);
  add(name + "." + type + "x2", half<F, H, true, N>, Kind::PLAIN, taint_halves);
}
template <class H>
void operations_of(const std::string& type) {
  operation<Add, H, 2>("add", type);
  operation<Sub, H, 2>("sub", type);
  operation<Mul, H, 2>("mul", type);
  operation<Fma, H, 3>("fma", type);
  operation<Min, H, 2>("min", type);
  operation<Max, H, 2>("max", type);
  operation<Ex2, H, 1>("ex2", type);
  operation<Tanh, H, 1>("tanh", type);
  add("sign." + type, sign_bits<H, false>);
  add("sign." + type + "x2", sign_bits<H, true>, Kind::PLAIN, taint_halves);
  add("setp." + type, setp<H, false>);
  add("setp." + type + "x2", setp<H, true>);
  add("set." + type, set<H, false>);
  add("set." + type + "x2", set<H, true>, Kind::PLAIN, taint_halves);
}

}  // namespace

void register_half() {
  operations_of<F16>("f16");
  operations_of<BF16>("bf16");
}

}  // namespace ptx
