// Philox4x32-10 on many counters at once, and the dropout of a row made of it.
#pragma once

#include <algorithm>

#include "ops.h"
#include "philox.h"
#include "simd.h"

namespace fastlm::cpu {

constexpr int64_t kLanes = 256;  // 4 KB of counters: they stay in the first-level cache

struct alignas(64) Lanes {
  uint32_t word[4][kLanes];
};

// Turns the counters word[0..3][i], i < n, into their random words, in place. n is at most kLanes. The rest of the last
// sixteen is overwritten.
void philox_many(Lanes& lanes, int64_t n, Key key);

// Counters (c0 + row, c1 + column, c2, 0) of `rows` rows of `columns` columns, a multiple of 16; kLanes at most in all.
struct PhiloxBlock {
  int64_t rows, columns;
  uint32_t c0, c1, c2;
};

// Their random words, row by row.
void philox_block(Lanes& lanes, const PhiloxBlock& block, Key key);

// Multiplies v[0..cols) by 0 or scale. Word j%4 of counter (j/4, row, row>>32, 0) decides column j. threshold > 0.
FASTLM_INLINE void drop_row(float* v, int64_t row, int64_t cols, const Dropout& dropout, Key key) {
  Lanes lanes;
  // 32-bit compares with threshold - 1 take half the time of 64-bit ones with threshold.
  const uint32_t last = uint32_t(dropout.threshold - 1);
  const float scale = dropout.scale;
  for (int64_t begin = 0; begin < cols; begin += 4 * kLanes) {
    const int64_t n = std::min(4 * kLanes, cols - begin), quads = n / 4;
    for (int64_t q = 0; q < (n + 3) / 4; ++q) {
      lanes.word[0][q] = uint32_t(begin / 4 + q);
      lanes.word[1][q] = uint32_t(row);
      lanes.word[2][q] = uint32_t(uint64_t(row) >> 32);
      lanes.word[3][q] = 0;
    }
    philox_many(lanes, (n + 3) / 4, key);
    float* here = v + begin;
#pragma omp simd
    for (int64_t q = 0; q < quads; ++q) {
      here[4 * q + 0] = lanes.word[0][q] <= last ? 0.0f : here[4 * q + 0] * scale;
      here[4 * q + 1] = lanes.word[1][q] <= last ? 0.0f : here[4 * q + 1] * scale;
      here[4 * q + 2] = lanes.word[2][q] <= last ? 0.0f : here[4 * q + 2] * scale;
      here[4 * q + 3] = lanes.word[3][q] <= last ? 0.0f : here[4 * q + 3] * scale;
    }
    for (int64_t j = 4 * quads; j < n; ++j) here[j] = lanes.word[j % 4][quads] <= last ? 0.0f : here[j] * scale;
  }
}

}  // namespace fastlm::cpu
