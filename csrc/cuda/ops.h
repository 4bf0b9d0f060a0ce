// The CUDA kernels' entry points: plain pointers, sizes, a device and a stream. Rows have a unit last stride, and a
// stride in elements where one is named. Bound in csrc/bindings_cuda; the maths stands in fastlm/ops/<op>.py.
#pragma once

#include <cstdint>

struct CUstream_st;  // CUDA's, so that what includes this needs none of CUDA's headers

namespace fastlm::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Dropout of one call: dropped where a word is below `threshold` = floor(p·2^32); scale = 1/(1-p). threshold 0: none.
struct Dropout {
  uint64_t threshold;
  float scale;
  const int64_t* rng;  // (seed, step)
  uint32_t site;
};

// Where a kernel runs. Its partial sums, of gradients over rows, are at most partial_rows(device) rows.
struct Place {
  int device;
  CUstream_st* stream;
};

int64_t partial_rows(int device);

}  // namespace fastlm::cuda
