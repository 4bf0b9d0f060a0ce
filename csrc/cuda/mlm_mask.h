#pragma once

#include "ops.h"

namespace fastlm::cuda {

constexpr int kMaskRanges = 64;  // the most ranges of special ids: the kernel's parameters have room for two such lists
constexpr int kMaskBlock = 1024;

// Ids of a vocabulary as ranges [first, first + length), ascending.
struct Ranges {
  int count;
  int32_t first[kMaskRanges], length[kMaskRanges];
};

// A number per token as a (rows, cols) view. null: the default.
struct PerToken {
  const int64_t* data;
  int64_t stride_row, stride_col;
};

// input_ids, special_tokens_mask, word_starts (rows, cols) are contiguous; the masks may be null. input_ids_out and
// labels are like input_ids; index, targets (capacity,); count (). Scratch, with blocks = ceil(rows·cols / kMaskBlock):
// flags (rows·cols,), counts (blocks,), and last (blocks,), needed only with word_starts. rows·cols < 2^31.
struct MlmMask {
  const int64_t* input_ids;
  PerToken sample_ids, positions, epochs;
  int64_t epoch;
  const uint8_t *special_tokens_mask, *word_starts;
  Ranges special_ids, left_out;
  int64_t mask_token_id, vocab_size, seed;
  uint64_t select_below, mask_below, replace_below;
  int64_t *input_ids_out, *labels, *index, *targets, *count;
  uint8_t* flags;
  int32_t *counts, *last;
  int64_t rows, cols, capacity;
  bool wide;  // set by mlm_mask: input_ids, input_ids_out and labels are aligned to 16 bytes
};

void mlm_mask(const MlmMask& args, Place place);

}  // namespace fastlm::cuda
