// Tensor maps, which TMA reads, of the tensors of attention.
#pragma once

#include <cuda.h>

#include "../attention.h"

namespace fastlm::cuda::sm90 {

struct Sizes {
  int d, heads, rows, sequences;
};

// A map of (sequences, rows, heads, d) of 16 bits, with the dimensions d, heads, rows, sequences. Its boxes are 64
// columns of `box_rows` rows of one head, under the swizzle of 128 bytes. Without a device it is what tests/ptx reads
// in place of the driver's encoding, which is not documented. std::invalid_argument, with the tensor's name, if TMA
// cannot read it.
CUtensorMap tensor_map(const char* name, const Rows& x, Sizes sizes, DType dtype, int box_rows);

}  // namespace fastlm::cuda::sm90
