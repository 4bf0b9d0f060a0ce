#pragma once

#include "ops.h"

namespace fastlm::cpu {

// A table (.., cols) and the row of it that each token takes. ids null: token t takes row t % period.
// table null: there is no such table.
struct Lookup {
  const void* table;
  const int64_t* ids;
  int64_t stride, period;
};

// y (tokens, cols); weight, bias (cols,) float32 or null (without a weight there is no norm); rstd (tokens,),
// mean (2, tokens), as in norm.h, float32 with a norm. All ids must be inside their tables.
struct EmbeddingForward {
  Lookup lookup[3];  // word, position, type
  const float *weight, *bias;
  void* y;
  float *mean, *rstd;
  int64_t tokens, cols;
  float eps;
  Dropout dropout;
};

// The gradient of a table, (rows, cols) float32: dh is added to it, except to row `skip`. Null if it is not needed.
// ids: the row of each token; null: the table's own.
struct TableGradient {
  float* data;
  int64_t rows, skip;
  const int64_t* ids;
};

// dy (tokens, cols) in. dweight, dbias (cols,) float32 or null, set; the gradients of the tables, added to.
// dh: (tokens, cols) float32 scratch; partial: (2, row_blocks(tokens), cols) float32 scratch.
struct EmbeddingBackward {
  Lookup lookup[3];
  const void* dy;
  const float *weight, *mean, *rstd;
  float *dweight, *dbias, *dh, *partial;
  TableGradient gradient[3];
  int64_t tokens, cols, stride_dy;
  Dropout dropout;
};

void embedding_fwd(const EmbeddingForward& args, DType dtype, int threads);
void embedding_bwd(const EmbeddingBackward& args, DType dtype, int threads);

}  // namespace fastlm::cpu
