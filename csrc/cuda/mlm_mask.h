#pragma once

#include "ops.h"

namespace fastlm::cuda {

constexpr int kMaskRanges = 64;  // of special ids: what a kernel's parameters have room for, twice
constexpr int kMaskBlock = 1024;

// Ids of a vocabulary as ranges [first, first + length), ascending.
struct Ranges {
  int count;
  int32_t first[kMaskRanges], length[kMaskRanges];
};

// A number per token as a (rows, cols) view; null for the default.
struct PerToken {
  const int64_t* data;
  int64_t stride_row, stride_col;
};

// input_ids, special_tokens_mask, word_starts (rows, cols) contiguous; the masks may be null. input_ids_out, labels like
// input_ids; index, targets (capacity,); count (). Scratch, with blocks = ceil(rows·cols / kMaskBlock): flags
// (rows·cols,), counts (blocks,), last (blocks,), which only word_starts takes. rows·cols < 2^31.
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
  bool wide;  // set by mlm_mask: input_ids, input_ids_out and labels lie on 16 bytes
};

void mlm_mask(const MlmMask& args, Place place);

}  // namespace fastlm::cuda
