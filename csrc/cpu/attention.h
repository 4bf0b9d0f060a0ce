#pragma once

#include "ops.h"

namespace fastlm::cpu {

// Strides of a (sequences, rows, heads, d) tensor with a unit last stride, in elements. Packed: sequence is 0, and a
// sequence's first row comes from cu_seqlens.
struct Strides {
  int64_t sequence, row, head;
};

// The arguments that forward and backward share. The maths: fastlm/ops/attention.py.
// q (.., sq, heads, d); k, v (.., sk, kv_heads, d), kv_heads divides heads.
// cu_q, cu_k (batch + 1,): packed sequences; sq and sk are then not read. Null: every sequence has sq and sk rows.
// lengths_k (batch,): sequence b has the first lengths_k[b] of its sk keys; null: all. Never with cu_k.
// key_mask (batch, sk), 1 = real, or null; never with cu_k or lengths_k.
// table (buckets, heads) or null; starts (one_way,): the smallest distance of each bucket of one direction.
// left, right: the window around a query's position, aligned bottom-right; -1: no limit.
// softcap c > 0: scores c tanh(score/c), before the bias; 0: none.
// dropout: threshold is t = round(256 p), scale 256/(256-t).
struct Attention {
  const void *q, *k, *v;
  Strides q_stride, k_stride, v_stride;
  const int32_t *cu_q, *cu_k, *lengths_k;
  const uint8_t* key_mask;
  const float* table;
  const int32_t* starts;
  int64_t one_way;
  bool bidirectional;
  int64_t batch, heads, kv_heads, d, sq, sk, left, right;
  float scale, softcap;
  Dropout dropout;
  // lse of sequence b, head h, row i: lse[b lse_sequence + h lse_head + i], b's rows counted from cu_q where packed.
  int64_t lse_sequence, lse_head;

  int64_t rows_k() const { return cu_k ? cu_k[batch] : batch * sk; }
  int64_t buckets() const { return bidirectional ? 2 * one_way : one_way; }
};

// out like q, contiguous; lse float32.
void attention_fwd(const Attention& args, void* out, float* lse, DType dtype, int threads);

// The same for k and v (batch, sk, kv_heads, d) that are caches, with lengths_k; no dropout. For a few queries, which
// memory bounds, it splits the keys.
void attention_cache(const Attention& args, void* out, float* lse, DType dtype, int threads);

// out, dout, dq like q; dk, dv like k; dlse like lse, or null. dout has the strides dout_stride; all others are
// contiguous.
// partial: (2, rows of k, heads, d) float32 scratch where kv_heads < heads. dtable (buckets, heads) float32 and its
// scratch dtable_partial (batch, buckets, heads), or null.
struct AttentionBackward {
  const void *out, *dout;
  Strides dout_stride;
  const float *lse, *dlse;
  void *dq, *dk, *dv;
  float *partial, *dtable, *dtable_partial;
};
void attention_bwd(const Attention& args, const AttentionBackward& grads, DType dtype, int threads);

}  // namespace fastlm::cpu
