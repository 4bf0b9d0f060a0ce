// Products of bfloat16 matrices with float sums: on AMX, its twin, or AVX512-BF16.
//
// AMX: 2 x 2 tiles of sums, two of each operand: four products for four loads. AVX512-BF16: 4 x 64 sums in 16
// registers, a pair of elements of a broadcast, a row of words of b in the lanes.
#include <stdexcept>

#include "tile.h"
#include "units.h"

#ifdef FASTLM_HAS_UNITS
// GCC 12 warns about its own header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fastlm::cpu {
namespace {

// Tiles 0 to 3: sums, two rows of ROWS x COLUMNS; 4 and 5: a; 6 and 7: b.
template <class Tiles, bool ADD, int ROWS, int COLUMNS>
void tile_block(int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
  const bfloat16* left = a.data;
  const int64_t stride_a = a.ld * 2, stride_b = ldb * 4, stride_c = ldc * 4;
  float* const below = c + TILE_SIDE * ldc;
  if constexpr (ADD) {
    Tiles::template load<0>(c, stride_c);
    if constexpr (COLUMNS > 1) Tiles::template load<1>(c + TILE_SIDE, stride_c);
    if constexpr (ROWS > 1) Tiles::template load<2>(below, stride_c);
    if constexpr (ROWS > 1 && COLUMNS > 1) Tiles::template load<3>(below + TILE_SIDE, stride_c);
  } else {
    Tiles::template zero<0>();
    if constexpr (COLUMNS > 1) Tiles::template zero<1>();
    if constexpr (ROWS > 1) Tiles::template zero<2>();
    if constexpr (ROWS > 1 && COLUMNS > 1) Tiles::template zero<3>();
  }
  for (int64_t p = 0; p < k; p += UNIT_DEPTH, left += a.step, b += TILE_SIDE * ldb) {
    Tiles::template load<4>(left, stride_a);
    Tiles::template load<6>(b, stride_b);
    Tiles::template dot_bf16<0, 4, 6>();
    if constexpr (ROWS > 1) {
      Tiles::template load<5>(left + TILE_SIDE * a.ld, stride_a);
      Tiles::template dot_bf16<2, 5, 6>();
    }
    if constexpr (COLUMNS > 1) {
      Tiles::template load<7>(b + TILE_SIDE, stride_b);
      Tiles::template dot_bf16<1, 4, 7>();
      if constexpr (ROWS > 1) Tiles::template dot_bf16<3, 5, 7>();
    }
  }
  Tiles::template store<0>(c, stride_c);
  if constexpr (COLUMNS > 1) Tiles::template store<1>(c + TILE_SIDE, stride_c);
  if constexpr (ROWS > 1) Tiles::template store<2>(below, stride_c);
  if constexpr (ROWS > 1 && COLUMNS > 1) Tiles::template store<3>(below + TILE_SIDE, stride_c);
}

template <class Tiles, bool ADD, int COLUMNS>
void tile_columns(int64_t m, int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
  int64_t i = 0;
  const auto rows = [&] { return Left{a.data + i * a.ld, a.ld, a.step}; };
  for (; i + 2 * TILE_SIDE <= m; i += 2 * TILE_SIDE) {
    tile_block<Tiles, ADD, 2, COLUMNS>(k, rows(), b, ldb, c + i * ldc, ldc);
  }
  if (i < m) tile_block<Tiles, ADD, 1, COLUMNS>(k, rows(), b, ldb, c + i * ldc, ldc);
}

template <class Tiles, bool ADD>
void tile_product(int64_t m, int64_t n, int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c,
                  int64_t ldc) {
  int64_t j = 0;
  for (; j + 2 * TILE_SIDE <= n; j += 2 * TILE_SIDE) {
    tile_columns<Tiles, ADD, 2>(m, k, a, b + j, ldb, c + j, ldc);
  }
  if (j < n) tile_columns<Tiles, ADD, 1>(m, k, a, b + j, ldb, c + j, ldc);
}

template <class Tiles>
void configure() {
  Tiles::configure(TileConfig{});
}

template <class Tiles>
void release() {
  Tiles::release();
}

template <class Tiles>
constexpr UnitProducts TILE_PRODUCTS = {configure<Tiles>, release<Tiles>, tile_product<Tiles, false>,
                                        tile_product<Tiles, true>};

#ifdef FASTLM_HAS_UNITS
#define FASTLM_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))

constexpr int DOT_ROWS = 4;

template <bool ADD, int VECTORS>
FASTLM_BF16 __attribute__((noinline)) void dot_block(int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c,
                                                     int64_t ldc) {
  __m512 sum[DOT_ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < DOT_ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = ADD ? _mm512_loadu_ps(c + r * ldc + 16 * v) : _mm512_setzero_ps();
  }
  const bfloat16* panel = a.data;
  for (int64_t p = 0; p < k; p += UNIT_DEPTH, panel += a.step) {
    for (int64_t pair = 0; pair < UNIT_DEPTH; pair += 2, b += ldb) {
      __m512i right[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 4
      for (int r = 0; r < DOT_ROWS; ++r) {
        int32_t word;
        std::memcpy(&word, panel + r * a.ld + pair, sizeof word);
        const __m512i left = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)left, (__m512bh)right[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < DOT_ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, sum[r][v]);
  }
}

template <bool ADD, int VECTORS>
void dot_rows(int64_t m, int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i += DOT_ROWS) {
    dot_block<ADD, VECTORS>(k, {a.data + i * a.ld, a.ld, a.step}, b, ldb, c + i * ldc, ldc);
  }
}

template <bool ADD>
void dot_product(int64_t m, int64_t n, int64_t k, const Left& a, const uint32_t* b, int64_t ldb, float* c,
                 int64_t ldc) {
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) dot_rows<ADD, 4>(m, k, a, b + j, ldb, c + j, ldc);
  for (; j + 32 <= n; j += 32) dot_rows<ADD, 2>(m, k, a, b + j, ldb, c + j, ldc);
  if (j < n) dot_rows<ADD, 1>(m, k, a, b + j, ldb, c + j, ldc);
}

void nothing() {}
#endif

}  // namespace

UnitProducts unit_products(Isa set) {
  switch (set) {
#ifdef FASTLM_HAS_UNITS
    case Isa::amx:
      return TILE_PRODUCTS<AmxTiles>;
    case Isa::bf16:
      return {nothing, nothing, dot_product<false>, dot_product<true>};
#endif
    default:
      return TILE_PRODUCTS<TwinTiles>;
  }
}

void bf16_product(const void* a, const uint32_t* b, float* c, int64_t m, int64_t n, int64_t k) {
  const Units* const set = units();
  if (!set) throw std::invalid_argument("isa: expected one with bfloat16 units in use");
  const UnitsInUse in_use(*set);
  set->set(m, n, k, {static_cast<const bfloat16*>(a), k, UNIT_DEPTH}, b, n, c, n);
}

}  // namespace fastlm::cpu
