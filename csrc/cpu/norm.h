// The statistics of a row, for the ops with a norm in them.
#pragma once

#include "simd.h"

namespace fastlm::cpu {

// x̂ = (h - mean) rstd - offset. `mean` is rounded; offset is the mean of (h - mean) rstd, what the rounding lost. Far
// from 0 it matters: at a mean of 100, half a unit in the last place is 4e-6. rms: mean and offset are 0.
struct Statistics {
  float mean, offset, rstd;

  __attribute__((always_inline)) float normalize(float h) const { return (h - mean) * rstd - offset; }
};

// The statistics of h (cols,), whose sum is given, in one more pass. The squares are of h - mean, so nothing cancels
// but the square of what the mean's rounding lost.
FASTLM_INLINE Statistics statistics(const float* h, int64_t cols, float sum, float eps, bool rms) {
  constexpr int64_t kSums = 64;  // four vectors of AVX-512: an addition does not wait for the one before
  const float mean = rms ? 0.0f : sum / float(cols);
  alignas(64) float rests[kSums] = {}, squares[kSums] = {};
  int64_t begin = 0;
  for (; begin + kSums <= cols; begin += kSums) {
#pragma omp simd
    for (int64_t l = 0; l < kSums; ++l) {
      const float d = h[begin + l] - mean;
      rests[l] += d;
      squares[l] += d * d;
    }
  }
  for (int64_t l = 0; begin + l < cols; ++l) {
    const float d = h[begin + l] - mean;
    rests[l] += d;
    squares[l] += d * d;
  }
  float rest = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : rest, square)
  for (int64_t l = 0; l < kSums; ++l) {
    rest += rests[l];
    square += squares[l];
  }
  const float lost = rms ? 0.0f : rest / float(cols), variance = square / float(cols) - lost * lost;
  const float rstd = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps);
  return {mean, lost * rstd, rstd};
}

// The same without the sum.
FASTLM_INLINE Statistics statistics(const float* h, int64_t cols, float eps, bool rms) {
  float sum = 0.0f;
  if (!rms) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) sum += h[j];
  }
  return statistics(h, cols, sum, eps, rms);
}

// Statistics are saved as mean (2, rows), the means and then the offsets, null for rms, and rstd (rows,).
FASTLM_INLINE void save(const Statistics& s, int64_t row, int64_t rows, float* mean, float* rstd) {
  if (mean) mean[row] = s.mean, mean[rows + row] = s.offset;
  rstd[row] = s.rstd;
}

FASTLM_INLINE Statistics saved(const float* mean, const float* rstd, int64_t row, int64_t rows) {
  return mean ? Statistics{mean[row], mean[rows + row], rstd[row]} : Statistics{0.0f, 0.0f, rstd[row]};
}

}  // namespace fastlm::cpu
