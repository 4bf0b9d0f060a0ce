#pragma once

#include "../attention.h"

namespace fastlm::cuda {

// attention_fwd and attention_bwd on a device of compute capability 9.0. bfloat16 or float16; d at most 128, a multiple
// of 8; some keys; q, k, v and dout on 16 bytes with strides of multiples of 16 bytes, for TMA.
void attention_fwd_sm90(AttentionForward args, DType dtype, Place place);
void attention_bwd_sm90(AttentionBackward args, DType dtype, Place place);

// Sets `wide` and computes delta: ../attention_bwd.cu.
void attention_delta(AttentionBackward& args, DType dtype, Place place);

namespace sm90 {

// The two passes of attention_bwd_sm90; dq if there is no `partial`.
void attention_dkdv(const AttentionBackward& args, DType dtype, Place place);
void attention_dq(const AttentionBackward& args, DType dtype, Place place);

}  // namespace sm90

}  // namespace fastlm::cuda
