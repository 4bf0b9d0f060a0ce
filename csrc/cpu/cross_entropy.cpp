// cross_entropy: loss and gradient of a row in one pass over its logits. The maths: fastlm/ops/cross_entropy.py.
//
// There are three sweeps over a row: the maximum; exp(x - maximum), summed and written to the gradient's place; the
// gradient. The first sweep reads the logits from memory. The others find the row in the second-level cache (120 KB for
// BERT's vocabulary). So memory is read once and written once, and an element costs one exp. A running maximum over
// blocks in the first-level cache, non-temporal stores and prefetches of the next row were no faster.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "math.h"
#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t BLOCK = 4096;  // elements that are summed in float; the sums of blocks are added in double

template <class T>
FASTLM_INLINE float row_max(const T* x, int64_t n) {
  constexpr int64_t kMaxima = 64;  // four vectors of AVX-512: a comparison does not wait for the one before
  alignas(64) float most[kMaxima];
  std::fill(most, most + kMaxima, -std::numeric_limits<float>::infinity());
  int64_t begin = 0;
  for (; begin + kMaxima <= n; begin += kMaxima) {
#pragma omp simd
    for (int64_t l = 0; l < kMaxima; ++l) {
      const float v = load(x + begin + l);
      most[l] = v > most[l] ? v : most[l];  // a NaN is left to the exponentials
    }
  }
  for (int64_t l = 0; begin + l < n; ++l) most[l] = load(x + begin + l) > most[l] ? load(x + begin + l) : most[l];
  float m = most[0];
#pragma omp simd reduction(max : m)
  for (int64_t l = 0; l < kMaxima; ++l) m = most[l] > m ? most[l] : m;
  return m;
}

// Σ exp(x - m), each stored in e.
template <class T>
FASTLM_INLINE float block_exp(const T* x, int64_t n, float m, float* e) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const float v = fast_exp(load(x + j) - m);
    e[j] = v;
    sum += v;
  }
  return sum;
}

template <class T>
FASTLM_INLINE float block_exp(const T* x, int64_t n, float m) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += fast_exp(load(x + j) - m);
  return sum;
}

// Σ w (m - x); w null: 1.
template <class T>
FASTLM_INLINE float block_distance(const T* x, const float* w, int64_t n, float m) {
  float sum = 0.0f;
  if (w) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += w[j] * (m - load(x + j));
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += m - load(x + j);
  }
  return sum;
}

// Where a row's exponentials are stored: in the gradient if that is float, else in scratch.
FASTLM_INLINE float* waiting(float* dx, float*) { return dx; }
FASTLM_INLINE float* waiting(bfloat16*, float* row) { return row; }

// 1 if x[t] is the first of the greatest of x (n,), else 0.
template <class T>
FASTLM_INLINE float is_first_maximum(const T* x, int64_t n, int64_t t) {
  const float x_t = load(x + t);
  int beaten = 0;
#pragma omp simd reduction(| : beaten)
  for (int64_t j = 0; j < t; ++j) beaten |= !(load(x + j) < x_t);
#pragma omp simd reduction(| : beaten)
  for (int64_t j = t; j < n; ++j) beaten |= !(load(x + j) <= x_t);
  return beaten ? 0.0f : 1.0f;
}

// y = cap tanh(x / cap), and slope = dy/dx = 1 - tanh², from e = exp(-2|x / cap|): 1 - t² would cancel.
template <class T>
FASTLM_INLINE void cap_row(const T* x, int64_t n, float cap, float* y, float* slope) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float u = load(x + j) / cap, e = fast_exp(-2.0f * std::fabs(u));
    y[j] = cap * fast_tanh(u);
    slope[j] = 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
}

// dx = (e factor - uniform w) slope; w, slope null: 1.
template <class T>
FASTLM_INLINE void row_gradient(const float* e, float factor, float uniform, const float* w, const float* slope,
                                int64_t n, T* dx) {
  if (slope) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(dx + j, (e[j] * factor - uniform * (w ? w[j] : 1.0f)) * slope[j]);
  } else if (w) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(dx + j, e[j] * factor - uniform * w[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(dx + j, e[j] * factor - uniform);
  }
}

// Row r, whose logits are x (vocabulary,), or where there is a softcap their capped values, with `slope` the
// derivatives. weight_sum: Σ weight. The exponentials are stored in e; dx null: no gradient, and no e.
template <class X, class T>
FASTLM_INLINE void forward_row(const CrossEntropy& a, int64_t r, double weight_sum, const X* x, const float* slope,
                               float* e, T* dx) {
  const int64_t V = a.vocabulary, t = a.target[r];
  const float smooth = a.label_smoothing, each = smooth / float(V);
  const float x_t = load(x + t), w_t = a.weight ? a.weight[t] : 1.0f;
  const float m = row_max(x, V);
  double sum = 0.0, distance = 0.0;  // Σ exp(x - m), Σ w (m - x)
  for (int64_t j = 0; j < V; j += BLOCK) {
    const int64_t n = std::min(BLOCK, V - j);
    if (smooth > 0.0f) distance += block_distance(x + j, a.weight ? a.weight + j : nullptr, n, m);
    sum += dx ? block_exp(x + j, n, m, e + j) : block_exp(x + j, n, m);
  }
  const float log_sum = float(std::log(sum)), lse = m + log_sum;
  float loss = (1.0f - smooth) * w_t * ((m - x_t) + log_sum) + a.z_loss * lse * lse;
  if (smooth > 0.0f) loss += float(double(each) * (distance + weight_sum * log_sum));
  a.loss[r] = loss;
  if (a.z) a.z[r] = a.z_loss * lse * lse;
  if (!dx) return;

  const float scale = float((a.dloss ? a.dloss[r] : 1.0f) / a.denominator);
  const float one_hot = scale * (1.0f - smooth) * w_t, uniform = scale * each;
  const double all = one_hot + uniform * weight_sum + 2.0 * scale * a.z_loss * lse;
  const float factor = float(all / sum);
  const float dx_t = (e[t] * factor - (a.weight ? uniform * w_t : uniform) - one_hot) * (slope ? slope[t] : 1.0f);
  row_gradient(e, factor, uniform, smooth > 0.0f ? a.weight : nullptr, slope, V, dx);
  store(dx + t, dx_t);
}

// row_e (vocabulary,), row_y (2, vocabulary): scratch.
template <class T>
FASTLM_CLONES void forward_rows(const CrossEntropy& a, int64_t begin, int64_t end, double weight_sum, float* row_e,
                                float* row_y) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.logits) + r * a.stride_x;
    T* dx = a.dlogits ? static_cast<T*>(a.dlogits) + r * a.stride_dx : nullptr;
    if (a.target[r] == a.ignore_index) {
      a.loss[r] = 0.0f;
      if (a.z) a.z[r] = a.accuracy[r] = 0.0f;
      if (dx) std::memset(static_cast<void*>(dx), 0, size_t(a.vocabulary) * sizeof(T));
      continue;
    }
    if (a.accuracy) a.accuracy[r] = is_first_maximum(x, a.vocabulary, a.target[r]);
    float* e = dx ? waiting(dx, row_e) : nullptr;
    if (a.softcap > 0.0f) {
      float* slope = row_y + a.vocabulary;
      cap_row(x, a.vocabulary, a.softcap, row_y, slope);
      forward_row(a, r, weight_sum, static_cast<const float*>(row_y), slope, e, dx);
    } else {
      forward_row(a, r, weight_sum, x, nullptr, e, dx);
    }
  }
}

template <class T>
FASTLM_CLONES void scale_row(const T* x, float factor, int64_t n, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(y + j, load(x + j) * factor);
}

template <class T>
void forward(const CrossEntropy& a, int threads) {
  double weight_sum = double(a.vocabulary);
  if (a.weight) {
    weight_sum = 0.0;
    for (int64_t j = 0; j < a.vocabulary; ++j) weight_sum += a.weight[j];
  }
  const bool waits = a.dlogits && sizeof(T) < sizeof(float);
  parallel_for(a.rows, grain_of(a.vocabulary), threads, [&](int64_t begin, int64_t end) {
    const auto row_e = scratch<float>(waits ? a.vocabulary : 0);
    const auto row_y = scratch<float>(a.softcap > 0.0f ? 2 * a.vocabulary : 0);
    forward_rows<T>(a, begin, end, weight_sum, row_e.get(), row_y.get());
  });
}

template <class T>
void backward(const CrossEntropyBackward& a, int threads) {
  if (a.out == a.dlogits && !a.per_row && *a.dloss == 1.0f) return;
  parallel_for(a.rows, grain_of(a.cols), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      scale_row(static_cast<const T*>(a.dlogits) + r * a.stride_x, a.dloss[a.per_row ? r : 0], a.cols,
                static_cast<T*>(a.out) + r * a.stride_y);
    }
  });
}

}  // namespace

TargetCount cross_entropy_count(const int64_t* target, const float* weight, int64_t rows, int64_t vocabulary,
                                int64_t ignore_index) {
  TargetCount count{-1, 0.0};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = target[r];
    if (t == ignore_index) continue;
    if (t < 0 || t >= vocabulary) return {r, 0.0};
    count.weight += weight ? weight[t] : 1.0f;
  }
  return count;
}

std::pair<double, double> cross_entropy_fwd(const CrossEntropy& args, DType dtype, int threads) {
  dtype == DType::f32 ? forward<float>(args, threads) : forward<bfloat16>(args, threads);
  double sum = 0.0, z = 0.0;
  for (int64_t r = 0; r < args.rows; ++r) sum += args.loss[r];
  for (int64_t r = 0; args.z && r < args.rows; ++r) z += args.z[r];
  return {sum / args.denominator, z / args.denominator};
}

void cross_entropy_bwd(const CrossEntropyBackward& args, DType dtype, int threads) {
  dtype == DType::f32 ? backward<float>(args, threads) : backward<bfloat16>(args, threads);
}

}  // namespace fastlm::cpu
