// A block of c, ROWS x LANES, stays in registers for all k. An element of a is broadcast, a row of b is in the lanes.
// So neither operand is packed or transposed. 6 rows keep two FMA units busy (24, 12 and 12 registers of sums) and
// leave room for a row of b. Measured on one Ice Lake core at 2.6 GHz, 64^3 products: 165 GFLOP/s with 6 x 64 under
// AVX-512 (8 x 32: 120, 12 x 32: 140; the peak is 166), and 95 with 6 x 16 under AVX2 (4 x 24: 94; the peak is 100).
#include "gemm.h"

#include <algorithm>

#include "isa.h"

namespace fastlm::cpu {
namespace {

template <int ROWS, int LANES, bool ADD, A FORM>
FASTLM_INLINE void sum_block(int64_t k, float scale, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                             int64_t ldc) {
  alignas(64) float sum[ROWS][LANES];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) sum[r][j] = 0.0f;
  }
  for (int64_t p = 0; p < k; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float x = FORM == A::plain ? a[r * lda + p] : a[p * lda + r];
#pragma omp simd
      for (int j = 0; j < LANES; ++j) sum[r][j] += x * b[p * ldb + j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) c[r * ldc + j] = ADD ? c[r * ldc + j] + sum[r][j] : scale * sum[r][j];
  }
}

// One function per machine code, instead of target_clones: the lanes differ, and 512-bit vectors need an option. A
// block is a separate function; else the compiler keeps loop bounds in the registers that the sums need.
#define FASTLM_LEVEL(name, lanes, attributes)                                                                      \
  struct name {                                                                                                    \
    static constexpr int LANES = lanes;                                                                            \
    template <int ROWS, int COLUMNS, bool ADD, A FORM>                                                             \
    attributes static void block(int64_t k, float scale, const float* a, int64_t lda, const float* b, int64_t ldb, \
                                 float* c, int64_t ldc) {                                                          \
      sum_block<ROWS, COLUMNS, ADD, FORM>(k, scale, a, lda, b, ldb, c, ldc);                                       \
    }                                                                                                              \
  };

FASTLM_LEVEL(Portable, 8, __attribute__((noinline)))
#ifdef FASTLM_HAS_CLONES
FASTLM_LEVEL(V3, 16, __attribute__((noinline, target("arch=x86-64-v3"))))
FASTLM_LEVEL(V4, 64, __attribute__((noinline, target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif

template <class Level, int COLUMNS, bool ADD, A FORM>
void columns(int64_t m, int64_t k, float scale, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc) {
  const int64_t step = FORM == A::plain ? lda : 1;
  int64_t i = 0;
  auto rows = [&](auto block, int64_t count) {
    for (; i + count <= m; i += count) block(k, scale, a + i * step, lda, b, ldb, c + i * ldc, ldc);
  };
  rows(Level::template block<6, COLUMNS, ADD, FORM>, 6);
  rows(Level::template block<4, COLUMNS, ADD, FORM>, 4);
  rows(Level::template block<2, COLUMNS, ADD, FORM>, 2);
  rows(Level::template block<1, COLUMNS, ADD, FORM>, 1);
}

template <class Level, bool ADD, A FORM>
void product(int64_t m, int64_t n, int64_t k, float scale, const float* a, int64_t lda, const float* b, int64_t ldb,
             float* c, int64_t ldc) {
  constexpr int WIDE = Level::LANES, HALF = std::min(WIDE, 32), NARROW = std::min(WIDE, int(kGemmLanes));
  int64_t j = 0;
  for (; j + WIDE <= n; j += WIDE) columns<Level, WIDE, ADD, FORM>(m, k, scale, a, lda, b + j, ldb, c + j, ldc);
  for (; j + HALF <= n; j += HALF) columns<Level, HALF, ADD, FORM>(m, k, scale, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; j += NARROW) columns<Level, NARROW, ADD, FORM>(m, k, scale, a, lda, b + j, ldb, c + j, ldc);
}

using Product = decltype(&product<Portable, false, A::plain>);
struct Products {
  Product set[2], add[2];  // by A
};

template <class Level>
constexpr Products PRODUCTS = {{product<Level, false, A::plain>, product<Level, false, A::transposed>},
                               {product<Level, true, A::plain>, product<Level, true, A::transposed>}};

const Products& products() {
  switch (float_isa()) {
#ifdef FASTLM_HAS_CLONES
    case Isa::v4:
      return PRODUCTS<V4>;
    case Isa::v3:
      return PRODUCTS<V3>;
#endif
    default:
      return PRODUCTS<Portable>;
  }
}

}  // namespace

void gemm(A form, int64_t m, int64_t n, int64_t k, float scale, const float* a, int64_t lda, const float* b,
          int64_t ldb, float* c, int64_t ldc) {
  products().set[int(form)](m, n, k, scale, a, lda, b, ldb, c, ldc);
}

void gemm_add(A form, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc) {
  products().add[int(form)](m, n, k, 1.0f, a, lda, b, ldb, c, ldc);
}

}  // namespace fastlm::cpu
