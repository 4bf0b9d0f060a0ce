// A block of ROWS weight rows and BATCH rows of x keeps ROWS x BATCH vectors of sums in registers. The lanes are
// columns, so weights in torch's own layout are read in place; a sum across lanes follows at the end of a row. Eight
// rows of x in two passes of 6 x 4 sums took 5 to 20% less time than in one of 3 x 8.
#include "matvec.h"

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "isa.h"
#include "parallel.h"

namespace fastlm::cpu {
namespace {

// A range is read as this many runs of memory at once: rows that are summed together lie a twelfth of the range apart.
// The machine's prefetch ends at a page, and a page walk of one run then stands in the way of no other. Two cores of a
// virtual machine (Xeon with AMX) read 19 GB/s in one run, 21 with a prefetch by software, 24 in 4 runs, 32 in 12.
constexpr int64_t RUNS = 12;

template <int LANES>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * LANES)));
  typedef int32_t Int __attribute__((vector_size(4 * LANES)));
};

// A vector of stored words holds PARTS weights in each lane: the p-th belongs to column p cols / PARTS + lane. `load`
// takes them apart, times 1 / UNIT; `at` is one weight. Vectors are passed by reference: how they would be passed by
// value depends on the machine code's level.
struct F32 {
  static constexpr int PARTS = 1;
  static constexpr float UNIT = 1.0f;
  template <int L>
  FASTLM_INLINE void load(const char* w, typename Vector<L>::Float* part) {
    std::memcpy(part, w, sizeof *part);
  }
  FASTLM_INLINE float at(const char* w, int) { return *reinterpret_cast<const float*>(w); }
};

struct Bf16 {
  static constexpr int PARTS = 2;
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
  static constexpr int PARTS = 4;
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
FASTLM_INLINE void sum_block(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* y,
                             int64_t ldy, int64_t step) {
  using Float = typename Vector<L>::Float;
  Float sum[ROWS][BATCH];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BATCH; ++b) sum[r][b] = Float{};
  }
  const int64_t n = cols / W::PARTS;
  int64_t c = 0;
  for (; c + L <= n; c += L) {
    Float part[ROWS][W::PARTS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) W::template load<L>(w + r * stride + c * 4, part[r]);
#pragma GCC unroll 4
    for (int p = 0; p < W::PARTS; ++p) {
#pragma GCC unroll 8
      for (int b = 0; b < BATCH; ++b) {
        Float column;
        std::memcpy(&column, x + b * ldx + p * n + c, sizeof column);
#ifdef FASTLM_HAS_CLONES
        if constexpr (L == 16) asm("" : "+v"(column));  // in a register, else GCC loads it anew for each of the rows
#endif
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) sum[r][b] += part[r][p] * column;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BATCH; ++b) {
      float total = W::UNIT * sum_lanes<L>(sum[r][b]);
      for (int64_t rest = c; rest < n; ++rest) {
        for (int p = 0; p < W::PARTS; ++p) {
          total += W::at(w + r * stride + rest * 4, p) * x[b * ldx + p * n + rest];
        }
      }
      y[b * ldy + r * step] = total;
    }
  }
}

// One function per machine code, as in gemm.cpp.
#define FASTLM_LEVEL(name, lanes, registers, attributes)                                                             \
  struct name {                                                                                                      \
    static constexpr int LANES = lanes, REGISTERS = registers;                                                       \
    template <class W, int ROWS, int BATCH>                                                                          \
    attributes static void block(const char* w, int64_t stride, int64_t cols, const float* x, int64_t ldx, float* y, \
                                 int64_t ldy, int64_t step) {                                                        \
      sum_block<W, LANES, ROWS, BATCH>(w, stride, cols, x, ldx, y, ldy, step);                                       \
    }                                                                                                                \
    attributes static uint32_t read(const char* data, int64_t bytes) {                                               \
      constexpr int64_t LINE = 64, PART = LINE / int64_t(sizeof(typename Vector<LANES>::Int));                       \
      const int64_t run = bytes / (READS * LINE) * LINE;                                                             \
      typename Vector<LANES>::Int sum[READS] = {}, next;                                                             \
      for (int64_t i = 0; i < run; i += LINE) {                                                                      \
        for (int j = 0; j < READS; ++j) {                                                                            \
          for (int p = 0; p < PART; ++p) {                                                                           \
            std::memcpy(&next, data + j * run + i + p * sizeof next, sizeof next), sum[j] += next;                   \
          }                                                                                                          \
        }                                                                                                            \
      }                                                                                                              \
      uint32_t total = 0;                                                                                            \
      for (int j = 0; j < READS; ++j) {                                                                              \
        for (int l = 0; l < LANES; ++l) total += uint32_t(sum[j][l]);                                                \
      }                                                                                                              \
      return total;                                                                                                  \
    }                                                                                                                \
  };

constexpr int READS = 8;  // runs of memory that `read` goes through at once
FASTLM_LEVEL(Portable, 8, 16, __attribute__((noinline)))
#ifdef FASTLM_HAS_CLONES
FASTLM_LEVEL(V3, 8, 16, __attribute__((noinline, target("arch=x86-64-v3"))))
FASTLM_LEVEL(V4, 16, 32, __attribute__((noinline, target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif

// The rows of a block: a divisor of RUNS, such that the sums, the weights and a column of x fit the registers.
constexpr int block_rows(int registers, int batch, int parts) {
  for (int rows = RUNS; rows > 1; --rows) {
    if (RUNS % rows == 0 && rows * (batch + parts) < registers) return rows;
  }
  return 1;
}

// `count` rows of weights, `stride` bytes apart, for BATCH rows of x at a time, from b on. step: between their sums.
template <class Level, class W, int BATCH>
void batches(int64_t& b, int64_t batch, const char* w, int64_t stride, int64_t cols, int64_t count, const float* x,
             int64_t ldx, float* y, int64_t ldy, int64_t step) {
  constexpr int ROWS = block_rows(Level::REGISTERS, BATCH, W::PARTS);
  for (; b + BATCH <= batch; b += BATCH) {
    float* const to = y + b * ldy;
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) {
      Level::template block<W, ROWS, BATCH>(w + r * stride, stride, cols, x + b * ldx, ldx, to + r * step, ldy, step);
    }
    for (; r < count; ++r) {
      Level::template block<W, 1, BATCH>(w + r * stride, stride, cols, x + b * ldx, ldx, to + r * step, ldy, step);
    }
  }
}

template <class Level, class W>
void times(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t batch, float* sums,
           int64_t ld) {
  const auto group = [&](int64_t first, int64_t count, int64_t apart) {
    const char* w = static_cast<const char*>(m.data) + first * m.row_bytes();
    const int64_t stride = apart * m.row_bytes();
    float* y = sums + (first - begin);
    int64_t b = 0;
    batches<Level, W, 4>(b, batch, w, stride, m.cols, count, x, ldx, y, ld, apart);
    batches<Level, W, 2>(b, batch, w, stride, m.cols, count, x, ldx, y, ld, apart);
    batches<Level, W, 1>(b, batch, w, stride, m.cols, count, x, ldx, y, ld, apart);
  };
  const int64_t apart = (end - begin) / RUNS;
  for (int64_t i = 0; i < apart; ++i) group(begin + i, RUNS, apart);
  if (const int64_t rest = end - begin - apart * RUNS) group(end - rest, rest, 1);
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
