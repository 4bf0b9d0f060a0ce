// lamb: the update of a whole list of tensors. The maths: fastlm/train/lamb.py.
//
// The size of a step is known only after all of a tensor's direction r is. So there are two passes over the blocks of
// all tensors: the first makes m and v, and sums w² and r²; the second computes r again from m and v, which takes less
// time than to write r and read it back, and makes w. The sums do not depend on the number of threads.
#include "lamb.h"

#include <cmath>

#include "moments.h"

namespace fastlm::cpu {
namespace {

struct Factors {
  Moments moments;
  float mean, variance, eps, decay;  // 1 / (1 - beta^step) of m and v
};

struct Squares {
  double w, r;
};

FASTLM_INLINE float direction(float w, float m, float v, const Factors& f) {
  return m * f.mean / (std::sqrt(v * f.variance) + f.eps) + f.decay * w;
}

// m and v of a block. Returns its Σ w² and Σ r².
template <class G>
FASTLM_CLONES Squares begin_block(const float* __restrict w, const G* __restrict g, float* __restrict m,
                                  float* __restrict v, int64_t n, const Factors f) {
  double sum_w[LANES] = {}, sum_r[LANES] = {};
  for (int64_t p = 0; p < n; p += PIECE) {
    const int64_t end = std::min(n, p + PIECE);
    float lane_w[LANES] = {}, lane_r[LANES] = {};
    int64_t j = p;
    for (; j + LANES <= end; j += LANES) {
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) {
        float mj = m[j + l], vj = v[j + l];
        f.moments.add(load(g + j + l), mj, vj);
        m[j + l] = mj;
        v[j + l] = vj;
        const float wj = w[j + l], r = direction(wj, mj, vj, f);
        lane_w[l] += wj * wj;
        lane_r[l] += r * r;
      }
    }
    for (int64_t l = 0; j + l < end; ++l) {
      f.moments.add(load(g + j + l), m[j + l], v[j + l]);
      const float wj = w[j + l], r = direction(wj, m[j + l], v[j + l], f);
      lane_w[l] += wj * wj;
      lane_r[l] += r * r;
    }
    for (int64_t l = 0; l < LANES; ++l) {
      sum_w[l] += lane_w[l];
      sum_r[l] += lane_r[l];
    }
  }
  Squares total{0.0, 0.0};
  for (int64_t l = 0; l < LANES; ++l) {
    total.w += sum_w[l];
    total.r += sum_r[l];
  }
  return total;
}

template <bool LOW>
FASTLM_CLONES void end_block(float* __restrict w, const float* __restrict m, const float* __restrict v,
                             bfloat16* __restrict low, int64_t n, float step, const Factors f) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float wj = w[j] - step * direction(w[j], m[j], v[j], f);
    w[j] = wj;
    if constexpr (LOW) store(low + j, wj);
  }
}

}  // namespace

void lamb(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
          int threads) {
  std::vector<Factors> factors;
  std::vector<int64_t> of;  // the tensor of each block
  for (size_t i = 0; i < tensors.size(); ++i) {
    const AdamWTensor& t = tensors[i];
    const AdamWGroup& a = groups.at(t.group);
    const double step = *t.step += 1.0f;
    factors.push_back({Moments(a, grad_scale), float(1.0 / (1.0 - std::pow(a.beta1, step))),
                       float(1.0 / (1.0 - std::pow(a.beta2, step))), float(a.eps), float(a.weight_decay)});
    of.insert(of.end(), (t.n + BLOCK - 1) / BLOCK, int64_t(i));
  }
  std::vector<Squares> blocks(of.size()), totals(tensors.size(), Squares{0.0, 0.0});
  for_blocks(tensors, threads, [&](int64_t b, size_t i, int64_t begin) {
    const AdamWTensor& t = tensors[i];
    const int64_t n = std::min(BLOCK, t.n - begin);
    blocks[b] = t.gradient == DType::f32 ? begin_block(t.w + begin, static_cast<const float*>(t.g) + begin, t.m + begin,
                                                       t.v + begin, n, factors[i])
                                         : begin_block(t.w + begin, static_cast<const bfloat16*>(t.g) + begin,
                                                       t.m + begin, t.v + begin, n, factors[i]);
  });
  for (size_t b = 0; b < of.size(); ++b) {
    totals[of[b]].w += blocks[b].w;
    totals[of[b]].r += blocks[b].r;
  }
  for_blocks(tensors, threads, [&](int64_t, size_t i, int64_t begin) {
    const AdamWTensor& t = tensors[i];
    const AdamWGroup& a = groups[t.group];
    const bool scaled = a.weight_decay != 0.0 && totals[i].w > 0.0 && totals[i].r > 0.0;
    const float step = float(a.lr * (scaled ? std::sqrt(totals[i].w / totals[i].r) : 1.0));
    const int64_t n = std::min(BLOCK, t.n - begin);
    if (t.low) {
      end_block<true>(t.w + begin, t.m + begin, t.v + begin, t.low + begin, n, step, factors[i]);
    } else {
      end_block<false>(t.w + begin, t.m + begin, t.v + begin, nullptr, n, step, factors[i]);
    }
  });
}

}  // namespace fastlm::cpu
