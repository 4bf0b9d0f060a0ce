#pragma once

#include "ops.h"

namespace fastlm::cpu {

// x, y (rows, cols).
struct DropoutForward {
  const void* x;
  void* y;
  int64_t rows, cols, stride_x;
  bool relu;
  Dropout dropout;
};

// dy in, dx out. With relu, y (rows, cols) is the forward's output and rng is not read; else y is null.
struct DropoutBackward {
  const void *dy, *y;
  void* dx;
  int64_t rows, cols, stride_dy;
  bool relu;
  Dropout dropout;
};

void dropout_fwd(const DropoutForward& args, DType dtype, int threads);
void dropout_bwd(const DropoutBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
