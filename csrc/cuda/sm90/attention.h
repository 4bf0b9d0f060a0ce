#pragma once

#include "../attention.h"

namespace fastlm::cuda {

// attention_fwd on a device of compute capability 9.0. bfloat16 or float16; d at most 128, a multiple of 8; some keys;
// q, k and v on 16 bytes with strides of multiples of 16 bytes, for TMA.
void attention_fwd_sm90(AttentionForward args, DType dtype, Place place);

}  // namespace fastlm::cuda
