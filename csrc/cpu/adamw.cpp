// adamw: the update of a whole list of tensors, and the norm of their gradients. The maths: fastlm/train/adamw.py.
//
// Both are bound by memory: the norm reads a gradient, the update reads four tensors and writes three. Tensors are cut
// into blocks, and all blocks of all tensors are shared out in one parallel region, so that biases cost none of their
// own and no result depends on the number of threads.
#include "adamw.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t BLOCK = 16384;  // elements
constexpr int64_t LANES = 64;  // sums of squares side by side: four vectors of AVX-512, to hide an addition's latency
constexpr int64_t AHEAD = 1024;
constexpr int64_t PIECE = 2048;  // elements whose squares are added in float, 32 a lane; pieces are added in double

// The blocks of a list of tensors, numbered through. run calls f(block, tensor, its first element in the tensor).
class Blocks {
 public:
  template <class T>
  explicit Blocks(const std::vector<T>& tensors) : first_(tensors.size() + 1) {
    for (size_t i = 0; i < tensors.size(); ++i) first_[i + 1] = first_[i] + (tensors[i].n + BLOCK - 1) / BLOCK;
  }

  int64_t count() const { return first_.back(); }

  template <class F>
  void run(int threads, F f) const {
    parallel_for(count(), 1, threads, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t b = begin; b < end; ++b) {
        while (b == first_[i + 1]) ++i;
        f(b, i, (b - first_[i]) * BLOCK);
      }
    });
  }

 private:
  std::vector<int64_t> first_;  // block of each tensor, and the number of blocks
};

FASTLM_CLONES double block_squares(const float* x, int64_t n) {
  double sum[LANES] = {};
  for (int64_t p = 0; p < n; p += PIECE) {
    const int64_t end = std::min(n, p + PIECE);
    float lane[LANES] = {};
    int64_t j = p;
    for (; j + LANES <= end; j += LANES) {
      for (int64_t l = 0; l < LANES; l += 16) __builtin_prefetch(x + j + l + AHEAD);  // one stream: 13 to 14.5 GB/s
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) lane[l] += x[j + l] * x[j + l];
    }
    for (int64_t l = 0; j < end; ++j, ++l) lane[l] += x[j] * x[j];
#pragma omp simd
    for (int64_t l = 0; l < LANES; ++l) sum[l] += lane[l];
  }
  double total = 0.0;
  for (int64_t l = 0; l < LANES; ++l) total += sum[l];
  return total;
}

struct Factors {
  float gradient, decay, momentum, beta1, beta2, square, root, eps, step;
};

FASTLM_CLONES void update(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                          int64_t n, const Factors f) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float gj = g[j] * f.gradient;
    const float mj = m[j] + f.momentum * (gj - m[j]);
    const float vj = f.beta2 * v[j] + f.square * (gj * gj);
    m[j] = mj;
    v[j] = vj;
    w[j] = w[j] * f.decay - f.step * mj / (std::sqrt(vj) * f.root + f.eps);
  }
}

}  // namespace

double squared_norm(const std::vector<Span>& spans, int threads) {
  const Blocks blocks(spans);
  std::vector<double> partial(blocks.count());
  blocks.run(threads, [&](int64_t b, size_t i, int64_t begin) {
    partial[b] = block_squares(spans[i].data + begin, std::min(BLOCK, spans[i].n - begin));
  });
  double sum = 0.0;
  for (const double p : partial) sum += p;
  return sum;
}

void adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
           int threads) {
  std::vector<Factors> factors;
  for (const AdamWTensor& t : tensors) {
    const AdamWGroup& a = groups.at(t.group);
    const double step = *t.step += 1.0f;
    factors.push_back({float(1.0 / grad_scale), float(1.0 - a.lr * a.weight_decay), float(1.0 - a.beta1),
                       float(a.beta1), float(a.beta2), float(1.0 - a.beta2),
                       float(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step))), float(a.eps),
                       float(a.lr / (1.0 - std::pow(a.beta1, step)))});
  }
  Blocks(tensors).run(threads, [&](int64_t, size_t i, int64_t begin) {
    const AdamWTensor& t = tensors[i];
    update(t.w + begin, t.g + begin, t.m + begin, t.v + begin, std::min(BLOCK, t.n - begin), factors[i]);
  });
}

}  // namespace fastlm::cpu
