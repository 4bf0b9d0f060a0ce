#pragma once

#include "ops.h"
#include "simd.h"

namespace fastlm::cpu {

// Elements of one matrix, n of each, in one order.

// m = momentum m + g;  u = g + momentum m, where g is what it points to times `gradient`.
struct MuonDirection {
  const void* g;
  float* m;
  void* u;
  int64_t n;
  float gradient, momentum;
};

// w = decay w - step o, also to low, rounded to bfloat16, where it is not null.
struct MuonUpdate {
  float* w;
  const void* o;
  bfloat16* low;
  int64_t n;
  float decay, step;
};

// gradient: the dtype of g; dtype: of u and o.
void muon_direction(const MuonDirection& args, DType gradient, DType dtype, int threads);
void muon_update(const MuonUpdate& args, DType dtype, int threads);

}  // namespace fastlm::cpu
