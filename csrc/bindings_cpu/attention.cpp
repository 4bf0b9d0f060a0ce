#include "cpu/attention.h"

#include "ops.h"

FASTLM_TUPLE(fastlm::cpu::Strides, &fastlm::cpu::Strides::sequence, &fastlm::cpu::Strides::row,
             &fastlm::cpu::Strides::head);

FASTLM_FIELDS(fastlm::cpu::Attention) {
  FIELD(q);
  FIELD(k);
  FIELD(v);
  FIELD(q_stride);
  FIELD(k_stride);
  FIELD(v_stride);
  FIELD(cu_q);
  FIELD(cu_k);
  FIELD(lengths_k);
  FIELD(key_mask);
  FIELD(table);
  FIELD(starts);
  FIELD(one_way);
  FIELD(bidirectional);
  FIELD(batch);
  FIELD(heads);
  FIELD(kv_heads);
  FIELD(d);
  FIELD(sq);
  FIELD(sk);
  FIELD(left);
  FIELD(right);
  FIELD(scale);
  FIELD(softcap);
  FIELD(dropout);
  FIELD(lse_sequence);
  FIELD(lse_head);
}

FASTLM_FIELDS(fastlm::cpu::AttentionBackward) {
  FIELD(out);
  FIELD(dout);
  FIELD(dout_stride);
  FIELD(lse);
  FIELD(dlse);
  FIELD(dq);
  FIELD(dk);
  FIELD(dv);
  FIELD(partial);
  FIELD(dtable);
  FIELD(dtable_partial);
}

namespace fastlm::cpu {

FASTLM_BIND(attention_fwd, "args", "out", "lse", "dtype", "threads");
FASTLM_BIND(attention_cache, "args", "out", "lse", "dtype", "threads");
FASTLM_BIND(attention_bwd, "args", "grads", "dtype", "threads");

}  // namespace fastlm::cpu
