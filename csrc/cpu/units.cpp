// The passes of attention on tiles, once for AVX-512 with the conversions of AVX512-BF16 and once in plain C++, which
// runs with the twin of AMX.
//
// One source for both: vectors of sixteen lanes of GCC, and a class for what these cannot say. That class uses asm
// statements, because GCC does not inline an intrinsic, which has a target attribute, into a template without one.
// Vectors are passed by reference: how they would be passed by value depends on the machine code's level.
#include "units.h"

#include <limits>

namespace fastlm::cpu {
namespace {

constexpr int64_t LANES = 16, ROW = UNIT_QUERIES;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));

template <class V, class T>
FASTLM_INLINE void get(const T* from, V& x) {
  std::memcpy(&x, from, sizeof x);
}

template <class V, class T>
FASTLM_INLINE void put(const V& x, T* to) {
  std::memcpy(to, &x, sizeof x);
}

struct Plain {
  // a where it is larger, else b: also where one is NaN.
  FASTLM_INLINE void larger(const Floats& a, const Floats& b, Floats& out) { out = a > b ? a : b; }
  // x, which the compiler then does not make part of an FMA.
  FASTLM_INLINE void rounded(Floats& x) { asm("" : "+m"(x)); }
  // a where it is smaller, else b.
  FASTLM_INLINE void smaller(const Floats& a, const Floats& b, Floats& out) { out = a < b ? a : b; }

  // bfloat16 of low, then of high.
  FASTLM_INLINE void round(const Floats& low, const Floats& high, Halves& out) {
    bfloat16 halves[2 * LANES];
    for (int i = 0; i < LANES; ++i) cpu::store(halves + i, low[i]), cpu::store(halves + LANES + i, high[i]);
    get(halves, out);
  }
  FASTLM_INLINE void put_halves(const Halves& x, bfloat16* low, bfloat16* high) {
    std::memcpy(low, &x, sizeof x / 2);
    std::memcpy(high, reinterpret_cast<const char*>(&x) + sizeof x / 2, sizeof x / 2);
  }
  // Words whose low half is from the first half of x.
  FASTLM_INLINE void interleave(const Halves& x, Bits& out) {
    for (int i = 0; i < LANES; ++i) out[i] = uint32_t(x[i]) | uint32_t(x[LANES + i]) << 16;
  }

  FASTLM_INLINE void transpose(const uint32_t* from, int64_t ld_from, uint32_t* to, int64_t ld_to) {
    for (int64_t r = 0; r < LANES; ++r) {
      for (int64_t c = 0; c < LANES; ++c) to[c * ld_to + r] = from[r * ld_from + c];
    }
  }
};

#ifdef FASTLM_HAS_UNITS
struct Avx512Bf16 {
  FASTLM_INLINE void larger(const Floats& a, const Floats& b, Floats& out) {
    asm("vmaxps %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  }
  FASTLM_INLINE void rounded(Floats& x) { asm("" : "+v"(x)); }
  FASTLM_INLINE void smaller(const Floats& a, const Floats& b, Floats& out) {
    asm("vminps %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  }

  // Denormals become 0.
  FASTLM_INLINE void round(const Floats& low, const Floats& high, Halves& out) {
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  }
  FASTLM_INLINE void put_halves(const Halves& x, bfloat16* low, bfloat16* high) {
    asm("vmovups %t1, %0" : "=m"(*reinterpret_cast<bfloat16(*)[LANES]>(low)) : "v"(x));
    asm("vextracti64x4 $1, %1, %0" : "=m"(*reinterpret_cast<bfloat16(*)[LANES]>(high)) : "v"(x));
  }
  FASTLM_INLINE void interleave(const Halves& x, Bits& out) {
    constexpr Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    out = (Bits)__builtin_shuffle(x, order);
  }

  // Four times, halves of pairs of rows change places: 64 shuffles for 256 words.
  FASTLM_INLINE void transpose(const uint32_t* from, int64_t ld_from, uint32_t* to, int64_t ld_to) {
    Bits row[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) get(from + i * ld_from, row[i]);
    constexpr Bits first[4] = {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                               {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                               {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                               {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}};
    constexpr Bits second[4] = {{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31},
                                {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31},
                                {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31},
                                {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}};
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        const int other = i | 1 << step;
        if (other == i) continue;
        const Bits a = row[i], b = row[other];
        row[i] = __builtin_shuffle(a, b, first[step]);
        row[other] = __builtin_shuffle(a, b, second[step]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) put(row[i], to + i * ld_to);
  }
};
#endif

// x = 2^x for x <= 127, with an error of 3e-6: rounding the result to bfloat16 has 2e-3. 0 below -126.5; NaN stays NaN.
// The polynomial is a minimax fit of 2^x on [-1/2, 1/2] with 1 at 0, made like those of math.h.
template <class W>
FASTLM_INLINE void exp2_lanes(Floats& x) {
  constexpr float ROUND = 12582912.0f + 127.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  const Floats least = Floats{} - 127.0f;
  W::larger(least, x, x);
  const Floats t = x + ROUND, r = x - (t - ROUND);
  const Floats scale = (Floats)((Bits)t << 23);  // 0 for -127
  Floats y = r * 9.5828557e-3f + 5.5906430e-2f;
  y = y * r + 2.4024099e-1f;
  y = y * r + 6.9312418e-1f;
  y = y * r + 1.0f;
  x = y * scale;
}

// x = 0 where the byte of key m % 4 = `byte` of the words is dropped.
FASTLM_INLINE void drop_lanes(const Bits& words, int byte, uint32_t last, Floats& x) {
  const Bits places = words << (24 - 8 * byte);
  x = places > last ? x : Floats{};
}

FASTLM_INLINE void drop_words(const UnitTile& t, int64_t j, int64_t lane, Bits& words) {
  get(t.drop[j / 64].word[j % 16 / 4] + j % 64 / 16 * t.lanes + lane, words);
}

// The maximum of the scores of sixteen lanes. With a bias, scores become the scores in units of log 2.
template <class W, bool BIAS>
FASTLM_INLINE void most_of(const UnitTile& t, int64_t lane, Floats& most) {
  Floats top[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) top[r] = Floats{} - INF;
  for (int64_t j = 0; j < t.rows; j += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      Floats x;
      get(t.scores + (j + r) * ROW + lane, x);
      if constexpr (BIAS) {
        Floats bias;
        get(t.bias + lane - (j + r), bias);
        x = x * t.factor + bias;
        put(x, t.scores + (j + r) * ROW + lane);
      }
      W::larger(x, top[r], top[r]);
    }
  }
  W::larger(top[0], top[1], top[0]);
  W::larger(top[2], top[3], top[2]);
  W::larger(top[0], top[2], most);
  if constexpr (!BIAS) most = most * t.factor;
}

template <class W, bool BIAS, bool DROPOUT>
FASTLM_INLINE bool softmax_lanes(const UnitSoftmax& a) {
  const UnitTile& t = a.tile;
  Ints changed = {};
  for (int64_t lane = 0; lane < t.lanes; lane += LANES) {
    Floats most, old, sum, total[4] = {};
    most_of<W, BIAS>(t, lane, most);
    get(a.max + lane, old);
    get(a.sum + lane, sum);
    W::larger(most, old, most);
    changed |= most != old;
    put(most, a.max + lane);
    const Floats shift = most == -INF ? Floats{} : most;  // a query that has seen no key yet: 2^(-inf - 0) = 0
    Floats rescale = old - shift;
    exp2_lanes<W>(rescale);
    put(rescale, a.rescale + lane);
    for (int64_t j = 0; j < t.rows; j += 4) {
      Bits words = {};
      if constexpr (DROPOUT) drop_words(t, j, lane, words);
      Floats e[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        get(t.scores + (j + r) * ROW + lane, e[r]);
        if constexpr (!BIAS) {
          // As the maximum is rounded: with an FMA, a score of 1e6 would exceed it by what the maximum lost.
          e[r] = e[r] * t.factor;
          W::rounded(e[r]);
        }
        e[r] = e[r] - shift;
        exp2_lanes<W>(e[r]);
        total[r] += e[r];
        if constexpr (DROPOUT) drop_lanes(words, r, t.last, e[r]);
      }
#pragma GCC unroll 2
      for (int r = 0; r < 4; r += 2) {
        Halves halves;
        Bits pairs;
        W::round(e[r], e[r + 1], halves);
        W::interleave(halves, pairs);
        put(pairs, a.p + (j + r) / 2 * ROW + lane);
      }
    }
    sum = sum * rescale + ((total[0] + total[1]) + (total[2] + total[3]));
    put(sum, a.sum + lane);
  }
  for (int64_t pair = t.rows / 2; pair % (UNIT_DEPTH / 2); ++pair) std::memset(a.p + pair * ROW, 0, t.lanes * 4);
  int any = 0;
  for (int i = 0; i < LANES; ++i) any |= changed[i];
  return any;
}

template <class W, bool BIAS, bool DROPOUT>
FASTLM_INLINE void gradient_lanes(const UnitGradient& a) {
  const UnitTile& t = a.tile;
  for (int64_t lane = 0; lane < t.lanes; lane += LANES) {
    Floats lse, delta;
    get(a.lse + lane, lse);
    get(a.delta + lane, delta);
    for (int64_t j = 0; j < t.rows; j += 4) {
      Bits words = {};
      if constexpr (DROPOUT) drop_words(t, j, lane, words);
      Floats p[4], ds[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int64_t at = (j + r) * ROW + lane;
        Floats product;
        get(t.scores + at, p[r]);
        get(a.products + at, product);
        if constexpr (BIAS) {
          Floats bias;
          get(t.bias + lane - (j + r), bias);
          p[r] = p[r] * t.factor + (bias - lse);
        } else {
          p[r] = p[r] * t.factor - lse;
        }
        W::smaller(Floats{}, p[r], p[r]);  // what lse and a score of 1e6 lost by rounding exceeds 0; NaN stays
        exp2_lanes<W>(p[r]);
        if constexpr (DROPOUT) drop_lanes(words, r, t.last, product);
        ds[r] = p[r] * (product * a.scale - delta);
        if constexpr (DROPOUT) drop_lanes(words, r, t.last, p[r]);
        if (a.keep_ds) put(ds[r], a.products + at);
        if (a.slope) {
          Floats slope;
          get(a.slope + at, slope);
          ds[r] = ds[r] * slope;
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < 4; r += 2) {
        const int64_t at = (j + r) * ROW + lane;
        Halves halves;
        Bits pairs;
        W::round(p[r], p[r + 1], halves);
        W::put_halves(halves, a.p + at, a.p + at + ROW);
        W::round(ds[r], ds[r + 1], halves);
        W::put_halves(halves, a.ds + at, a.ds + at + ROW);
        W::interleave(halves, pairs);
        put(pairs, a.ds_words + (j + r) / 2 * ROW + lane);
      }
    }
  }
  for (int64_t j = t.rows; j % UNIT_DEPTH; j += 2) {
    std::memset(a.p + j * ROW, 0, 2 * ROW * sizeof(bfloat16));
    std::memset(a.ds + j * ROW, 0, 2 * ROW * sizeof(bfloat16));
    std::memset(a.ds_words + j / 2 * ROW, 0, t.lanes * 4);
  }
}

// log2 of x > 0, not denormal; infinity and NaN give NaN. x = 2^e m, 1/sqrt(2) <= m < sqrt(2), t = (m - 1) / (m + 1):
// ln(m) = 2 (t + t³/3 + t⁵/5 + ...), |t| < 0.172.
FASTLM_INLINE void log2_lanes(Floats& x) {
  const Ints exponent = ((Ints)x - 0x3F3504F3) >> 23;
  const Floats m = (Floats)((Ints)x - (exponent << 23));
  const Floats t = (m - 1.0f) / (m + 1.0f), square = t * t;
  Floats y = square * (1.0f / 9) + 1.0f / 7;
  y = y * square + 1.0f / 5;
  y = y * square + 1.0f / 3;
  y = y * square + 1.0f;
  x = y * t * 2.88539008f + (__builtin_convertvector(exponent, Floats) + x * 0.0f);
}

FASTLM_INLINE void finish_lanes(const float* max, const float* sum, int64_t lanes, float scale, float* factor,
                                float* lse) {
  for (int64_t lane = 0; lane < lanes; lane += LANES) {
    Floats most, total;
    get(max + lane, most);
    get(sum + lane, total);
    const Ints none = total == 0.0f;
    put(none ? Floats{} : scale / total, factor + lane);
    log2_lanes(total);
    put(none ? Floats{} - INF : (most + total) * 0.693147181f, lse + lane);
  }
}

template <class W>
FASTLM_INLINE void round_pairs(const float* x, int64_t rows, int64_t lanes, const float* factor, uint32_t* words) {
  for (int64_t lane = 0; lane < lanes; lane += LANES) {
    Floats scale;
    get(factor + lane, scale);
    for (int64_t r = 0; r < rows; r += 2) {
      Floats low, high;
      Halves halves;
      Bits pairs;
      get(x + r * ROW + lane, low);
      get(x + (r + 1) * ROW + lane, high);
      low = low * scale, high = high * scale;
      W::round(low, high, halves);
      W::interleave(halves, pairs);
      put(pairs, words + r / 2 * ROW + lane);
    }
  }
}

template <class W>
FASTLM_INLINE void round_all(const float* x, int64_t ld, int64_t rows, int64_t d, float scale, bfloat16* y,
                             int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < d; c += 2 * LANES) {
      Floats low, high;
      Halves halves;
      get(x + r * ld + c, low);
      get(x + r * ld + c + LANES, high);
      low = low * scale, high = high * scale;
      W::round(low, high, halves);
      bfloat16* const to = y + r * stride + c;
      if (c + 2 * LANES <= d) {
        put(halves, to);
      } else {
        std::memcpy(to, &halves, (d - c) * sizeof *to);
      }
    }
  }
}

// One function per machine code, as in gemm.cpp.
#define FASTLM_PASSES(name, W, attributes)                                                                            \
  struct name {                                                                                                       \
    template <bool BIAS, bool DROPOUT>                                                                                \
    attributes static bool softmax_of(const UnitSoftmax& a) {                                                         \
      return softmax_lanes<W, BIAS, DROPOUT>(a);                                                                      \
    }                                                                                                                 \
    template <bool BIAS, bool DROPOUT>                                                                                \
    attributes static void gradient_of(const UnitGradient& a) {                                                       \
      gradient_lanes<W, BIAS, DROPOUT>(a);                                                                            \
    }                                                                                                                 \
    attributes static void transpose(const uint32_t* from, int64_t ld_from, int64_t rows, int64_t cols, uint32_t* to, \
                                     int64_t ld_to) {                                                                 \
      for (int64_t r = 0; r < rows; r += LANES) {                                                                     \
        for (int64_t c = 0; c < cols; c += LANES)                                                                     \
          W::transpose(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);                                   \
      }                                                                                                               \
    }                                                                                                                 \
    attributes static void finish(const float* max, const float* sum, int64_t lanes, float scale, float* factor,      \
                                  float* lse) {                                                                       \
      finish_lanes(max, sum, lanes, scale, factor, lse);                                                              \
    }                                                                                                                 \
    attributes static void round_lanes(const float* x, int64_t rows, int64_t lanes, const float* factor,              \
                                       uint32_t* words) {                                                             \
      round_pairs<W>(x, rows, lanes, factor, words);                                                                  \
    }                                                                                                                 \
    attributes static void round_rows(const float* x, int64_t ld, int64_t rows, int64_t d, float scale, bfloat16* y,  \
                                      int64_t stride) {                                                               \
      round_all<W>(x, ld, rows, d, scale, y, stride);                                                                 \
    }                                                                                                                 \
    static bool softmax(const UnitSoftmax& a) {                                                                       \
      const UnitTile& t = a.tile;                                                                                     \
      return (t.bias   ? t.drop ? softmax_of<true, true> : softmax_of<true, false>                                    \
              : t.drop ? softmax_of<false, true>                                                                      \
                       : softmax_of<false, false>)(a);                                                                \
    }                                                                                                                 \
    static void gradient(const UnitGradient& a) {                                                                     \
      const UnitTile& t = a.tile;                                                                                     \
      (t.bias   ? t.drop ? gradient_of<true, true> : gradient_of<true, false>                                         \
       : t.drop ? gradient_of<false, true>                                                                            \
                : gradient_of<false, false>)(a);                                                                      \
    }                                                                                                                 \
  };

FASTLM_PASSES(PlainPasses, Plain, __attribute__((noinline)))
#ifdef FASTLM_HAS_UNITS
FASTLM_PASSES(VectorPasses, Avx512Bf16,
              __attribute__((noinline, target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512"))))
#endif

template <class Passes>
Units make(Isa set) {
  const UnitProducts products = unit_products(set);
  return {products.begin,   products.end,   products.set,      products.add,        Passes::softmax,
          Passes::gradient, Passes::finish, Passes::transpose, Passes::round_lanes, Passes::round_rows};
}

}  // namespace

const Units* units() {
  static const Units twin = make<PlainPasses>(Isa::amx_twin);
#ifdef FASTLM_HAS_UNITS
  static const Units amx = make<VectorPasses>(Isa::amx), dots = make<VectorPasses>(Isa::bf16);
  if (isa() == Isa::amx) return &amx;
  if (isa() == Isa::bf16) return &dots;
#endif
  return isa() == Isa::amx_twin ? &twin : nullptr;
}

}  // namespace fastlm::cpu
