// The instructions that PTX calls approximate: rcp, sqrt, rsqrt, ex2, lg2, sin, cos, tanh and div, `.approx` or
// `.full`.
//
// They are computed in double and rounded once, closer than the hardware. A launch may ask for its errors instead
// (Chip): every result is then as far from the exact one as the PTX ISA allows, upwards, downwards, or by an amount
// that depends on the result's bits. The results that the ISA lists stay as they are: of zeros, infinities and NaN.
#include "float.h"
#include "register.h"

namespace ptx {

namespace {

// The distance of two neighbours at x.
double ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23); }

struct Rcp {
  static double f(double a) { return 1 / a; }
  static double most(double, double y) { return ulp(y); }
};
struct Sqrt {
  static double f(double a) { return std::sqrt(a); }
  static double most(double, double y) { return y * 0x1p-23; }
};
struct Rsqrt {
  static double f(double a) { return a == 0 ? std::copysign(INFINITY, a) : 1 / std::sqrt(a); }
  static double most(double, double y) { return y * 0x1.1111ap-23; }  // 2^-22.9
};
struct Ex2 {
  static double f(double a) { return std::exp2(a); }
  static double most(double a, double y) { return a == 0 ? 0 : 2 * ulp(y); }
};
struct Lg2 {
  static double f(double a) { return a == 0 ? -INFINITY : std::log2(a); }
  static double most(double a, double y) {
    return a > 0.5 && a < 2 ? 0x1.5187p-23 : std::fabs(y) * 0x1p-22;  // 2^-22.6
  }
};
struct Sin {
  static double f(double a) { return std::sin(a); }
  static double most(double a, double) { return a == 0 ? 0 : 0x1.6a09ep-21; }  // 2^-20.5
};
struct Cos {
  static double f(double a) { return std::cos(a); }
  static double most(double a, double) { return a == 0 ? 0 : 0x1.6a09ep-21; }
};
struct Tanh {
  static double f(double a) { return std::tanh(a); }
  static double most(double, double y) { return std::fabs(y) * 0x1p-11; }
};
struct Div {
  static double f(double a, double b) { return a / b; }
  static double most(double, double, double y) { return 2 * ulp(y); }
};

// A number in [-1, 1] for the bits of another.
double scattered(double x) {
  u64 bits = std::bit_cast<u64>(x) * 0x9E3779B97F4A7C15ull;
  bits = (bits ^ bits >> 29) * 0xBF58476D1CE4E5B9ull;
  return double(i64(bits ^ bits >> 32)) * 0x1p-63;
}

// The float at or next to `wrong`, on the side of the exact value.
float towards(double wrong, double exact) {
  const float y = float(wrong);
  const bool past = wrong > exact ? y > wrong : y < wrong;
  return past ? std::nextafter(y, float(exact)) : y;
}

float rounded(double exact, double most, u32 chip) {
  const float y = float(exact);
  if (chip == Chip::EXACT || most == 0 || exact == 0 || !std::isfinite(y)) return canonical(y);
  const double share = chip == Chip::HIGH ? 1 : chip == Chip::LOW ? -1 : scattered(exact);
  const float wrong = towards(exact + share * most, exact);
  return std::isfinite(wrong) ? wrong : y;
}

template <class F, size_t... I>
void approximate_lanes(Block& b, Warp& w, const Ins& i, u32 mask, std::index_sequence<I...>) {
  const u32 flags = i.aux[0], chip = b.launch.chip;
  const u32* s[] = {w.at(i.ops[1 + I])...};
  u32* d = w.at(i.ops[0]);
  for_lanes(mask, [&](int l) {
    float in[] = {get<float>(s[I], l)...};
    for (float& x : in) x = flags & FTZ ? flush(x) : x;
    const double exact = F::f(double(in[I])...);
    float out = rounded(exact, F::most(double(in[I])..., exact), chip);
    out = flags & FTZ ? flush(out) : out;
    put<float>(d, l, flags & SAT ? saturate(out) : out);
  });
}
template <class F, size_t N>
void approximate(Block& b, Warp& w, const Ins& i, u32 mask) {
  approximate_lanes<F>(b, w, i, mask, std::make_index_sequence<N>{});
}

}  // namespace

void register_approximate() {
  add("rcp.approx.f32", approximate<Rcp, 1>);
  add("sqrt.approx.f32", approximate<Sqrt, 1>);
  add("rsqrt.approx.f32", approximate<Rsqrt, 1>);
  add("ex2.approx.f32", approximate<Ex2, 1>);
  add("lg2.approx.f32", approximate<Lg2, 1>);
  add("sin.approx.f32", approximate<Sin, 1>);
  add("cos.approx.f32", approximate<Cos, 1>);
  add("tanh.approx.f32", approximate<Tanh, 1>);
  add("div.approx.f32", approximate<Div, 2>);
}

}  // namespace ptx
