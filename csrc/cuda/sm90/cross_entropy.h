#pragma once

#include "cuda/cross_entropy.h"

namespace fastlm::cuda {

constexpr int kClusterRowBytes = 224 * 1024;  // of a row, in a block's shared memory at most

// What cross_entropy_fwd computes, by a cluster of `blocks` blocks a row: 4 or 8. std::invalid_argument for a row of
// more than blocks · kClusterRowBytes, or another number of blocks.
void cross_entropy_fwd_sm90(const CrossEntropyForward& args, int blocks, DType dtype, Place place);

}  // namespace fastlm::cuda
