#pragma once

#include <utility>

#include "ops.h"

namespace fastlm::cpu {

// Shapes: logits, dlogits (rows, vocabulary), of one dtype; target, loss, dloss (rows,); weight (vocabulary,) float32,
// or null for ones.
struct CrossEntropy {
  const void* logits;
  const int64_t* target;
  const float* weight;
  const float* dloss;   // factors of the rows' gradients; null: ones
  float* loss;          // not reduced
  float *z, *accuracy;  // z_loss lse², and 1 where the target's logit is the first of the greatest; null: neither
  void* dlogits;        // gradient of Σ dloss loss / denominator; null: none; may be the logits themselves
  int64_t rows, vocabulary, stride_x, stride_dx, ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap: the logits are softcap tanh(x / softcap); 0: x
  double denominator;
};

struct TargetCount {
  int64_t outside;  // the first row whose target is neither a class nor ignore_index; -1: none
  double weight;    // Σ of the targets' weights, the denominator of "mean"
};

TargetCount cross_entropy_count(const int64_t* target, const float* weight, int64_t rows, int64_t vocabulary,
                                int64_t ignore_index);

// Returns Σ loss / denominator and Σ z / denominator (0 without z), summed in the order of the rows.
// cross_entropy_count must have accepted the targets.
std::pair<double, double> cross_entropy_fwd(const CrossEntropy& args, DType dtype, int threads);

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
