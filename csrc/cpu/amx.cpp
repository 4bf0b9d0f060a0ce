#include "amx.h"

#include <algorithm>
#include <cstring>

#include "tile.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t SIDE = TILE_SIDE;
constexpr int64_t TILE = TILE_WORDS;
constexpr int64_t ROWS = 16;  // of x, whose columns are made into tiles together
constexpr int64_t PARTS = 3;  // columns of a row of x
constexpr int64_t TILES = ROWS * PARTS / SIDE;
constexpr float DIGITS = 127 * 65536.0f;  // the largest number of three signed digits to the base 256, nearly
constexpr int64_t MOST_COLS = 1 << 17;    // of int8: a sum of so many products of two bytes fits 32 bits

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

// Tiles 0 to 2: sums; 4: weights; 5: columns of x.
template <class Tiles, bool BF16, int SUM>
FASTLM_INLINE void step(const uint32_t* columns) {
  Tiles::template load<5>(columns, SIDE * 4);
  if constexpr (BF16) {
    Tiles::template dot_bf16<SUM, 4, 5>();
  } else {
    Tiles::template dot_i8<SUM, 4, 5>();
  }
}

// out (rows, TILES SIDE) words = a block of at most SIDE rows of weights times the columns of a group.
template <class Tiles, bool BF16>
void block(const char* w, int64_t stride, int64_t words, const uint32_t* columns, int64_t tiles, uint32_t* out) {
  const int64_t next = words * SIDE;  // from one tile of columns to the next
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  for (int64_t k = 0; k < words / SIDE; ++k, columns += TILE) {
    Tiles::template load_once<4>(w + k * SIDE * 4, stride);
    step<Tiles, BF16, 0>(columns);
    if (tiles > 1) step<Tiles, BF16, 1>(columns + next);
    if (tiles > 2) step<Tiles, BF16, 2>(columns + 2 * next);
  }
  Tiles::template store<0>(out, TILES * SIDE * 4);
  if (tiles > 1) Tiles::template store<1>(out + SIDE, TILES * SIDE * 4);
  if (tiles > 2) Tiles::template store<2>(out + 2 * SIDE, TILES * SIDE * 4);
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

template <class Tiles>
void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 5; ++tile) config.rows[tile] = uint8_t(rows);
  Tiles::configure(config);
}

template <class Tiles>
void times(const Matrix& m, int64_t begin, int64_t end, const char* columns, int64_t batch, float* sums, int64_t ld) {
  const int64_t words = words_of(m);
  alignas(64) uint32_t out[SIDE * TILES * SIDE];
  // `count` rows of weights from `row` on, `apart` rows from each to the next (matvec.cpp says why they are apart).
  const auto tile = [&](int64_t row, int64_t count, int64_t apart) {
    const char* const w = static_cast<const char*>(m.data) + row * m.row_bytes();
    for_groups(m, batch, [&](int64_t first, int64_t rows, int64_t at) {
      const uint32_t* const tiles = reinterpret_cast<const uint32_t*>(columns + at + ROWS * 4);
      float* const to = sums + first * ld + (row - begin);
      if (m.form == WeightForm::bf16) {
        block<Tiles, true>(w, apart * m.row_bytes(), words, tiles, tiles_of(rows), out);
        join_bf16(out, count, rows, to, ld, apart);
      } else {
        block<Tiles, false>(w, apart * m.row_bytes(), words, tiles, tiles_of(rows), out);
        join_i8(out, reinterpret_cast<const float*>(columns + at), count, rows, to, ld, apart);
      }
    });
  };
  const int64_t apart = (end - begin) / SIDE;
  if (apart) configure<Tiles>(SIDE);
  for (int64_t i = 0; i < apart; ++i) tile(begin + i, SIDE, apart);
  if (const int64_t rest = end - begin - apart * SIDE) {
    configure<Tiles>(rest);
    tile(end - rest, rest, 1);
  }
  Tiles::release();
}

}  // namespace

bool amx_takes(const Matrix& m) {
  const bool here = isa() == Isa::amx || isa() == Isa::amx_twin;
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
#ifdef FASTLM_HAS_UNITS
  if (isa() == Isa::amx) return times<AmxTiles>(m, begin, end, columns, batch, sums, ld);
#endif
  times<TwinTiles>(m, begin, end, columns, batch, sums, ld);
}

}  // namespace fastlm::cpu
