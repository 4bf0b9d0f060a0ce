// A block of ROWS weight rows and BATCH rows of x keeps ROWS x BATCH vectors of sums in registers. The lanes are
// columns, so weights in torch's own layout are read in place; a sum across lanes follows at the end of a row. Under
// AVX-512, 3 x 8 sums took 10 to 30% less time than 2 x 8 for rows of x that do not fit the first-level cache.
#include "matvec.h"

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

// Bytes between a load and its prefetch, which is in the order of memory: the rows of a block are too short, and too
// many on a page, for the machine's own prefetch. One core, int8, 768 columns: 12 GB/s, 5 without, and 15 of a plain
// read.
// Into the second-level cache, since x fills the first: eight rows of x, float32, 9.4 GB/s; 7.3 with 4 KB into the
// first.
constexpr int64_t AHEAD = 16384;
constexpr int64_t kGroup = 12;  // rows: what one block reads is in the first-level cache for further rows of x

template <int LANES>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * LANES)));
  typedef int32_t Int __attribute__((vector_size(4 * LANES)));
};

// A vector of stored words holds PARTS weights in each lane: the p-th belongs to column p cols / PARTS + lane. `load`
// takes them apart, times 1 / UNIT; `at` is one weight. Vectors are passed by reference: how they would be passed by
// value depends on the machine code's level.
struct F32 {
  static constexpr int PARTS = 1, MOST_ROWS = 6;
  static constexpr float UNIT = 1.0f;
  template <int L>
  FASTLM_INLINE void load(const char* w, typename Vector<L>::Float* part) {
    std::memcpy(part, w, sizeof *part);
  }
  FASTLM_INLINE float at(const char* w, int) { return *reinterpret_cast<const float*>(w); }
};

struct Bf16 {
  static constexpr int PARTS = 2, MOST_ROWS = 6;
  static constexpr float UNIT = 1.0f;
  template <int L>
  FASTLM_INLINE void load(const char* w, typename Vector<L>::Float* part) {
    typename Vector<L>::Int word;
    std::memcpy(&word, w, sizeof word);
    part[0] = reinterpret_cast<typename Vector<L>::Float>(word << 16);
    part[1] = reinterpret_cast<typename Vector<L>::Float>(word & HIGH_HALF);
  }
  FASTLM_INLINE float at(const char* w, int p) { return cpu::load(reinterpret_cast<const bfloat16*>(w) + p); }

 private:
  static constexpr int32_t HIGH_HALF = int32_t(0xFFFF0000);
};

struct I8 {
  static constexpr int PARTS = 4, MOST_ROWS = 4;  // 16 vectors of weights in registers
  static constexpr float UNIT = 1.0f / (1 << 24);
  template <int L>
  FASTLM_INLINE void load(const char* w, typename Vector<L>::Float* part) {
    typename Vector<L>::Int word;
    std::memcpy(&word, w, sizeof word);
    part[0] = __builtin_convertvector(word << 24, typename Vector<L>::Float);
    part[1] = __builtin_convertvector((word << 16) & HIGH_BYTE, typename Vector<L>::Float);
    part[2] = __builtin_convertvector((word << 8) & HIGH_BYTE, typename Vector<L>::Float);
    part[3] = __builtin_convertvector(word & HIGH_BYTE, typename Vector<L>::Float);
  }
  FASTLM_INLINE float at(const char* w, int p) { return float(reinterpret_cast<const int8_t*>(w)[p]); }

 private:
  static constexpr int32_t HIGH_BYTE = int32_t(0xFF000000);
};

template <int L>
FASTLM_INLINE float sum_lanes(const typename Vector<L>::Float& v) {
  if constexpr (L == 1) {
    return v[0];
  } else if constexpr (L == 2) {
    return v[0] + v[1];
  } else {
    typename Vector<L / 2>::Float low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes<L / 2>(low + high);
  }
}

template <class W, int L, int ROWS, int BATCH>
FASTLM_INLINE void sum_block(const char* w, int64_t row_bytes, int64_t cols, const float* x, int64_t ldx, float* y,
                             int64_t ldy) {
  using Float = typename Vector<L>::Float;
  Float sum[ROWS][BATCH];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BATCH; ++b) sum[r][b] = Float{};
  }
  const int64_t n = cols / W::PARTS;
  int64_t c = 0;
  for (; c + L <= n; c += L) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(w + AHEAD + (c * ROWS + r * L) * 4, 0, 2);
    Float part[ROWS][W::PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) W::template load<L>(w + r * row_bytes + c * 4, part[r]);
#pragma GCC unroll 4
    for (int p = 0; p < W::PARTS; ++p) {
#pragma GCC unroll 8
      for (int b = 0; b < BATCH; ++b) {
        Float column;
        std::memcpy(&column, x + b * ldx + p * n + c, sizeof column);
#ifdef FASTLM_HAS_CLONES
        if constexpr (L == 16) asm("" : "+v"(column));  // in a register, else GCC loads it anew for each of the rows
#endif
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sum[r][b] += part[r][p] * column;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BATCH; ++b) {
      float total = W::UNIT * sum_lanes<L>(sum[r][b]);
      for (int64_t rest = c; rest < n; ++rest) {
        for (int p = 0; p < W::PARTS; ++p) {
          total += W::at(w + r * row_bytes + rest * 4, p) * x[b * ldx + p * n + rest];
        }
      }
      y[b * ldy + r] = total;
    }
  }
}

// One function per machine code, as in gemm.cpp.
#define FASTLM_LEVEL(name, lanes, sums, attributes)                                                               \
  struct name {                                                                                                   \
    static constexpr int LANES = lanes, SUMS = sums;                                                              \
    template <class W, int ROWS, int BATCH>                                                                       \
    attributes static void block(const char* w, int64_t row_bytes, int64_t cols, const float* x, int64_t ldx,     \
                                 float* y, int64_t ldy) {                                                         \
      sum_block<W, LANES, ROWS, BATCH>(w, row_bytes, cols, x, ldx, y, ldy);                                       \
    }                                                                                                             \
    attributes static uint32_t read(const char* data, int64_t bytes) {                                            \
      typename Vector<LANES>::Int sum[4] = {}, next;                                                              \
      for (int64_t i = 0; i + int64_t(sizeof sum) <= bytes; i += sizeof sum) {                                    \
        for (int j = 0; j < 4; ++j) std::memcpy(&next, data + i + j * sizeof next, sizeof next), sum[j] += next;  \
      }                                                                                                           \
      uint32_t total = 0;                                                                                         \
      for (int j = 0; j < LANES; ++j) total += uint32_t(sum[0][j] + sum[1][j]) + uint32_t(sum[2][j] + sum[3][j]); \
      return total;                                                                                               \
    }                                                                                                             \
  };

FASTLM_LEVEL(Portable, 8, 8, __attribute__((noinline)))
#ifdef FASTLM_HAS_CLONES
FASTLM_LEVEL(V3, 8, 8, __attribute__((noinline, target("arch=x86-64-v3"))))
FASTLM_LEVEL(V4, 16, 24, __attribute__((noinline, target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif

// `count` <= kGroup rows of weights, for BATCH rows of x at a time, from b on.
template <class Level, class W, int BATCH>
void batches(int64_t& b, int64_t batch, const char* w, int64_t row_bytes, int64_t cols, int64_t count, const float* x,
             int64_t ldx, float* y, int64_t ldy) {
  constexpr int ROWS = std::min<int>(W::MOST_ROWS, Level::SUMS / BATCH);
  for (; b + BATCH <= batch; b += BATCH) {
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) {
      Level::template block<W, ROWS, BATCH>(w + r * row_bytes, row_bytes, cols, x + b * ldx, ldx, y + b * ldy + r, ldy);
    }
    for (; r < count; ++r) {
      Level::template block<W, 1, BATCH>(w + r * row_bytes, row_bytes, cols, x + b * ldx, ldx, y + b * ldy + r, ldy);
    }
  }
}

template <class Level, class W>
void times(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t batch, float* sums,
           int64_t ld) {
  const int64_t row_bytes = m.row_bytes();
  for (int64_t r = begin; r < end; r += kGroup) {
    const char* w = static_cast<const char*>(m.data) + r * row_bytes;
    const int64_t count = std::min(kGroup, end - r);
    float* y = sums + (r - begin);
    int64_t b = 0;
    batches<Level, W, 8>(b, batch, w, row_bytes, m.cols, count, x, ldx, y, ld);
    batches<Level, W, 4>(b, batch, w, row_bytes, m.cols, count, x, ldx, y, ld);
    batches<Level, W, 2>(b, batch, w, row_bytes, m.cols, count, x, ldx, y, ld);
    batches<Level, W, 1>(b, batch, w, row_bytes, m.cols, count, x, ldx, y, ld);
  }
}

struct Kernels {
  decltype(&times<Portable, F32>) times[3];  // by WeightForm
  decltype(&Portable::read) read;
};

template <class Level>
constexpr Kernels KERNELS = {{times<Level, F32>, times<Level, Bf16>, times<Level, I8>}, Level::read};

const Kernels& kernels() {
  switch (float_isa()) {
#ifdef FASTLM_HAS_CLONES
    case Isa::v4:
      return KERNELS<V4>;
    case Isa::v3:
      return KERNELS<V3>;
#endif
    default:
      return KERNELS<Portable>;
  }
}

}  // namespace

int64_t operand_bytes(const Matrix& m, int64_t batch) { return amx_takes(m) ? amx_bytes(m, batch) : 0; }

Operand prepare(const Matrix& m, const float* x, int64_t ld, int64_t batch, char* memory) {
  if (!amx_takes(m)) return {x, ld, batch, nullptr};
  amx_columns(m, x, ld, batch, memory);
  return {x, ld, batch, memory};
}

void rows_times(const Matrix& m, int64_t begin, int64_t end, const Operand& x, float* sums, int64_t ld) {
  if (x.columns) {
    amx_times(m, begin, end, x.columns, x.batch, sums, ld);
  } else {
    kernels().times[int(m.form)](m, begin, end, x.x, x.ld, x.batch, sums, ld);
  }
}

int64_t read_memory(const void* data, int64_t bytes, int threads) {
  constexpr int64_t PIECE = 1 << 20;
  std::atomic<uint32_t> total{0};
  parallel_for((bytes + PIECE - 1) / PIECE, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * PIECE, last = std::min(bytes, end * PIECE);
    total += kernels().read(static_cast<const char*>(data) + first, last - first);
  });
  return total;
}

}  // namespace fastlm::cpu
