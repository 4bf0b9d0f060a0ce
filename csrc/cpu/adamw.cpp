// adamw: the update of a whole list of tensors, and the norm of their gradients. The maths: fastlm/train/adamw.py.
//
// Both are memory-bound: the norm reads the gradients, the update reads four tensors and writes three. Tensors are cut
// into blocks, and one parallel region shares out the blocks of all tensors. A small tensor needs no region of its own,
// and no result depends on the number of threads.
#include "adamw.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t BLOCK = 16384;
// Squares that are summed in float, 32 in a lane. The sums of such pieces are added in double.
constexpr int64_t PIECE = 2048;
constexpr int64_t LANES = 64;   // four vectors of AVX-512: an addition does not wait for the previous one
constexpr int64_t LINE = 16;    // floats of a cache line
constexpr int64_t AHEAD = 256;  // prefetch distance: saves a tenth of the update's time, nothing of the norm's

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

FASTLM_CLONES double block_squares(const float* x, int64_t n) {
  double sum[LANES] = {};
  for (int64_t p = 0; p < n; p += PIECE) {
    const int64_t end = std::min(n, p + PIECE);
    float lane[LANES] = {};
    int64_t j = p;
    for (; j + LANES <= end; j += LANES) {
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) lane[l] += x[j + l] * x[j + l];
    }
    for (int64_t l = 0; j + l < end; ++l) lane[l] += x[j + l] * x[j + l];
    for (int64_t l = 0; l < LANES; ++l) sum[l] += lane[l];
  }
  double total = 0.0;
  for (int64_t l = 0; l < LANES; ++l) total += sum[l];
  return total;
}

struct Factors {
  float gradient, decay, toward, beta2, square, root, eps, step;
  bool from_m;  // m = m + toward (g - m), else g + toward (g - m): the form with the smaller rounding error
};

FASTLM_INLINE void update_at(float* w, const float* g, float* m, float* v, int64_t j, const Factors& f) {
  const float gj = g[j] * f.gradient;
  const float mj = (f.from_m ? m[j] : gj) + f.toward * (gj - m[j]);
  const float vj = f.beta2 * v[j] + f.square * (gj * gj);
  m[j] = mj;
  v[j] = vj;
  w[j] = f.decay * w[j] - f.step * mj / (std::sqrt(vj) * f.root + f.eps);
}

FASTLM_CLONES void update(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                          int64_t n, const Factors f) {
  int64_t begin = 0;
  for (; begin + LINE <= n; begin += LINE) {
    for (const float* p : {static_cast<const float*>(w), g, static_cast<const float*>(m), static_cast<const float*>(v)})
      __builtin_prefetch(p + begin + AHEAD);
#pragma omp simd
    for (int64_t j = begin; j < begin + LINE; ++j) update_at(w, g, m, v, j, f);
  }
  for (int64_t j = begin; j < n; ++j) update_at(w, g, m, v, j, f);
}

}  // namespace

double squared_norm(const std::vector<Span>& spans, int threads) {
  int64_t blocks = 0;
  for (const Span& s : spans) blocks += (s.n + BLOCK - 1) / BLOCK;
  const auto partial = scratch<double>(blocks);
  for_blocks(spans, threads, [&](int64_t b, size_t i, int64_t begin) {
    partial[b] = block_squares(spans[i].data + begin, std::min(BLOCK, spans[i].n - begin));
  });
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b];
  return sum;
}

void adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
           int threads) {
  std::vector<Factors> factors;
  for (const AdamWTensor& t : tensors) {
    const AdamWGroup& a = groups.at(t.group);
    const double step = *t.step += 1.0f, toward = 1.0 - a.beta1;
    Factors f;
    f.gradient = float(1.0 / grad_scale);
    f.decay = float(1.0 - a.lr * a.weight_decay);
    f.from_m = toward < 0.5;
    f.toward = float(f.from_m ? toward : toward - 1.0);
    f.beta2 = float(a.beta2);
    f.square = float(1.0 - a.beta2);
    f.root = float(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step)));
    f.eps = float(a.eps);
    f.step = float(a.lr / (1.0 - std::pow(a.beta1, step)));
    factors.push_back(f);
  }
  for_blocks(tensors, threads, [&](int64_t, size_t i, int64_t begin) {
    const AdamWTensor& t = tensors[i];
    update(t.w + begin, t.g + begin, t.m + begin, t.v + begin, std::min(BLOCK, t.n - begin), factors[i]);
  });
}

}  // namespace fastlm::cpu
