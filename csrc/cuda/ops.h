// The types that the entry points of the CUDA kernels share. The arguments are plain pointers, sizes, a device and a
// stream. The elements of a row are contiguous; a row stride, if there is one, counts elements. csrc/bindings_cuda/
// binds the functions to Python; the maths is in fastlm/ops/<op>.py.
#pragma once

#include <cstdint>

struct CUstream_st;  // of CUDA; declared here, so that files that include this need no CUDA header

namespace fastlm::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Dropout of one call. A word below `threshold` = floor(p·2^32) drops; scale = 1/(1-p). threshold 0: no dropout.
struct Dropout {
  uint64_t threshold;
  float scale;
  const int64_t* rng;  // (seed, step)
  uint32_t site;
};

// Where a kernel runs. Partial sums of gradients over rows have at most partial_rows(device) rows.
struct Place {
  int device;
  CUstream_st* stream;
};

int64_t partial_rows(int device);

}  // namespace fastlm::cuda
