// Sums over rows (gradients of weights and biases) that do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastlm::cpu {

// The number of blocks of rows that are summed separately: a function of `rows` only. Block b is
// [rows·b/blocks, rows·(b+1)/blocks).
inline int64_t row_blocks(int64_t rows) { return std::max<int64_t>(1, std::min<int64_t>(64, rows / 16)); }

// out (cols,) = the sum of partial (blocks, cols), in the order of the blocks.
void sum_partials(const float* partial, int64_t blocks, int64_t cols, float* out);

}  // namespace fastlm::cpu
