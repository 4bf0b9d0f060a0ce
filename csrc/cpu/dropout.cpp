// dropout: y = dropout(x) or dropout(max(x, 0)), forward and backward. The maths: fastlm/ops/dropout.py.
//
// Each row is converted to a float buffer, which stays in the first-level cache between the passes over it.
#include "dropout.h"

#include "parallel.h"
#include "philox_many.h"
#include "simd.h"

namespace fastlm::cpu {
namespace {

// to = dropout(from), or dropout(max(from, 0)), of rows [begin, end).
template <class T>
FASTLM_CLONES void drop_rows(const T* from, int64_t stride, T* to, int64_t cols, bool relu, const Dropout& dropout,
                             int64_t begin, int64_t end, float* row) {
  const Key key = dropout.threshold ? dropout_key(dropout.rng, dropout.site) : Key{0, 0};
  for (int64_t r = begin; r < end; ++r) {
    const T* x = from + r * stride;
    T* y = to + r * cols;
    if (relu) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row[j] = load(x + j) < 0.0f ? 0.0f : load(x + j);  // NaN stays NaN
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) row[j] = load(x + j);
    }
    if (dropout.threshold) drop_row(row, r, cols, dropout, key);
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) store(y + j, row[j]);
  }
}

template <class T>
FASTLM_CLONES void relu_gradient(const DropoutBackward& a, int64_t begin, int64_t end) {
  const float scale = a.dropout.scale;
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = static_cast<const T*>(a.dy) + r * a.stride_dy;
    const T* y = static_cast<const T*>(a.y) + r * a.cols;
    T* dx = static_cast<T*>(a.dx) + r * a.cols;
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) store(dx + j, load(y + j) <= 0.0f ? 0.0f : load(dy + j) * scale);
  }
}

template <class T>
void drop(const void* from, int64_t stride, void* to, int64_t rows, int64_t cols, bool relu, const Dropout& dropout,
          int threads) {
  parallel_for(rows, grain_of(cols), threads, [&](int64_t begin, int64_t end) {
    const auto row = scratch<float>(cols);
    drop_rows(static_cast<const T*>(from), stride, static_cast<T*>(to), cols, relu, dropout, begin, end, row.get());
  });
}

template <class T>
void backward(const DropoutBackward& a, int threads) {
  if (!a.relu) return drop<T>(a.dy, a.stride_dy, a.dx, a.rows, a.cols, false, a.dropout, threads);
  parallel_for(a.rows, grain_of(a.cols), threads, [&](int64_t begin, int64_t end) { relu_gradient<T>(a, begin, end); });
}

}  // namespace

void dropout_fwd(const DropoutForward& a, DType dtype, int threads) {
  const auto run = dtype == DType::f32 ? drop<float> : drop<bfloat16>;
  run(a.x, a.stride_x, a.y, a.rows, a.cols, a.relu, a.dropout, threads);
}

void dropout_bwd(const DropoutBackward& a, DType dtype, int threads) {
  dtype == DType::f32 ? backward<float>(a, threads) : backward<bfloat16>(a, threads);
}

}  // namespace fastlm::cpu
