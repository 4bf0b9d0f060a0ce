// layer_norm and rms_norm: h = residual + dropout(x); y = norm(h) * weight + bias. The maths: fastlm/ops/layer_norm.py.
//
// Forward reads x and residual once and writes h and y once; a row stays in the first-level cache between the passes
// over it. Backward reads dy and h once. Weight gradients are summed in fixed blocks of rows; at the end the blocks are
// added in order.
#include "layer_norm.h"

#include "norm.h"
#include "parallel.h"
#include "partials.h"
#include "philox_many.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

template <class T>
FASTLM_CLONES void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end, float* row_h) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.stride_x;
    const T* residual = static_cast<const T*>(a.residual) + (a.residual ? r * a.stride_residual : 0);
    T* h = static_cast<T*>(a.h) + (a.h ? r * cols : 0);
    T* y = static_cast<T*>(a.y) + r * cols;

#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) row_h[j] = load(x + j);
    if (a.dropout.threshold) drop_row(row_h, r, cols, a.dropout, key);
    if (a.residual) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row_h[j] += load(residual + j);
    }
    // Statistics of h as it is stored: backward reads h back and normalises the same numbers.
    if (a.h) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) {
        store(h + j, row_h[j]);
        row_h[j] = load(h + j);
      }
    }

    const Statistics s = statistics(row_h, cols, a.eps, a.rms);
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

// One block of rows. dweight and dbias are the block's (cols,) partial sums, set here.
template <class T>
FASTLM_CLONES void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias,
                                 float* row_d) {
  const int64_t cols = a.cols;
  const Key key = a.dropout.threshold ? dropout_key(a.dropout.rng, a.dropout.site) : Key{0, 0};
  for (int64_t j = 0; j < cols; ++j) dweight[j] = dbias[j] = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.stride_dy;
    const T* dh = static_cast<const T*>(a.dh) + (a.dh ? r * a.stride_dh : 0);
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
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      row_d[j] = s.rstd * (row_d[j] - mean_g - s.normalize(load(h + j)) * mean_gx);
    }
    if (a.dh) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row_d[j] += load(dh + j);
    }
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) store(dresidual + j, row_d[j]);
    if (a.dropout.threshold) {
      T* dx = static_cast<T*>(a.dx) + r * cols;
      drop_row(row_d, r, cols, a.dropout, key);
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(dx + j, row_d[j]);
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
  const int64_t blocks = row_blocks(a.rows);
  float* dbias = a.partial + blocks * a.cols;
  parallel_for(blocks, grain_of(a.rows / blocks * a.cols), threads, [&](int64_t begin, int64_t end) {
    const auto row_d = scratch<float>(a.cols);
    for (int64_t b = begin; b < end; ++b) {
      backward_rows<T>(a, a.rows * b / blocks, a.rows * (b + 1) / blocks, a.partial + b * a.cols, dbias + b * a.cols,
                       row_d.get());
    }
  });
  if (a.dweight) sum_partials(a.partial, blocks, a.cols, a.dweight);
  if (a.dbias) sum_partials(dbias, blocks, a.cols, a.dbias);
}

}  // namespace

void layer_norm_fwd(const LayerNormForward& args, DType dtype, int threads) {
  dtype == DType::f32 ? forward<float>(args, threads) : forward<bfloat16>(args, threads);
}

void layer_norm_bwd(const LayerNormBackward& args, DType dtype, int threads) {
  dtype == DType::f32 ? backward<float>(args, threads) : backward<bfloat16>(args, threads);
}

}  // namespace fastlm::cpu
