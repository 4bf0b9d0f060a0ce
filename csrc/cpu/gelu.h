#pragma once

#include "ops.h"

namespace fastlm::cpu {

// Shapes: x, gate, y (rows, cols); bias (cols,) float32. A null pointer stands for what is absent: bias, gate.
struct GeluForward {
  const void* x;
  const float* bias;
  const void* gate;
  void* y;
  int64_t rows, cols, stride_x, stride_gate;
  bool tanh;
};

// dy, x, gate (rows, cols) in; dx, dgate (rows, cols) out, dgate null without a gate; dbias (cols,) float32 or null.
// partial: (row_blocks(rows), cols) float32 scratch where there is a dbias.
struct GeluBackward {
  const void *dy, *x;
  const float* bias;
  const void* gate;
  void *dx, *dgate;
  float *dbias, *partial;
  int64_t rows, cols, stride_dy, stride_x, stride_gate;
  bool tanh;
};

void gelu_fwd(const GeluForward& args, DType dtype, int threads);
void gelu_bwd(const GeluBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
