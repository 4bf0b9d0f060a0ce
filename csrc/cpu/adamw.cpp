// adamw: the update of a whole list of tensors, and the norm of their gradients. The maths: fastlm/train/adamw.py.
//
// Both are memory-bound: the norm reads the gradients, the update reads four tensors and writes three. A copy of the
// weights in bfloat16, which the next step multiplies, is written with them: to cast them later would read them once
// more. Tensors are cut into blocks, and one parallel region shares out the blocks of all tensors. A small tensor needs
// no region of its own, and no result depends on the number of threads.
#include "adamw.h"

#include <cmath>

#include "moments.h"

namespace fastlm::cpu {
namespace {

template <class T>
FASTLM_CLONES double block_squares(const T* x, int64_t n) {
  double sum[LANES] = {};
  for (int64_t p = 0; p < n; p += PIECE) {
    const int64_t end = std::min(n, p + PIECE);
    float lane[LANES] = {};
    int64_t j = p;
    for (; j + LANES <= end; j += LANES) {
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) lane[l] += load(x + j + l) * load(x + j + l);
    }
    for (int64_t l = 0; j + l < end; ++l) lane[l] += load(x + j + l) * load(x + j + l);
    for (int64_t l = 0; l < LANES; ++l) sum[l] += lane[l];
  }
  double total = 0.0;
  for (int64_t l = 0; l < LANES; ++l) total += sum[l];
  return total;
}

struct Factors {
  Moments moments;
  float decay, root, eps, step;
};

template <bool LOW, class G>
FASTLM_INLINE void update_at(float* w, const G* g, float* m, float* v, bfloat16* low, int64_t j, const Factors& f) {
  float mj = m[j], vj = v[j];
  f.moments.add(load(g + j), mj, vj);
  m[j] = mj;
  v[j] = vj;
  const float wj = f.decay * w[j] - f.step * mj / (std::sqrt(vj) * f.root + f.eps);
  w[j] = wj;
  if constexpr (LOW) store(low + j, wj);
}

template <bool LOW, class G>
FASTLM_CLONES void update(float* __restrict w, const G* __restrict g, float* __restrict m, float* __restrict v,
                          bfloat16* __restrict low, int64_t n, const Factors f) {
  int64_t begin = 0;
  for (; begin + LINE <= n; begin += LINE) {
    for (const float* p : {w, m, v}) __builtin_prefetch(p + begin + AHEAD);
    __builtin_prefetch(g + begin + AHEAD);
#pragma omp simd
    for (int64_t j = begin; j < begin + LINE; ++j) update_at<LOW>(w, g, m, v, low, j, f);
  }
  for (int64_t j = begin; j < n; ++j) update_at<LOW>(w, g, m, v, low, j, f);
}

template <class G>
void update_block(const AdamWTensor& t, int64_t begin, const Factors& f) {
  const G* g = static_cast<const G*>(t.g) + begin;
  const int64_t n = std::min(BLOCK, t.n - begin);
  if (t.low) {
    update<true>(t.w + begin, g, t.m + begin, t.v + begin, t.low + begin, n, f);
  } else {
    update<false>(t.w + begin, g, t.m + begin, t.v + begin, nullptr, n, f);
  }
}

}  // namespace

double squared_norm(const std::vector<Span>& spans, int threads) {
  int64_t blocks = 0;
  for (const Span& s : spans) blocks += (s.n + BLOCK - 1) / BLOCK;
  const auto partial = scratch<double>(blocks);
  for_blocks(spans, threads, [&](int64_t b, size_t i, int64_t begin) {
    const Span& s = spans[i];
    const int64_t n = std::min(BLOCK, s.n - begin);
    partial[b] = s.dtype == DType::f32 ? block_squares(static_cast<const float*>(s.data) + begin, n)
                                       : block_squares(static_cast<const bfloat16*>(s.data) + begin, n);
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
    const double step = *t.step += 1.0f;
    factors.push_back({Moments(a, grad_scale), float(1.0 - a.lr * a.weight_decay),
                       float(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step))), float(a.eps),
                       float(a.lr / (1.0 - std::pow(a.beta1, step)))});
  }
  for_blocks(tensors, threads, [&](int64_t, size_t i, int64_t begin) {
    const AdamWTensor& t = tensors[i];
    t.gradient == DType::f32 ? update_block<float>(t, begin, factors[i]) : update_block<bfloat16>(t, begin, factors[i]);
  });
}

}  // namespace fastlm::cpu
