// Integers, bits, predicates, moves.
#include <algorithm>

#include "register.h"

namespace ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr int BITS = 8 * sizeof(T);
template <class T>
struct WiderOf;
template <>
struct WiderOf<u16> {
  using type = u32;
};
template <>
struct WiderOf<i16> {
  using type = i32;
};
template <>
struct WiderOf<u32> {
  using type = u64;
};
template <>
struct WiderOf<i32> {
  using type = i64;
};
template <>
struct WiderOf<u64> {
  using type = unsigned __int128;
};
template <>
struct WiderOf<i64> {
  using type = __int128;
};
template <class T>
using Wider = typename WiderOf<T>::type;

struct Add {
  template <class T>
  static T f(T a, T b) {
    return T(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return T(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
struct MulLo {
  template <class T>
  static T f(T a, T b) {
    return T(u64(a) * u64(b));
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    return T((Wider<T>(a) * Wider<T>(b)) >> BITS<T>);
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return Add::f<T>(MulLo::f<T>(a, b), c);
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return Add::f<T>(MulHi::f<T>(a, b), c);
  }
};
// PTX leaves division by zero open; the hardware gives all ones.
struct Div {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return T(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - Unsigned<T>(a));
    return T(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return a > b ? a : b;
  }
};
struct MinRelu {
  template <class T>
  static T f(T a, T b) {
    return Max::f<T>(Min::f<T>(a, b), 0);
  }
};
struct MaxRelu {
  template <class T>
  static T f(T a, T b) {
    return Max::f<T>(Max::f<T>(a, b), 0);
  }
};
struct Abs {
  template <class T>
  static T f(T a) {
    return a < 0 ? T(0 - Unsigned<T>(a)) : a;
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    return T(0 - Unsigned<T>(a));
  }
};
struct Sad {
  template <class T>
  static T f(T a, T b, T c) {
    return T(Unsigned<T>(c) + (a < b ? Unsigned<T>(b) - Unsigned<T>(a) : Unsigned<T>(a) - Unsigned<T>(b)));
  }
};
struct AddSat {
  static i32 f(i32 a, i32 b) { return i32(std::clamp<i64>(i64(a) + b, INT32_MIN, INT32_MAX)); }
};
struct SubSat {
  static i32 f(i32 a, i32 b) { return i32(std::clamp<i64>(i64(a) - b, INT32_MIN, INT32_MAX)); }
};
template <class T>
struct MulWide {
  static Wider<T> f(T a, T b) { return Wider<T>(a) * b; }
};
template <class T>
struct MadWide {
  static Wider<T> f(T a, T b, Wider<T> c) { return Add::f<Wider<T>>(Wider<T>(a) * b, c); }
};
template <class T>
T low24(T a) {
  return std::is_signed_v<T> ? T(a << 8) >> 8 : a & T(0xffffff);
}
template <class T>
struct Mul24Lo {
  static T f(T a, T b) { return T(i64(low24(a)) * i64(low24(b))); }
};
template <class T>
struct Mul24Hi {
  static T f(T a, T b) { return T((i64(low24(a)) * i64(low24(b))) >> 16); }
};
template <class T>
struct Mad24Lo {
  static T f(T a, T b, T c) { return Add::f<T>(Mul24Lo<T>::f(a, b), c); }
};
template <class T>
struct Mad24Hi {
  static T f(T a, T b, T c) { return Add::f<T>(Mul24Hi<T>::f(a, b), c); }
};

template <class F, class T>
struct Bind {
  static T f(T a) { return F::template f<T>(a); }
  static T f(T a, T b) { return F::template f<T>(a, b); }
  static T f(T a, T b, T c) { return F::template f<T>(a, b, c); }
};

// Carries: one lane a bit in the warp's condition code register. aux[0]: 1 reads it, 2 writes it.
template <class T, bool SUBTRACT>
void add_carry(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) {
    T x = get<T>(a, l), y = get<T>(b, l);
    T in = i.aux[0] & 1 ? w.carry >> l & 1 : 0;
    T sum = SUBTRACT ? x - y - in : x + y + in;
    bool out = SUBTRACT ? x < y || (in && x == y) : sum < x || (in && sum == x);
    if (i.aux[0] & 2) w.carry = (w.carry & ~(1u << l)) | u32(out) << l;
    put<T>(d, l, sum);
  });
}
// aux[1]: the high half of the product
template <class T, class S>
void mad_carry(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]), *c = w.at(i.ops[3]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) {
    S x = get<S>(a, l), y = get<S>(b, l);
    T product = T(i.aux[1] ? MulHi::f<S>(x, y) : MulLo::f<S>(x, y)), z = get<T>(c, l);
    T in = i.aux[0] & 1 ? w.carry >> l & 1 : 0;
    T sum = product + z + in;
    bool out = sum < product || (in && sum == product);
    if (i.aux[0] & 2) w.carry = (w.carry & ~(1u << l)) | u32(out) << l;
    put<T>(d, l, sum);
  });
}

struct And {
  template <class T>
  static T f(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return T(~a);
  }
};
struct Cnot {
  template <class T>
  static T f(T a) {
    return a == 0;
  }
};
template <class T>
struct Shl {
  static T f(T a, u32 n) { return n >= BITS<T> ? T(0) : T(a << n); }
};
template <class T>
struct Shr {
  static T f(T a, u32 n) { return n >= BITS<T> ? T(a < 0 ? -1 : 0) : T(a >> n); }
};
struct ShfLeftClamp {
  static u32 f(u32 a, u32 b, u32 n) {
    n = std::min(n, 32u);
    return u32((u64(b) << 32 | a) << n >> 32);
  }
};
struct ShfLeftWrap {
  static u32 f(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); }
};
struct ShfRightClamp {
  static u32 f(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> std::min(n, 32u)); }
};
struct ShfRightWrap {
  static u32 f(u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); }
};
template <class T>
struct Bfe {
  static T f(T a, u32 position, u32 length) {
    u32 p = position & 255, n = length & 255, msb = BITS<T> - 1;
    using U = Unsigned<T>;
    U sign = std::is_signed_v<T> && n ? U(a) >> std::min(p + n - 1, msb) & 1 : 0;
    U low = p > msb ? (sign ? ~U(0) : 0) : U(U(a) >> p);
    if (n == 0) return 0;
    U out = 0;
    for (u32 k = 0; k <= msb; ++k) out |= U(k < n && p + k <= msb ? low >> k & 1 : sign) << k;
    return T(out);
  }
};
template <class T>
struct Bfi {
  static T f(T a, T b, u32 position, u32 length) {
    u32 p = position & 255, n = length & 255;
    for (u32 k = 0; k < n && p + k < BITS<T>; ++k) {
      T bit = T(1) << (p + k);
      b = T((b & ~bit) | (a >> k & 1 ? bit : 0));
    }
    return b;
  }
};
template <class T>
struct Bfind {
  static u32 f(T a) {
    Unsigned<T> x = std::is_signed_v<T> && a < 0 ? Unsigned<T>(~a) : Unsigned<T>(a);
    return x ? u32(BITS<T> - 1 - std::countl_zero(x)) : ALL;
  }
};
template <class T>
struct BfindShift {
  static u32 f(T a) {
    u32 n = Bfind<T>::f(a);
    return n == ALL ? n : BITS<T> - 1 - n;
  }
};
template <class T>
struct Brev {
  static T f(T a) {
    T out = 0;
    for (int k = 0; k < BITS<T>; ++k) out |= (a >> k & 1) << (BITS<T> - 1 - k);
    return out;
  }
};
template <class T>
struct Popc {
  static u32 f(T a) { return u32(std::popcount(a)); }
};
template <class T>
struct Clz {
  static u32 f(T a) { return u32(std::countl_zero(a)); }
};
template <bool CLAMP>
struct Bmsk {
  static u32 f(u32 position, u32 length) {
    u32 p = CLAMP ? std::min(position, 32u) : position & 31, n = CLAMP ? std::min(length, 32u) : length & 31;
    return p >= 32 ? 0 : u32(((1ull << n) - 1) << p);
  }
};
struct Fns {
  static u32 f(u32 mask, u32 base, i32 offset) {
    if (offset == 0) return base < 32 && mask >> base & 1 ? base : ALL;
    int step = offset > 0 ? 1 : -1, left = std::abs(offset);
    for (int p = int(base); p >= 0 && p < 32; p += step) {
      if (mask >> p & 1 && --left == 0) return u32(p);
    }
    return ALL;
  }
};

// aux[0]: the truth table
void lop3(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]), *c = w.at(i.ops[3]);
  u32 t = i.aux[0], out[LANES];
  u32 m[8];
  for (int k = 0; k < 8; ++k) m[k] = t >> k & 1 ? ALL : 0;
  for (int l = 0; l < LANES; ++l) {
    u32 x = a[l], y = b[l], z = c[l];
    out[l] = (m[0] & ~x & ~y & ~z) | (m[1] & ~x & ~y & z) | (m[2] & ~x & y & ~z) | (m[3] & ~x & y & z) |
             (m[4] & x & ~y & ~z) | (m[5] & x & ~y & z) | (m[6] & x & y & ~z) | (m[7] & x & y & z);
  }
  u32* d = w.at(i.ops[0]);
  for (int l = 0; l < LANES; ++l) d[l] = mask >> l & 1 ? out[l] : d[l];
}

// A byte is undefined if the table lets an undefined operand through: tried with all zeros and all ones.
void taint_lop3(Block& b, Warp& w, const Ins& i, u32 mask) {
  u32 t = i.aux[0];
  for_lanes(mask, [&](int l) {
    u32 undefined[3], low[3], high[3], from = 0;
    for (int k = 0; k < 3; ++k) {
      const Operand& s = i.ops[1 + k];
      u8 bytes = w.undefined_bytes(s, l);
      undefined[k] = 0;
      for (int j = 0; j < 4; ++j) undefined[k] |= bytes >> j & 1 ? 0xffu << (8 * j) : 0;
      low[k] = w.at(s)[l] & ~undefined[k], high[k] = low[k] | undefined[k];
      if (bytes) from = w.origin_of(s, b.pc);
    }
    u32 any = 0, all = ALL;
    for (int choice = 0; choice < 8; ++choice) {
      u32 out = 0;
      for (int row = 0; row < 8; ++row) {
        if (!(t >> row & 1)) continue;
        u32 term = ALL;
        for (int k = 0; k < 3; ++k) {
          u32 v = choice >> k & 1 ? high[k] : low[k];
          term &= row >> (2 - k) & 1 ? v : ~v;
        }
        out |= term;
      }
      any |= out, all &= out;
    }
    u8 bytes = 0;
    for (int j = 0; j < 4; ++j) bytes |= u8(((any ^ all) >> (8 * j) & 255) != 0) << j;
    w.set_undefined(i.ops[0], l, bytes, from);
  });
}

// aux[0]: 0 generic, then f4e b4e rc8 ecl ecr rc16
u32 prmt_selector(u32 mode, u32 c) {
  static constexpr u16 TABLE[7][4] = {{},
                                      {0x3210, 0x4321, 0x5432, 0x6543},
                                      {0x5670, 0x6701, 0x7012, 0x0123},
                                      {0x0000, 0x1111, 0x2222, 0x3333},
                                      {0x3210, 0x3211, 0x3222, 0x3333},
                                      {0x0000, 0x1110, 0x2210, 0x3210},
                                      {0x1010, 0x3232, 0x1010, 0x3232}};
  return mode ? TABLE[mode][c & 3] : c;
}
void prmt(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]), *c = w.at(i.ops[3]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) {
    u64 bytes = u64(b[l]) << 32 | a[l];
    u32 selector = prmt_selector(i.aux[0], c[l]), out = 0;
    for (int k = 0; k < 4; ++k) {
      u32 s = selector >> (4 * k) & 15, byte = u32(bytes >> (8 * (s & 7))) & 255;
      if (s & 8) byte = byte & 0x80 ? 255 : 0;
      out |= byte << (8 * k);
    }
    d[l] = out;
  });
}
void taint_prmt(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u32 u = u32(w.undefined_bytes(i.ops[2], l)) << 4 | w.undefined_bytes(i.ops[1], l), out = 0;
    u32 selector = prmt_selector(i.aux[0], w.at(i.ops[3])[l]);
    for (int k = 0; k < 4; ++k) out |= (u >> (selector >> (4 * k) & 7) & 1) << k;
    if (w.undefined_bytes(i.ops[3], l)) out = 15;
    w.set_undefined(i.ops[0], l, u8(out), w.origin_of(i.ops[w.undef[i.ops[1].reg] >> l & 1 ? 1 : 2], b.pc));
  });
}

// aux[0]: 1 signed a, 2 signed b; aux[1]: bytes of a; imm: the half of b, for dp2a
void dot(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]), *c = w.at(i.ops[3]);
  u32* d = w.at(i.ops[0]);
  u32 size = i.aux[1], bits = 8 * size;
  for_lanes(mask, [&](int l) {
    u32 sum = c[l];
    for (u32 k = 0; k < 4 / size; ++k) {
      u32 x = a[l] << (32 - bits - bits * k), y = b[l] << (24 - 8 * (k + 2 * u32(i.imm)));
      i64 left = i.aux[0] & 1 ? i64(i32(x) >> (32 - bits)) : i64(x >> (32 - bits));
      i64 right = i.aux[0] & 2 ? i64(i32(y) >> 24) : i64(y >> 24);
      sum += u32(left * right);
    }
    d[l] = sum;
  });
}

// Shifts by whole bytes move them; others smear.
template <bool LEFT>
void taint_shift(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u32 u = w.undefined_bytes(i.ops[1], l), n = w.at(i.ops[2])[l];
    u32 whole = (1u << i.ops[0].width) - 1, bytes = std::min(n / 8, 8u), out;
    if (w.undefined_bytes(i.ops[2], l))
      out = whole;
    else if (LEFT)
      out = u << bytes | (n % 8 ? u << (bytes + 1) : 0);
    else
      out = (u >> bytes) | (n % 8 ? u >> (bytes + 1) : 0) |
            (u & (1u << (i.ops[1].width - 1)) ? whole & ~(whole >> bytes) : 0);
    w.set_undefined(i.ops[0], l, u8(out & whole), w.origin_of(i.ops[1], b.pc));
  });
}

template <class T>
void arithmetic_of(const char* type) {
  std::string t = std::string(".") + type;
  add("add" + t, lanes<Bind<Add, T>, T, T, T>);
  add("sub" + t, lanes<Bind<Sub, T>, T, T, T>);
  add("mul.lo" + t, lanes<Bind<MulLo, T>, T, T, T>);
  add("mul.hi" + t, lanes<Bind<MulHi, T>, T, T, T>);
  add("mad.lo" + t, lanes<Bind<MadLo, T>, T, T, T, T>);
  add("mad.hi" + t, lanes<Bind<MadHi, T>, T, T, T, T>);
  add("div" + t, lanes<Bind<Div, T>, T, T, T>);
  add("rem" + t, lanes<Bind<Rem, T>, T, T, T>);
  add("min" + t, lanes<Bind<Min, T>, T, T, T>);
  add("max" + t, lanes<Bind<Max, T>, T, T, T>);
  add("sad" + t, lanes<Bind<Sad, T>, T, T, T, T>);
  add("shr" + t, lanes<Shr<T>, T, T, u32>, Kind::PLAIN, taint_shift<false>);
  if constexpr (sizeof(T) < 8) {
    add("mul.wide" + t, lanes<MulWide<T>, Wider<T>, T, T>);
    add("mad.wide" + t, lanes<MadWide<T>, Wider<T>, T, T, Wider<T>>);
  }
  if constexpr (sizeof(T) > 2) {
    add("bfe" + t, lanes<Bfe<T>, T, T, u32, u32>);
    add("bfind" + t, lanes<Bfind<T>, u32, T>);
    add("bfind.shiftamt" + t, lanes<BfindShift<T>, u32, T>);
    using U = Unsigned<T>;
    add("add.carry" + t, add_carry<U, false>);
    add("sub.carry" + t, add_carry<U, true>);
    add("mad.carry" + t, mad_carry<U, T>);
  }
  if constexpr (sizeof(T) == 4) {
    add("mul24.lo" + t, lanes<Mul24Lo<T>, T, T, T>);
    add("mul24.hi" + t, lanes<Mul24Hi<T>, T, T, T>);
    add("mad24.lo" + t, lanes<Mad24Lo<T>, T, T, T, T>);
    add("mad24.hi" + t, lanes<Mad24Hi<T>, T, T, T, T>);
  }
  if constexpr (std::is_signed_v<T>) {
    add("abs" + t, lanes<Bind<Abs, T>, T, T>);
    add("neg" + t, lanes<Bind<Neg, T>, T, T>);
  }
}

template <class T>
void bits_of(const char* type) {
  std::string t = std::string(".") + type;
  add("and" + t, lanes<Bind<And, T>, T, T, T>, Kind::PLAIN, taint_and);
  add("or" + t, lanes<Bind<Or, T>, T, T, T>, Kind::PLAIN, taint_or);
  add("xor" + t, lanes<Bind<Xor, T>, T, T, T>, Kind::PLAIN, taint_bytes);
  add("not" + t, lanes<Bind<Not, T>, T, T>, Kind::PLAIN, taint_bytes);
  add("cnot" + t, lanes<Bind<Cnot, T>, T, T>);
  add("shl" + t, lanes<Shl<T>, T, T, u32>, Kind::PLAIN, taint_shift<true>);
}

template <class T>
void wide_bits_of(const char* type) {
  std::string t = std::string(".") + type;
  add("brev" + t, lanes<Brev<T>, T, T>);
  add("popc" + t, lanes<Popc<T>, u32, T>);
  add("clz" + t, lanes<Clz<T>, u32, T>);
  add("bfi" + t, lanes<Bfi<T>, T, T, T, u32, u32>);
}

// F of each half of 32 bits, T wide.
template <class F, class T>
struct Pair {
  static u32 f(u32 a, u32 b) {
    u32 low = u16(F::f(T(a), T(b))), high = u16(F::f(T(a >> 16), T(b >> 16)));
    return low | high << 16;
  }
};
template <class T>
void pairs_of(const char* type) {
  std::string t = std::string(".") + type;
  add("add" + t, lanes<Pair<Add, T>, u32, u32, u32>, Kind::PLAIN, taint_halves);
  add("min" + t, lanes<Pair<Min, T>, u32, u32, u32>, Kind::PLAIN, taint_halves);
  add("max" + t, lanes<Pair<Max, T>, u32, u32, u32>, Kind::PLAIN, taint_halves);
}

}  // namespace

void register_integer() {
  pairs_of<u16>("u16x2");
  pairs_of<i16>("s16x2");
  arithmetic_of<u16>("u16");
  arithmetic_of<i16>("s16");
  arithmetic_of<u32>("u32");
  arithmetic_of<i32>("s32");
  arithmetic_of<u64>("u64");
  arithmetic_of<i64>("s64");
  add("add.sat.s32", lanes<AddSat, i32, i32, i32>);
  add("sub.sat.s32", lanes<SubSat, i32, i32, i32>);
  add("min.relu.s32", lanes<Bind<MinRelu, i32>, i32, i32, i32>);
  add("max.relu.s32", lanes<Bind<MaxRelu, i32>, i32, i32, i32>);
  bits_of<u16>("b16");
  bits_of<u32>("b32");
  bits_of<u64>("b64");
  wide_bits_of<u32>("b32");
  wide_bits_of<u64>("b64");
  add("shf.l.clamp.b32", lanes<ShfLeftClamp, u32, u32, u32, u32>);
  add("shf.l.wrap.b32", lanes<ShfLeftWrap, u32, u32, u32, u32>);
  add("shf.r.clamp.b32", lanes<ShfRightClamp, u32, u32, u32, u32>);
  add("shf.r.wrap.b32", lanes<ShfRightWrap, u32, u32, u32, u32>);
  add("bmsk.clamp.b32", lanes<Bmsk<true>, u32, u32, u32>);
  add("bmsk.wrap.b32", lanes<Bmsk<false>, u32, u32, u32>);
  add("fns.b32", lanes<Fns, u32, u32, u32, i32>);
  add("lop3.b32", lop3, Kind::PLAIN, taint_lop3);
  add("prmt.b32", prmt, Kind::PLAIN, taint_prmt);
  add("dot", dot);
}

}  // namespace ptx
