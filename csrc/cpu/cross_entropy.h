#pragma once

#include "ops.h"

namespace fastlm::cpu {

// Shapes: logits, dlogits (rows, vocabulary), of one dtype; target, loss, dloss (rows,); weight (vocabulary,) float32,
// or null for ones.
struct CrossEntropy {
  const void* logits;
  const int64_t* target;
  const float* weight;
  const float* dloss;  // factors of the rows' gradients; null: ones
  float* loss;         // not reduced
  void* dlogits;       // gradient of Σ dloss loss / denominator; null: none; may be the logits themselves
  int64_t rows, vocabulary, stride_x, stride_dx, ignore_index;
  float label_smoothing, z_loss;
  double denominator;
};

struct TargetCount {
  int64_t outside;  // the first row whose target is neither a class nor ignore_index; -1: none
  double weight;    // Σ of the targets' weights, the denominator of "mean"
};

TargetCount cross_entropy_count(const int64_t* target, const float* weight, int64_t rows, int64_t vocabulary,
                                int64_t ignore_index);

// Returns Σ loss / denominator, summed in the order of the rows. cross_entropy_count must have accepted the targets.
double cross_entropy_fwd(const CrossEntropy& args, DType dtype, int threads);

// out = dlogits * dloss, both (rows, cols), out may be dlogits; dloss is (rows,), or one number for all rows.
struct CrossEntropyBackward {
  const void* dlogits;
  const float* dloss;
  void* out;
  int64_t rows, cols, stride_x, stride_y;
  bool per_row;
};

void cross_entropy_bwd(const CrossEntropyBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
