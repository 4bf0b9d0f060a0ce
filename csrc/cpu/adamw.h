#pragma once

#include <vector>

#include "ops.h"
#include "simd.h"

namespace fastlm::cpu {

// n contiguous elements.
struct Span {
  const void* data;
  int64_t n;
  DType dtype;
};

// Σ x² over all of them.
double squared_norm(const std::vector<Span>& spans, int threads);

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// w, g, m, v: n elements each, in the same order; g is of the dtype `gradient`, the others are float. low: where w is
// written rounded to bfloat16 too; null: nowhere. step: the number of updates, raised here. group: index of the
// AdamWGroup.
struct AdamWTensor {
  float* w;
  const void* g;
  float *m, *v, *step;
  bfloat16* low;
  int64_t n, group;
  DType gradient;
};

// The gradient of every tensor is g / grad_scale; g is not changed.
void adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
           int threads);

}  // namespace fastlm::cpu
