#pragma once

#include "ops.h"

namespace fastlm::cuda {

constexpr int kLossParts = 64;  // the parts of a sum over the rows

// x, dx (rows, cols), of one dtype; target, loss, dloss (rows,); weight (cols,), weight_sum () float32, null for ones.
struct CrossEntropyForward {
  const void* x;
  const int64_t* target;
  const float *weight, *weight_sum;
  const float* parts;   // (kLossParts,): their sum is the denominator of "mean"; null: 1
  const float* dloss;   // factors of the rows' gradients; null: ones
  float* loss;          // not reduced; NaN for a target that is neither a class nor ignore_index
  float *z, *accuracy;  // z_loss lse², and 1 where the target's logit is the first of the greatest; null: neither
  void* dx;             // the gradient of Σ dloss loss / Σ parts; null: none; may be x
  int64_t rows, cols, stride_x, stride_dx, ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap: the logits are softcap tanh(x / softcap); 0: x
  int chunk;                               // set by cross_entropy_fwd: columns of a chunk in shared memory
};

void cross_entropy_fwd(const CrossEntropyForward& args, DType dtype, Place place);

// parts (kLossParts,) of Σ weight[target] over the targets that are classes and not ignored.
struct TargetCount {
  const int64_t* target;
  const float* weight;
  float* parts;
  int64_t rows, cols, ignore_index;
};

void cross_entropy_count(const TargetCount& args, Place place);

// out () = Σ loss / Σ parts; parts null: 1. scratch: (kLossParts,).
struct LossSum {
  const float *loss, *parts;
  float *scratch, *out;
  int64_t rows;
};

void cross_entropy_sum(const LossSum& args, Place place);

// y = x dloss, both (rows, cols), y may be x; dloss is (rows,), or one number for all rows.
struct CrossEntropyBackward {
  const void* x;
  const float* dloss;
  void* y;
  int64_t rows, cols, stride_x, stride_y;
  bool per_row;
};

void cross_entropy_bwd(const CrossEntropyBackward& args, DType dtype, Place place);

}  // namespace fastlm::cuda
