#pragma once

#include <cstdint>
#include <vector>

namespace fastlm::cpu {

// A number per token of (rows, cols): a view with strides in elements, or absent.
struct PerToken {
  const int64_t* data;
  int64_t stride_row, stride_col;
};

// input_ids, input_ids_out, labels, special_tokens_mask, word_starts: (rows, cols), contiguous; the last two may be
// null. sample_ids, positions, epochs: if absent, the row, the column and `epoch`. special_ids and left_out
// (special_ids and mask_token_id) are ascending. The thresholds `..._below` are floor(p·2^32). index, targets:
// (capacity,);
// count: (1,).
struct MlmMask {
  const int64_t* input_ids;
  PerToken sample_ids, positions, epochs;
  int64_t epoch;
  const bool *special_tokens_mask, *word_starts;
  std::vector<int64_t> special_ids, left_out;
  int64_t mask_token_id, vocab_size;
  int64_t seed;
  uint64_t select_below, mask_below, replace_below;
  int64_t *input_ids_out, *labels, *index, *targets, *count;
  int64_t rows, cols, capacity;
};

// Returns the position of the first id outside [0, vocab_size), or -1.
int64_t mlm_mask(const MlmMask& args, int threads);

}  // namespace fastlm::cpu
