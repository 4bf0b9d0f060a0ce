#pragma once

#include <vector>

#include "ops.h"

namespace fastlm::cpu {

// n contiguous floats.
struct Span {
  const float* data;
  int64_t n;
};

// Σ x² over all of them.
double squared_norm(const std::vector<Span>& spans, int threads);

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// w, g, m, v: n floats each, in the same order. step: the number of updates, raised here. group: index of the
// AdamWGroup.
struct AdamWTensor {
  float* w;
  const float* g;
  float *m, *v, *step;
  int64_t n, group;
};

// The gradient of every tensor is g / grad_scale; g is not changed.
void adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
           int threads);

}  // namespace fastlm::cpu
