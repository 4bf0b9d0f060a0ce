#pragma once

#include "attention.h"

namespace fastlm::cuda {

// Queries against a cache. The maths: fastlm/ops/attention.py; the names that Attention has mean the same here.
// k, v (sequences, sk, heads / group, d), of which sequence s has the first lengths[s] rows. q (sequences, sq, heads,
// d); packed, with cu_q, (sq, heads, d), and no sequence is longer than `longest`, else sq.
// out like q and lse are contiguous. Packed rows of no sequence are left as they are, and so are all rows where cu_q is
// wrong.
// parts (splits, rows of out, d) float32, maxima and sums (splits, rows of out): scratch; null where splits is 1.
// Packed, maxima and sums are NaN at first.
struct AttentionCache {
  Rows q, k, v;
  const int32_t *lengths, *cu_q;
  const float* bias;
  int sequences, heads, group, d, sq, sk, longest, left, right, far, far_right, splits;
  float scale, softcap;
  void* out;
  float *lse, *parts, *maxima, *sums;
};
void attention_cache(AttentionCache args, DType dtype, Place place);

// The number of blocks that divide the keys of a tile: enough for the device, and of 128 keys or more each.
int64_t attention_cache_splits(int sequences, int kv_heads, int rows, int sk, Place place);

}  // namespace fastlm::cuda
