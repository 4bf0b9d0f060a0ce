#include "cuda/mlm_mask.h"

#include "ops.h"

FASTLM_TUPLE(fastlm::cuda::PerToken, &fastlm::cuda::PerToken::data, &fastlm::cuda::PerToken::stride_row,
             &fastlm::cuda::PerToken::stride_col);

// From (first, length, first, length, ...).
template <>
struct fastlm::python::Convert<fastlm::cuda::Ranges> {
  static void from(PyObject* object, fastlm::cuda::Ranges& ranges) {
    std::vector<int32_t> flat;
    Convert<std::vector<int32_t>>::from(object, flat);
    if (flat.size() > 2 * fastlm::cuda::kMaskRanges) fail(PyExc_ValueError, "too many ranges of special ids");
    ranges = {int(flat.size() / 2), {}, {}};
    for (int k = 0; k < ranges.count; ++k) {
      ranges.first[k] = flat[2 * k];
      ranges.length[k] = flat[2 * k + 1];
    }
  }
};

FASTLM_FIELDS(fastlm::cuda::MlmMask) {
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
  FIELD(flags);
  FIELD(counts);
  FIELD(last);
  FIELD(rows);
  FIELD(cols);
  FIELD(capacity);
}

namespace fastlm::cuda {

FASTLM_CONSTANT(MASK_BLOCK, kMaskBlock);
FASTLM_CONSTANT(MASK_RANGES, kMaskRanges);
FASTLM_BIND(mlm_mask, "args", "place");

}  // namespace fastlm::cuda
