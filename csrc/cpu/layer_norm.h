#pragma once

#include "ops.h"

namespace fastlm::cpu {

// Shapes: x, residual, h, y (rows, cols); weight, bias (cols,) float32; rstd (rows,), mean (2, rows) float32,
// as in norm.h.
// residual, weight, bias and h may be null. Without h, h = x is not written.
struct LayerNormForward {
  const void *x, *residual;
  const float *weight, *bias;
  void *h, *y;
  float *mean, *rstd;
  int64_t rows, cols, stride_x, stride_residual;
  float eps;
  bool rms;  // no mean, no bias
  Dropout dropout;
};

// dy, dh (the gradient of h besides the one through y; may be null), h (rows, cols) in;
// dresidual (rows, cols) and, under dropout, dx (rows, cols) out; dweight, dbias, sum_dx (Σ dx over rows),
// each (cols,) float32 or null. partial: (3, row_blocks(rows), cols) float32 scratch, (2, ...) without sum_dx.
struct LayerNormBackward {
  const void *dy, *dh, *h;
  const float *weight, *mean, *rstd;
  void *dresidual, *dx;
  float *dweight, *dbias, *sum_dx, *partial;
  int64_t rows, cols, stride_dy, stride_dh, stride_h;
  bool rms;
  Dropout dropout;
};

void layer_norm_fwd(const LayerNormForward& args, DType dtype, int threads);
void layer_norm_bwd(const LayerNormBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
