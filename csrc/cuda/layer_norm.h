#pragma once

#include "ops.h"

namespace fastlm::cuda {

// Shapes: x, residual, h, y (rows, cols); weight, bias (cols,), float32 or of x's dtype; rstd (rows,), mean (2, rows)
// float32: x̂ = (h - mean) rstd - offset, the means and then the offsets, which are what the rounding of the means lost.
// residual, weight, bias, h and mean may be null. Without h, h = x is not written. Without mean it is rms_norm.
struct LayerNormForward {
  const void *x, *residual, *weight, *bias;
  void *h, *y;
  float *mean, *rstd;
  int64_t rows, cols, stride_x, stride_residual;
  float eps;
  bool weight_is_float, bias_is_float;
  Dropout dropout;
  bool wide;  // set by layer_norm_fwd: all rows are aligned to 16 bytes
};

// dy, dh (the gradient of h besides the one through y; may be null), h (rows, cols) in;
// dresidual (rows, cols) and, under dropout, dx (rows, cols) out; dweight (cols,) in weight's dtype, dbias (cols,)
// float32, or null. partial: (2, partial_rows(device), cols) float32 scratch.
struct LayerNormBackward {
  const void *dy, *dh, *h, *weight;
  const float *mean, *rstd;
  void *dresidual, *dx, *dweight;
  float *dbias, *partial;
  int64_t rows, cols, stride_dy, stride_dh, stride_h;
  bool weight_is_float;
  Dropout dropout;
  bool wide;  // set by layer_norm_bwd
};

void layer_norm_fwd(const LayerNormForward& args, DType dtype, Place place);
void layer_norm_bwd(const LayerNormBackward& args, DType dtype, Place place);

}  // namespace fastlm::cuda
