// A step of decoding: one token of each row goes through all layers of GPT-2 or of T5's decoder, in one call.
#pragma once

#include <vector>

#include "matvec.h"

namespace fastlm::cpu {

// Weight and bias of a norm, (width,) float32. A bias is null where there is none, and in RMSNorm.
struct DecodeNorm {
  const float *weight, *bias;
};

// Keys and values of one layer, (tokens, heads, d) float32 each; `stride` elements from one token to the next.
struct DecodeCache {
  float *k, *v;
  int64_t stride;
};

// x = x + W_o attention(W_q h, W_k h, W_v h), h = norm(x); the same with the keys and values of the encoder, if there
// are any; x = x + W_2 act(W_1 h).
struct DecodeLayer {
  DecodeNorm norm1;
  Matrix qkv, out;
  DecodeCache cache;
  DecodeNorm norm_cross;  // T5's; its weight is null where there is no encoder
  Matrix cross_q, cross_out;
  DecodeCache cross;
  DecodeNorm norm2;
  Matrix linear1, linear2;
};

enum class DecodeActivation : int { relu = 0, gelu = 1, gelu_tanh = 2 };

// tokens (batch,), rows of the table `words` (vocab, width).
// lengths (batch,): the tokens of each row before this one: its position, and where its key and value go. Row b has the
// tokens from b capacity on of a layer's cache.
// cross_starts, cross_lengths (batch,): the first token of each row in the encoder's keys, and how many.
// positions: (most_positions, width) or null. distance_bias (heads, distances): what is added to the score of a key so
// many tokens behind, the last for all farther ones; or null. gated: linear1 has twice the rows, the activated half
// first. logits (batch, head.rows) = head (output_scale norm(x)).
struct DecodeStep {
  const int64_t* tokens;
  const int32_t *lengths, *cross_starts, *cross_lengths;
  int64_t batch, capacity, width, heads, d;
  const float *words, *positions, *distance_bias;
  int64_t vocab, most_positions, distances;
  float softmax_scale, eps, output_scale;
  bool rms, gated;
  DecodeActivation activation;
  DecodeNorm norm;
  Matrix head;
  float* logits;
};

// Appends each token's keys and values to the layers' caches, and sets the logits. Sums are float32. The bits of a row
// depend neither on the other rows nor on the number of threads. std::invalid_argument for a token outside of the
// vocabulary, and for a row that has no room or no position left.
void decode_step(const std::vector<DecodeLayer>& layers, const DecodeStep& step, int threads);

}  // namespace fastlm::cpu
