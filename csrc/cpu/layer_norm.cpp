// layer_norm and rms_norm: h = residual + dropout(x); y = norm(h) * weight + bias. The maths: fastlm/ops/layer_norm.py.
//
// Forward reads x and residual once and writes h and y once; a row stays in the first-level cache between the passes
// over it. Backward reads dy and h once. Gradients that are sums over rows are summed in fixed blocks of rows; at the
// end the blocks are added in order.
#include "layer_norm.h"

#include "norm.h"
#include "parallel.h"
#include "partials.h"
#include "philox_many.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

// row (cols,) = x + residual, rounded to T, which is stored in h too; returns its sum. Without h, which there is
// wherever there is a residual, row is x. x may be row.
template <class X, class T>
FASTLM_INLINE float take_row(const X* x, const T* residual, int64_t cols, T* h, float* row) {
  float sum = 0.0f;
  if (!h) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      row[j] = load(x + j);
      sum += row[j];
    }
    return sum;
  }
  // Statistics of h as it is stored: backward reads h back and normalises the same numbers.
  if (residual) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      store(h + j, load(x + j) + load(residual + j));
      row[j] = load(h + j);
      sum += row[j];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < cols; ++j) {
      store(h + j, load(x + j));
      row[j] = load(h + j);
      sum += row[j];
    }
  }
  return sum;
}

template <class T>
FASTLM_CLONES void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end, float* row_h) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.stride_x;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.stride_residual : nullptr;
    T* h = a.h ? static_cast<T*>(a.h) + r * cols : nullptr;
    T* y = static_cast<T*>(a.y) + r * cols;

    float sum;
    if (a.dropout.threshold) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row_h[j] = load(x + j);
      drop_row(row_h, r, cols, a.dropout, key);
      sum = take_row(row_h, residual, cols, h, row_h);
    } else {
      sum = take_row(x, residual, cols, h, row_h);
    }
    const Statistics s = statistics(row_h, cols, sum, a.eps, a.rms);
    save(s, r, a.rows, a.mean, a.rstd);

    if (a.weight && a.bias) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(y + j, s.normalize(row_h[j]) * a.weight[j] + a.bias[j]);
    } else if (a.weight) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(y + j, s.normalize(row_h[j]) * a.weight[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(y + j, s.normalize(row_h[j]));
    }
  }
}

// to (cols,) = dh = rstd (g - mean_g - x̂ mean_gx), plus dh from elsewhere unless it is null. With KEEP also to g, in
// float.
template <bool KEEP, class T>
FASTLM_INLINE void row_gradient(const Statistics& s, float mean_g, float mean_gx, const T* h, const T* dh, int64_t cols,
                                float* g, T* to) {
  if (dh) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const float d = s.rstd * (g[j] - mean_g - s.normalize(load(h + j)) * mean_gx) + load(dh + j);
      store(to + j, d);
      if constexpr (KEEP) g[j] = d;
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const float d = s.rstd * (g[j] - mean_g - s.normalize(load(h + j)) * mean_gx);
      store(to + j, d);
      if constexpr (KEEP) g[j] = d;
    }
  }
}

// The partial sums of a block of rows, (cols,) each; sum_dx: null where it is not wanted.
struct Sums {
  float *dweight, *dbias, *sum_dx;
};

// One block of rows, whose sums are set here.
template <class T>
FASTLM_CLONES void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, const Sums& sums,
                                 float* row_d) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  float *dweight = sums.dweight, *dbias = sums.dbias, *sum_dx = sums.sum_dx;
  std::fill(dweight, dweight + cols, 0.0f);
  std::fill(dbias, dbias + cols, 0.0f);
  if (sum_dx) std::fill(sum_dx, sum_dx + cols, 0.0f);
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.stride_dy;
    const T* dh = a.dh ? static_cast<const T*>(a.dh) + r * a.stride_dh : nullptr;
    const T* h = static_cast<const T*>(a.h) + r * a.stride_h;
    T* dresidual = static_cast<T*>(a.dresidual) + r * cols;
    const Statistics s = saved(a.mean, a.rstd, r, a.rows);

    // With g = dy weight:  dh = rstd (g - mean(g) - x̂ mean(g x̂)); rms has no mean(g).
    float sum_g = 0.0f, sum_gx = 0.0f;
    if (a.weight) {
#pragma omp simd reduction(+ : sum_g, sum_gx)
      for (int64_t j = 0; j < cols; ++j) {
        const float d = load(dy + j), xhat = s.normalize(load(h + j)), g = d * a.weight[j];
        sum_g += g;
        sum_gx += g * xhat;
        row_d[j] = g;
        dweight[j] += d * xhat;
        dbias[j] += d;
      }
    } else {
#pragma omp simd reduction(+ : sum_g, sum_gx)
      for (int64_t j = 0; j < cols; ++j) {
        const float g = load(dy + j), xhat = s.normalize(load(h + j));
        sum_g += g;
        sum_gx += g * xhat;
        row_d[j] = g;
      }
    }
    const float mean_g = a.rms ? 0.0f : sum_g / float(cols), mean_gx = sum_gx / float(cols);
    if (a.dropout.threshold || sum_dx) {
      row_gradient<true>(s, mean_g, mean_gx, h, dh, cols, row_d, dresidual);
    } else {
      row_gradient<false>(s, mean_g, mean_gx, h, dh, cols, row_d, dresidual);
    }
    if (a.dropout.threshold) {
      T* dx = static_cast<T*>(a.dx) + r * cols;
      drop_row(row_d, r, cols, a.dropout, key);
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(dx + j, row_d[j]);
    }
    if (sum_dx) {  // before dx is rounded
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) sum_dx[j] += row_d[j];
    }
  }
}

template <class T>
void forward(const LayerNormForward& a, int threads) {
  parallel_for(a.rows, grain_of(a.cols), threads, [&](int64_t begin, int64_t end) {
    const auto row_h = scratch<float>(a.cols);
    forward_rows<T>(a, begin, end, row_h.get());
  });
}

template <class T>
void backward(const LayerNormBackward& a, int threads) {
  const int64_t blocks = row_blocks(a.rows), size = blocks * a.cols;
  parallel_for(blocks, grain_of(a.rows / blocks * a.cols), threads, [&](int64_t begin, int64_t end) {
    const auto row_d = scratch<float>(a.cols);
    for (int64_t b = begin; b < end; ++b) {
      float* partial = a.partial + b * a.cols;
      const Sums sums{partial, partial + size, a.sum_dx ? partial + 2 * size : nullptr};
      backward_rows<T>(a, a.rows * b / blocks, a.rows * (b + 1) / blocks, sums, row_d.get());
    }
  });
  float* const totals[] = {a.dweight, a.dbias, a.sum_dx};
  for (int k = 0; k < 3; ++k) {
    if (totals[k]) sum_partials(a.partial + k * size, blocks, a.cols, totals[k]);
  }
}

}  // namespace

void layer_norm_fwd(const LayerNormForward& args, DType dtype, int threads) {
  dtype == DType::f32 ? forward<float>(args, threads) : forward<bfloat16>(args, threads);
}

void layer_norm_bwd(const LayerNormBackward& args, DType dtype, int threads) {
  dtype == DType::f32 ? backward<float>(args, threads) : backward<bfloat16>(args, threads);
}

}  // namespace fastlm::cpu
