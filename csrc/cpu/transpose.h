#pragma once

#include "ops.h"

namespace fastlm::cpu {

// y (cols, rows) = the transpose of x (rows, cols), of elements of 16 bits.
struct Transpose {
  const uint16_t* x;
  uint16_t* y;
  int64_t rows, cols, stride_x;
};

void transpose16(const Transpose& args, int threads);

}  // namespace fastlm::cpu
