#include "cuda/attention.h"

#include "cuda/attention_cache.h"
#include "cuda/sm90/attention.h"
#include "ops.h"

// The entry points set `wide`.
FASTLM_TUPLE(fastlm::cuda::Rows, &fastlm::cuda::Rows::data, &fastlm::cuda::Rows::sequence, &fastlm::cuda::Rows::row,
             &fastlm::cuda::Rows::head);

FASTLM_FIELDS(fastlm::cuda::Attention) {
  FIELD(q);
  FIELD(k);
  FIELD(v);
  FIELD(cu_q);
  FIELD(cu_k);
  FIELD(key_mask);
  FIELD(bias);
  FIELD(sequences);
  FIELD(heads);
  FIELD(group);
  FIELD(d);
  FIELD(sq);
  FIELD(sk);
  FIELD(left);
  FIELD(right);
  FIELD(far);
  FIELD(far_right);
  FIELD(scale);
  FIELD(softcap);
  FIELD(dropout);
}

FASTLM_FIELDS(fastlm::cuda::AttentionForward) {
  FIELD(attention);
  FIELD(out);
  FIELD(lse);
}

FASTLM_FIELDS(fastlm::cuda::AttentionBackward) {
  FIELD(attention);
  FIELD(dout);
  FIELD(out);
  FIELD(lse);
  FIELD(dlse);
  FIELD(delta);
  FIELD(sequence);
  FIELD(dq);
  FIELD(dk);
  FIELD(dv);
  FIELD(parts);
  FIELD(partial);
}

FASTLM_FIELDS(fastlm::cuda::AttentionCache) {
  FIELD(q);
  FIELD(k);
  FIELD(v);
  FIELD(lengths);
  FIELD(cu_q);
  FIELD(bias);
  FIELD(sequences);
  FIELD(heads);
  FIELD(group);
  FIELD(d);
  FIELD(sq);
  FIELD(sk);
  FIELD(longest);
  FIELD(left);
  FIELD(right);
  FIELD(far);
  FIELD(far_right);
  FIELD(splits);
  FIELD(scale);
  FIELD(softcap);
  FIELD(out);
  FIELD(lse);
  FIELD(parts);
  FIELD(maxima);
  FIELD(sums);
}

namespace fastlm::cuda {

FASTLM_BIND(attention_bias, "table", "bias", "starts", "heads", "bidirectional", "dtype", "place");
FASTLM_BIND(attention_fwd, "args", "dtype", "place");
FASTLM_BIND(attention_fwd_sm90, "args", "dtype", "place");
FASTLM_BIND(attention_bwd, "args", "dtype", "place");
FASTLM_BIND(attention_bwd_sm90, "args", "dtype", "place");
FASTLM_BIND(attention_tiles, "args", "dtype");
FASTLM_BIND(attention_dtable, "partial", "dtable", "tiles", "starts", "heads", "bidirectional", "place");
FASTLM_BIND(attention_cache, "args", "dtype", "place");
FASTLM_BIND(attention_cache_splits, "sequences", "kv_heads", "rows", "sk", "place");

}  // namespace fastlm::cuda
