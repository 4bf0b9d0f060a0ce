#include "cpu/decode.h"

#include "fields.h"

FASTLM_TUPLE(fastlm::cpu::Matrix, &fastlm::cpu::Matrix::data, &fastlm::cpu::Matrix::scale, &fastlm::cpu::Matrix::bias,
             &fastlm::cpu::Matrix::rows, &fastlm::cpu::Matrix::cols, &fastlm::cpu::Matrix::form);
FASTLM_TUPLE(fastlm::cpu::DecodeNorm, &fastlm::cpu::DecodeNorm::weight, &fastlm::cpu::DecodeNorm::bias);
FASTLM_TUPLE(fastlm::cpu::DecodeCache, &fastlm::cpu::DecodeCache::k, &fastlm::cpu::DecodeCache::v,
             &fastlm::cpu::DecodeCache::stride);
FASTLM_TUPLE(fastlm::cpu::DecodeLayer, &fastlm::cpu::DecodeLayer::norm1, &fastlm::cpu::DecodeLayer::qkv,
             &fastlm::cpu::DecodeLayer::out, &fastlm::cpu::DecodeLayer::cache, &fastlm::cpu::DecodeLayer::norm_cross,
             &fastlm::cpu::DecodeLayer::cross_q, &fastlm::cpu::DecodeLayer::cross_out, &fastlm::cpu::DecodeLayer::cross,
             &fastlm::cpu::DecodeLayer::norm2, &fastlm::cpu::DecodeLayer::linear1, &fastlm::cpu::DecodeLayer::linear2);

FASTLM_FIELDS(fastlm::cpu::DecodeStep) {
  FIELD(tokens);
  FIELD(lengths);
  FIELD(cross_starts);
  FIELD(cross_lengths);
  FIELD(batch);
  FIELD(capacity);
  FIELD(width);
  FIELD(heads);
  FIELD(d);
  FIELD(words);
  FIELD(positions);
  FIELD(distance_bias);
  FIELD(vocab);
  FIELD(most_positions);
  FIELD(distances);
  FIELD(softmax_scale);
  FIELD(eps);
  FIELD(output_scale);
  FIELD(rms);
  FIELD(gated);
  FIELD(activation);
  FIELD(norm);
  FIELD(head);
  FIELD(logits);
}

namespace fastlm::cpu {

FASTLM_BIND(decode_step, "layers", "step", "threads");
FASTLM_BIND(matvec, "matrix", "x", "batch", "y", "threads");
FASTLM_BIND(read_memory, "data", "bytes", "threads");

}  // namespace fastlm::cpu
