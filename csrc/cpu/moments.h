// What the optimizers have in common: tensors cut into blocks, and the moments of a gradient.
#pragma once

#include <algorithm>
#include <vector>

#include "adamw.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu {

constexpr int64_t BLOCK = 16384;
// Squares that are summed in float, 32 in a lane. The sums of such pieces are added in double.
constexpr int64_t PIECE = 2048;
constexpr int64_t LANES = 64;   // four vectors of AVX-512: an addition does not wait for the previous one
constexpr int64_t LINE = 16;    // floats of a cache line
constexpr int64_t AHEAD = 256;  // prefetch distance: saves a tenth of an update's time

// Calls f(b, i, begin) for every block of every tensor. Block b, counted over all tensors, is [begin, begin + BLOCK) of
// tensor i.
template <class T, class F>
void for_blocks(const std::vector<T>& tensors, int threads, F f) {
  std::vector<int64_t> first{0};  // block of each tensor
  for (const T& t : tensors) first.push_back(first.back() + (t.n + BLOCK - 1) / BLOCK);
  parallel_for(first.back(), 1, threads, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t b = begin; b < end; ++b) {
      while (b >= first[i + 1]) ++i;
      f(b, i, (b - first[i]) * BLOCK);
    }
  });
}

struct Moments {
  float gradient, toward, beta2, square;
  bool from_m;  // m = m + toward (g - m), else g + toward (g - m): the form with the smaller rounding error

  Moments(const AdamWGroup& a, double grad_scale) {
    const double rest = 1.0 - a.beta1;
    gradient = float(1.0 / grad_scale);
    from_m = rest < 0.5;
    toward = float(from_m ? rest : rest - 1.0);
    beta2 = float(a.beta2);
    square = float(1.0 - a.beta2);
  }

  // m and v with the gradient g, which is not yet divided.
  __attribute__((always_inline)) void add(float g, float& m, float& v) const {
    g *= gradient;
    m = (from_m ? m : g) + toward * (g - m);
    v = beta2 * v + square * (g * g);
  }
};

}  // namespace fastlm::cpu
