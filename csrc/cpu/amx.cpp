#include "amx.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

#if defined(FASTLM_HAS_CLONES) && __GNUC__ >= 11
#define FASTLM_HAS_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm::cpu {

#ifdef FASTLM_HAS_AMX
namespace {

constexpr int64_t SIDE = 16;           // rows and words of a tile
constexpr int64_t TILE = SIDE * SIDE;  // words
constexpr int64_t ROWS = 16;           // of x, whose columns are made into tiles together
constexpr int64_t PARTS = 3;           // columns of a row of x
constexpr int64_t TILES = ROWS * PARTS / SIDE;
constexpr float DIGITS = 127 * 65536.0f;  // the largest number of three signed digits to the base 256, nearly
constexpr int64_t MOST_COLS = 1 << 17;    // of int8: a sum of so many products of two bytes fits 32 bits

// Linux gives the unit to a process that asks, before its first use.
bool permitted() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("x86-64-v4") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

int64_t words_of(const Matrix& m) { return m.row_bytes() / 4; }

int64_t tiles_of(int64_t rows) { return (rows * PARTS + SIDE - 1) / SIDE; }

// Of a group of at most ROWS rows of x: their scales, then tiles of columns, (tiles, words, SIDE) words.
int64_t group_bytes(const Matrix& m, int64_t rows) { return ROWS * 4 + tiles_of(rows) * words_of(m) * SIDE * 4; }

// Calls f(first row, rows, bytes before it) for each group.
template <class F>
void for_groups(const Matrix& m, int64_t batch, F f) {
  for (int64_t b = 0, at = 0; b < batch; b += ROWS) {
    const int64_t rows = std::min(ROWS, batch - b);
    f(b, rows, at);
    at += group_bytes(m, rows);
  }
}

// The three columns of one row x of bfloat16 products: words of two elements, to columns[word SIDE].
FASTLM_CLONES void split_bf16(const float* x, int64_t words, uint32_t* const (&columns)[PARTS]) {
  for (int64_t i = 0; i < words; ++i) {
    float rest[2] = {x[i], x[words + i]};
    for (int p = 0; p < PARTS; ++p) {
      bfloat16 part[2];
      for (int e = 0; e < 2; ++e) {
        store(&part[e], rest[e]);
        rest[e] -= load(&part[e]);
      }
      columns[p][i * SIDE] = uint32_t(part[0].bits) | uint32_t(part[1].bits) << 16;
    }
  }
}

// The same of int8 products: words of four digits. Returns the scale.
FASTLM_CLONES float split_i8(const float* x, int64_t words, uint32_t* const (&columns)[PARTS]) {
  float most = 0.0f, other = 0.0f;  // `other` is NaN if an element is NaN or infinite, and so the scale
#pragma omp simd reduction(max : most) reduction(+ : other)
  for (int64_t i = 0; i < 4 * words; ++i) {
    most = std::max(most, std::fabs(x[i]));
    other += x[i] * 0.0f;
  }
  const bool normal = most > 1e-30f && other == 0.0f;  // smaller ones count as 0
  const float inverse = normal ? DIGITS / most : 0.0f;
  for (int64_t i = 0; i < words; ++i) {
    uint32_t word[PARTS] = {};
    for (int e = 0; e < 4; ++e) {
      // The digits 0 to 255 of q + 128 (256² + 256 + 1), less 128 each, which flips their highest bit.
      const int32_t q = int32_t(x[e * words + i] * inverse + (x[e * words + i] < 0.0f ? -0.5f : 0.5f));
      const uint32_t digits = uint32_t(normal ? q : 0) + 0x808080u;
      for (int p = 0; p < PARTS; ++p) word[p] |= ((digits >> (16 - 8 * p) & 0xFFu) ^ 0x80u) << (8 * e);
    }
    for (int p = 0; p < PARTS; ++p) columns[p][i * SIDE] = word[p];
  }
  return (normal ? most / DIGITS : 0.0f) + other;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 2: sums; 4: weights; 5: columns of x.
#define FASTLM_STEP(multiply)                          \
  _tile_stream_loadd(4, w + k * SIDE * 4, stride);     \
  _tile_loadd(5, columns + k * TILE, SIDE * 4);        \
  multiply(0, 4, 5);                                   \
  if (tiles > 1) {                                     \
    _tile_loadd(5, columns + next + k * TILE, 64);     \
    multiply(1, 4, 5);                                 \
  }                                                    \
  if (tiles > 2) {                                     \
    _tile_loadd(5, columns + 2 * next + k * TILE, 64); \
    multiply(2, 4, 5);                                 \
  }

// out (rows, TILES SIDE) words = a block of at most SIDE rows of weights times the columns of a group.
template <bool BF16>
__attribute__((target("amx-tile,amx-int8,amx-bf16"))) void block(const char* w, int64_t stride, int64_t words,
                                                                 const uint32_t* columns, int64_t tiles,
                                                                 uint32_t* out) {
  const int64_t next = words * SIDE;  // from one tile of columns to the next
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t k = 0; k < words / SIDE; ++k) {
    if constexpr (BF16) {
      FASTLM_STEP(_tile_dpbf16ps)
    } else {
      FASTLM_STEP(_tile_dpbssd)
    }
  }
  _tile_stored(0, out, TILES * SIDE * 4);
  if (tiles > 1) _tile_stored(1, out + SIDE, TILES * SIDE * 4);
  if (tiles > 2) _tile_stored(2, out + 2 * SIDE, TILES * SIDE * 4);
}

// sums (batch, ld) of a block, from out.
FASTLM_CLONES void join_bf16(const uint32_t* out, int64_t rows, int64_t batch, float* sums, int64_t ld, int64_t step) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t* part = out + r * TILES * SIDE + b * PARTS;
      sums[b * ld + r * step] = bits_to_float(part[0]) + (bits_to_float(part[1]) + bits_to_float(part[2]));
    }
  }
}

FASTLM_CLONES void join_i8(const uint32_t* out, const float* scale, int64_t rows, int64_t batch, float* sums,
                           int64_t ld, int64_t step) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t* digit = out + r * TILES * SIDE + b * PARTS;
      const float low = 256.0f * float(int32_t(digit[1])) + float(int32_t(digit[2]));
      sums[b * ld + r * step] = scale[b] * (65536.0f * float(int32_t(digit[0])) + low);
    }
  }
}

__attribute__((target("amx-tile"))) void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 6; ++tile)
    config.bytes[tile] = SIDE * 4, config.rows[tile] = uint8_t(tile < 5 ? rows : SIDE);
  // GCC's _tile_loadconfig says that it reads the first 8 bytes alone.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

__attribute__((target("amx-tile"))) void release() { _tile_release(); }

}  // namespace

bool amx_takes(const Matrix& m) {
  static const bool here = permitted();
  return here && m.form != WeightForm::f32 && m.row_bytes() % (SIDE * 4) == 0 && m.cols <= MOST_COLS;
}

int64_t amx_bytes(const Matrix& m, int64_t batch) {
  int64_t bytes = 0;
  for_groups(m, batch, [&](int64_t, int64_t rows, int64_t at) { bytes = at + group_bytes(m, rows); });
  return bytes;
}

void amx_columns(const Matrix& m, const float* x, int64_t ldx, int64_t batch, char* columns) {
  const int64_t words = words_of(m);
  for_groups(m, batch, [&](int64_t first, int64_t rows, int64_t at) {
    float* const scale = reinterpret_cast<float*>(columns + at);
    uint32_t* const tiles = reinterpret_cast<uint32_t*>(columns + at + ROWS * 4);
    const auto column = [&](int64_t c) { return tiles + c / SIDE * words * SIDE + c % SIDE; };
    for (int64_t b = 0; b < rows; ++b) {
      const float* const row = x + (first + b) * ldx;
      uint32_t* const to[PARTS] = {column(b * PARTS), column(b * PARTS + 1), column(b * PARTS + 2)};
      if (m.form == WeightForm::bf16) {
        split_bf16(row, words, to);
      } else {
        scale[b] = split_i8(row, words, to);
      }
    }
    for (int64_t c = rows * PARTS; c < tiles_of(rows) * SIDE; ++c) {
      for (int64_t i = 0; i < words; ++i) column(c)[i * SIDE] = 0;
    }
  });
}

void amx_times(const Matrix& m, int64_t begin, int64_t end, const char* columns, int64_t batch, float* sums,
               int64_t ld) {
  const int64_t words = words_of(m);
  alignas(64) uint32_t out[SIDE * TILES * SIDE];
  // Rows of weights from `first` on, `apart` rows from each to the next.
  const auto tile = [&](int64_t row, int64_t count, int64_t apart) {
    const char* const w = static_cast<const char*>(m.data) + row * m.row_bytes();
    for_groups(m, batch, [&](int64_t first, int64_t rows, int64_t at) {
      const uint32_t* const tiles = reinterpret_cast<const uint32_t*>(columns + at + ROWS * 4);
      float* const to = sums + first * ld + (row - begin);
      if (m.form == WeightForm::bf16) {
        block<true>(w, apart * m.row_bytes(), words, tiles, tiles_of(rows), out);
        join_bf16(out, count, rows, to, ld, apart);
      } else {
        block<false>(w, apart * m.row_bytes(), words, tiles, tiles_of(rows), out);
        join_i8(out, reinterpret_cast<const float*>(columns + at), count, rows, to, ld, apart);
      }
    });
  };
  const int64_t apart = (end - begin) / SIDE;
  if (apart) configure(SIDE);
  for (int64_t i = 0; i < apart; ++i) tile(begin + i, SIDE, apart);
  if (const int64_t rest = end - begin - apart * SIDE) {
    configure(rest);
    tile(end - rest, rest, 1);
  }
  release();
}

#else

bool amx_takes(const Matrix&) { return false; }
int64_t amx_bytes(const Matrix&, int64_t) { return 0; }
void amx_columns(const Matrix&, const float*, int64_t, int64_t, char*) {}
void amx_times(const Matrix&, int64_t, int64_t, const char*, int64_t, float*, int64_t) {}

#endif

}  // namespace fastlm::cpu
