#pragma once

#include "cuda/cross_entropy.h"

namespace fastlm::cuda {

constexpr int kClusterRowBytes = 8 * 224 * 1024;  // of a row at most: what a cluster's shared memory holds

// What cross_entropy_fwd computes, by a cluster of blocks a row. std::invalid_argument for a row of more bytes.
void cross_entropy_fwd_sm90(const CrossEntropyForward& args, DType dtype, Place place);

}  // namespace fastlm::cuda
