#include "cpu/mlm_mask.h"

#include "ops.h"

FASTLM_TUPLE(fastlm::cpu::PerToken, &fastlm::cpu::PerToken::data, &fastlm::cpu::PerToken::stride_row,
             &fastlm::cpu::PerToken::stride_col);

FASTLM_FIELDS(fastlm::cpu::MlmMask) {
  FIELD(input_ids);
  FIELD(sample_ids);
  FIELD(positions);
  FIELD(epochs);
  FIELD(epoch);
  FIELD(special_tokens_mask);
  FIELD(word_starts);
  FIELD(special_ids);
  FIELD(left_out);
  FIELD(mask_token_id);
  FIELD(vocab_size);
  FIELD(seed);
  FIELD(select_below);
  FIELD(mask_below);
  FIELD(replace_below);
  FIELD(input_ids_out);
  FIELD(labels);
  FIELD(index);
  FIELD(targets);
  FIELD(count);
  FIELD(rows);
  FIELD(cols);
  FIELD(capacity);
}

namespace fastlm::cpu {

FASTLM_BIND(mlm_mask, "args", "threads");

}  // namespace fastlm::cpu
