// cvt. aux[0]: FloatFlags, aux[1]: round to an integral value (1 + RoundingMode), of float to float.
#include <algorithm>

#include "float.h"
#include "register.h"

namespace ptx {

namespace {

template <class T>
constexpr bool IS_HALF = std::is_same_v<T, F16> || std::is_same_v<T, BF16>;

// A source, of whose register the low bytes count where it is wider than its type.
template <class S>
S narrow(const Operand& o, const u32* p, int l) {
  return sizeof(S) < 8 && o.width == 8 ? S(get<u64>(p, l)) : get<S>(p, l);
}

// A source as an exact double (odd where 64-bit integers do not fit).
template <class S>
double read(const Operand& o, const u32* p, int l, u32 flags) {
  if constexpr (IS_HALF<S>)
    return to_double(S{}, get<u16>(p, l));
  else if constexpr (std::is_floating_point_v<S>) {
    S x = get<S>(p, l);
    return flags & FTZ ? flush(x) : x;
  } else if constexpr (sizeof(S) == 8)
    return from_int_odd(get<S>(p, l));
  else
    return narrow<S>(o, p, l);
}

double integral(double x, u32 mode) {
  return mode == RN ? std::nearbyint(x) : mode == RZ ? std::trunc(x) : mode == RM ? std::floor(x) : std::ceil(x);
}

float round_to_float(double x, u32 mode) {
  volatile double in = x;  // through memory, which the barriers of Rounding order
  volatile float out;
  {
    Rounding rounding(mode);
    out = float(in);
  }
  return out;
}

void put_register(const Operand& o, u32* d, int l, u64 value) {
  if (o.width == 8)
    put<u64>(d, l, value);
  else
    put<u32>(d, l, u32(value));
}

template <class D, class S>
void to_real(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  u32 flags = i.aux[0], mode = flags & ROUNDING;
  for_lanes(mask, [&](int l) {
    double x = read<S>(i.ops[1], s, l, flags);
    if (i.aux[1]) x = integral(x, i.aux[1] - 1);
    if (flags & SAT) x = saturate(x);
    if (flags & RELU) x = x > 0 || x != x ? x : 0;
    if constexpr (IS_HALF<D>) {
      d[l] = round_half<D>(x, mode);
    } else if constexpr (std::is_same_v<D, float>) {
      float out = canonical(mode == RN ? float(x) : round_to_float(x, mode));
      put<float>(d, l, flags & FTZ ? flush(out) : out);
    } else if constexpr (std::is_integral_v<S> && sizeof(S) == 8) {
      Rounding rounding(mode);
      volatile S in = get<S>(s, l);
      put<double>(d, l, double(in));
    } else {
      put<double>(d, l, x);
    }
  });
}

// Out of range clamps. NaN is 0, but the lowest value (unsigned: the top bit) from f64 or to 64 bits.
template <class D, class S>
void to_integer(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  using Limits = std::numeric_limits<D>;
  for_lanes(mask, [&](int l) {
    double x = integral(read<S>(i.ops[1], s, l, i.aux[0]), i.aux[0] & ROUNDING);
    D out;
    if (x != x) {
      bool zero = !std::is_same_v<S, double> && sizeof(D) < 8;
      out = zero ? D(0) : D(1ull << (8 * sizeof(D) - 1));
    } else if (x <= double(Limits::min()))
      out = Limits::min();
    else if (x >= std::ldexp(1.0, Limits::digits))
      out = Limits::max();
    else
      out = D(x);
    put_register(i.ops[0], d, l, u64(i64(out)));
    if (std::is_unsigned_v<D>) put_register(i.ops[0], d, l, u64(out));
  });
}

template <class D, class S>
void resize(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  const bool sat = i.aux[0] & SAT;
  for_lanes(mask, [&](int l) {
    S x = narrow<S>(i.ops[1], s, l);
    if (sat) {
      __int128 clamped = std::clamp<__int128>(x, std::numeric_limits<D>::min(), std::numeric_limits<D>::max());
      x = S(clamped);
    }
    D out = D(x);
    put_register(i.ops[0], d, l, std::is_signed_v<D> ? u64(i64(out)) : u64(out));
  });
}
// aux[2]: bytes of the narrower type, aux[3]: it is signed, aux[4]: bytes of the source's type. The narrower type's
// bytes are copied; those above are its sign, or zero. Saturation hangs on all of the source.
void taint_resize(Block& b, Warp& w, const Ins& i, u32 mask) {
  u32 size = i.aux[2];
  for_lanes(mask, [&](int l) {
    u32 source = w.undefined_bytes(i.ops[1], l) & ((1u << i.aux[4]) - 1), u = source & ((1u << size) - 1);
    if (i.aux[3] && u >> (size - 1) & 1) u |= 0xffu << size;
    if (i.aux[0] & SAT && source) u = 0xff;
    w.set_undefined(i.ops[0], l, u8(u), w.origin_of(i.ops[1], b.pc));
  });
}

// The two conversions that attention and mixed precision live on, without double.
u16 bf16_nearest(u32 bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return NAN16;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void bf16_from_float(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) { d[l] = bf16_nearest(s[l]); });
}
void float_from_bf16(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) { put<float>(d, l, canonical(std::bit_cast<float>(s[l] << 16))); });
}
// Two floats to a pair: the first source is the upper half.
void bf16_pair(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *high = w.at(i.ops[1]), *low = w.at(i.ops[2]);
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) { d[l] = u32(bf16_nearest(high[l])) << 16 | bf16_nearest(low[l]); });
}
template <class H>
void pair(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *high = w.at(i.ops[1]), *low = w.at(i.ops[2]);
  u32* d = w.at(i.ops[0]);
  u32 flags = i.aux[0];
  auto convert = [&](const u32* s, int l) {
    double x = read<float>(i.ops[1], s, l, flags);
    if (flags & RELU) x = x > 0 || x != x ? x : 0;
    if (flags & SAT) x = saturate(x);
    return u32(round_half<H>(x, flags & ROUNDING));
  };
  for_lanes(mask, [&](int l) { d[l] = convert(high, l) << 16 | convert(low, l); });
}
void taint_pair(Block& b, Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    u8 high = w.undefined_bytes(i.ops[1], l), low = w.undefined_bytes(i.ops[2], l);
    w.set_undefined(i.ops[0], l, u8((high ? 12 : 0) | (low ? 3 : 0)), w.origin_of(i.ops[high ? 1 : 2], b.pc));
  });
}
// tf32: 10 bits of mantissa in a register of 32
void tf32_from_float(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32* s = w.at(i.ops[1]);
  u32* d = w.at(i.ops[0]);
  u32 mode = i.aux[0] & ROUNDING;
  for_lanes(mask, [&](int l) {
    u32 x = s[l];
    if ((x & 0x7fffffff) > 0x7f800000) {
      d[l] = NAN32;
      return;
    }
    if (mode == RNA)
      x += 0x1000;
    else if (mode == RN)
      x += 0xfff + (x >> 13 & 1);
    x &= ~0x1fffu;
    d[l] = i.aux[0] & RELU && x & 0x80000000 ? 0 : x;
  });
}
// cvt.pack.sat: d = {saturated a, saturated b, c shifted up}. aux[1]: bits of a part, aux[2]: signed.
void pack_saturated(Block&, Warp& w, const Ins& i, u32 mask) {
  const u32 *a = w.at(i.ops[1]), *b = w.at(i.ops[2]);
  u32* d = w.at(i.ops[0]);
  u32 bits = i.aux[1], part = (1u << bits) - 1;
  i32 high = i32(i.aux[2] ? part >> 1 : part), low = i.aux[2] ? -high - 1 : 0;
  for_lanes(mask, [&](int l) {
    u32 x = u32(std::clamp(i32(a[l]), low, high)) & part, y = u32(std::clamp(i32(b[l]), low, high)) & part;
    u32 c = i.ns > 2 && bits < 16 ? w.at(i.ops[3])[l] << (2 * bits) : 0;
    d[l] = c | x << bits | y;
  });
}

template <class F>
void each_integer(F&& f) {
  f.template operator()<u8>("u8"), f.template operator()<i8>("s8");
  f.template operator()<u16>("u16"), f.template operator()<i16>("s16");
  f.template operator()<u32>("u32"), f.template operator()<i32>("s32");
  f.template operator()<u64>("u64"), f.template operator()<i64>("s64");
}
template <class F>
void each_real(F&& f) {
  f.template operator()<F16>("f16"), f.template operator()<BF16>("bf16");
  f.template operator()<float>("f32"), f.template operator()<double>("f64");
}

}  // namespace

void register_convert() {
  each_integer([]<class D>(std::string d) {
    each_integer([&]<class S>(std::string s) { add("cvt." + d + "." + s, resize<D, S>, Kind::PLAIN, taint_resize); });
    each_real([&]<class S>(std::string s) {
      add("cvt." + d + "." + s, to_integer<D, S>);
      add("cvt." + s + "." + d, to_real<S, D>);
    });
  });
  each_real([]<class D>(std::string d) {
    each_real([&]<class S>(std::string s) { add("cvt." + d + "." + s, to_real<D, S>); });
  });
  add("cvt.rn.bf16.f32", bf16_from_float);
  add("cvt.rn.bf16x2.f32", bf16_pair, Kind::PLAIN, taint_pair);
  add("cvt.exact.f32.bf16", float_from_bf16);
  add("cvt.f16x2.f32", pair<F16>, Kind::PLAIN, taint_pair);
  add("cvt.bf16x2.f32", pair<BF16>, Kind::PLAIN, taint_pair);
  add("cvt.tf32.f32", tf32_from_float);
  add("cvt.pack", pack_saturated);
}

}  // namespace ptx
