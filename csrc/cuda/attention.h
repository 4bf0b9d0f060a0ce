#pragma once

#include <vector>

#include "ops.h"

namespace fastlm::cuda {

// A (sequences, rows, heads, d) tensor with a unit last stride, and the other strides in elements. Packed: sequence is
// 0.
struct Rows {
  const void* data;
  int64_t sequence, row, head;
  bool wide;  // set by attention_fwd and attention_bwd: rows can be read 16 bytes at a time
};

// The arguments that forward and backward share. The maths: fastlm/ops/attention.py.
// q (.., sq, heads, d); k, v (.., sk, heads / group, d). Packed, with cu_q and cu_k (sequences + 1,), sq and sk count
// the rows of all sequences. key_mask (sequences, sk), 1 = real, or null; never with cu_k.
// left, right: the window around a query's position, aligned bottom-right; -1: no limit.
// bias (heads, 2 far + 1), or null: the bias of the scores by relative position, from attention_bias. It is constant
// for relative positions <= -far, and for those >= far_right. dropout: threshold is t = round(256 p), scale
// 256/(256-t). softcap c > 0: scores c tanh(score/c); 0: none; never with a bias.
struct Attention {
  Rows q, k, v;
  const int32_t *cu_q, *cu_k;
  const uint8_t* key_mask;
  const float* bias;
  int sequences, heads, group, d, sq, sk, left, right, far, far_right;
  float scale, softcap;
  Dropout dropout;
};

// table (buckets, heads) float32 by relative position -far..far, in the unit in which scores of this dtype are kept.
// starts: the smallest distance of each bucket of one direction.
void attention_bias(const float* table, float* bias, const std::vector<int>& starts, int heads, bool bidirectional,
                    DType dtype, Place place);

// out like q, lse (sequences, heads, sq), packed (heads, sq): contiguous.
struct AttentionForward {
  Attention attention;
  void* out;
  float* lse;
  bool wide;  // set by attention_fwd: out can be written 16 bytes at a time
};
void attention_fwd(AttentionForward args, DType dtype, Place place);

// out, dq like q, dk, dv like k, lse and dlse (or null) like lse: contiguous, or with parts = 3 dq, dk and dv those of
// one contiguous (..., 3, heads, d). The strides of dout are given. delta, like lse, and sequence (sq,) int32, packed
// with dropout, else null, are scratch. partial (attention_tiles, heads, far + far_right + 1) float32 scratch, or null:
// then there is no dtable.
struct AttentionBackward {
  Attention attention;
  Rows dout;
  const void* out;
  const float *lse, *dlse;
  float* delta;
  int32_t* sequence;
  void *dq, *dk, *dv;
  int parts;
  float* partial;
  bool wide;  // set by attention_bwd: the gradients can be written 16 bytes at a time
};
void attention_bwd(AttentionBackward args, DType dtype, Place place);

// The number of tiles of queries, each of which writes a partial sum of the table's gradient.
int64_t attention_tiles(const Attention& args, DType dtype);

// dtable (buckets, heads) float32: the sum of `tiles` partials.
void attention_dtable(const float* partial, float* dtable, int64_t tiles, const std::vector<int>& starts, int heads,
                      bool bidirectional, Place place);

// The two passes of attention_bwd, in csrc/cuda/attention_dkdv.cu and attention_dq.cu.
void attention_dkdv(const AttentionBackward& args, DType dtype, Place place);
void attention_dq(const AttentionBackward& args, DType dtype, Place place);

}  // namespace fastlm::cuda
