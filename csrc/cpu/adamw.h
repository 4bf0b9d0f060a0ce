#pragma once

#include <vector>

#include "ops.h"

namespace fastlm::cpu {

// n floats, one behind the other.
struct Span {
  const float* data;
  int64_t n;
};

// Σ x² over all of `spans`.
double squared_norm(const std::vector<Span>& spans, int threads);

// How a group of tensors is updated; the maths: fastlm/train/adamw.py.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// w, g, m, v: n floats each, in one order. step: updates so far, raised here.
struct AdamWTensor {
  float* w;
  const float* g;
  float *m, *v, *step;
  int64_t n, group;
};

// Gradients are divided by grad_scale as they are read; `g` stays as it is.
void adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups, double grad_scale,
           int threads);

}  // namespace fastlm::cpu
