// y = act(x + bias) * gate, forward and backward, for every activation of the form act(h) = h cdf(h): the normal cdf is
// gelu's, the logistic one silu's.
//
// Every input is read once and every output written once. A row goes through in pieces. Without a bias, a piece of
// zeros takes its place; without a dbias, its sums go to a piece that is not read.
#pragma once

#include "math.h"
#include "ops.h"
#include "parallel.h"
#include "partials.h"

namespace fastlm::cpu {

// Shapes: x, gate, y (rows, cols); bias (cols,) float32. A null pointer stands for what is absent: bias, gate.
struct ActivationForward {
  const void* x;
  const float* bias;
  const void* gate;
  void* y;
  int64_t rows, cols, stride_x, stride_gate;
};

// dy, x, gate (rows, cols) in; dx, dgate (rows, cols) out, dgate null without a gate; dbias (cols,) float32 or null.
// partial: (row_blocks(rows), cols) float32 scratch where there is a dbias.
struct ActivationBackward {
  const void *dy, *x;
  const float* bias;
  const void* gate;
  void *dx, *dgate;
  float *dbias, *partial;
  int64_t rows, cols, stride_dy, stride_x, stride_gate;
};

// act(h) = h cdf, and its derivative. A Form below has `static Activation at(float h)`.
struct Activation {
  float cdf, slope;
};

constexpr int64_t kPiece = 1024;  // 4 KB of float stay in the first-level cache
alignas(64) inline const float kNoBias[kPiece] = {};

template <class T, class Form>
FASTLM_CLONES void activation_fwd_rows(const ActivationForward& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; c += kPiece) {
      const int64_t n = std::min(kPiece, a.cols - c);
      const T* x = static_cast<const T*>(a.x) + r * a.stride_x + c;
      const float* bias = a.bias ? a.bias + c : kNoBias;
      T* y = static_cast<T*>(a.y) + r * a.cols + c;
      if (a.gate) {
        const T* gate = static_cast<const T*>(a.gate) + r * a.stride_gate + c;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j];
          store(y + j, h * Form::at(h).cdf * load(gate + j));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j];
          store(y + j, h * Form::at(h).cdf);
        }
      }
    }
  }
}

// One block of rows; `partial` is its own (cols,) sum of dx, set here, or null.
template <class T, class Form>
FASTLM_CLONES void activation_bwd_rows(const ActivationBackward& a, int64_t begin, int64_t end, float* partial) {
  alignas(64) float unread[kPiece] = {};
  if (partial) std::fill(partial, partial + a.cols, 0.0f);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; c += kPiece) {
      const int64_t n = std::min(kPiece, a.cols - c);
      const T* dy = static_cast<const T*>(a.dy) + r * a.stride_dy + c;
      const T* x = static_cast<const T*>(a.x) + r * a.stride_x + c;
      const float* bias = a.bias ? a.bias + c : kNoBias;
      T* dx = static_cast<T*>(a.dx) + r * a.cols + c;
      float* dbias = partial ? partial + c : unread;
      if (a.gate) {
        const T* gate = static_cast<const T*>(a.gate) + r * a.stride_gate + c;
        T* dgate = static_cast<T*>(a.dgate) + r * a.cols + c;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float h = load(x + j) + bias[j], d = load(dy + j);
          const Activation g = Form::at(h);
          const float dh = d * g.slope * load(gate + j);
          store(dgate + j, d * h * g.cdf);
          store(dx + j, dh);
          dbias[j] += dh;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float dh = load(dy + j) * Form::at(load(x + j) + bias[j]).slope;
          store(dx + j, dh);
          dbias[j] += dh;
        }
      }
    }
  }
}

template <class T, class Form>
void activation_fwd(const ActivationForward& a, int threads) {
  parallel_for(a.rows, grain_of(a.cols), threads,
               [&](int64_t begin, int64_t end) { activation_fwd_rows<T, Form>(a, begin, end); });
}

template <class T, class Form>
void activation_bwd(const ActivationBackward& a, int threads) {
  const int64_t blocks = row_blocks(a.rows);
  parallel_for(blocks, grain_of(a.rows / blocks * a.cols), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* partial = a.dbias ? a.partial + b * a.cols : nullptr;
      activation_bwd_rows<T, Form>(a, a.rows * b / blocks, a.rows * (b + 1) / blocks, partial);
    }
  });
  if (a.dbias) sum_partials(a.partial, blocks, a.cols, a.dbias);
}

}  // namespace fastlm::cpu
