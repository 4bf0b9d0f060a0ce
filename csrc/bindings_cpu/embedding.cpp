#include "cpu/embedding.h"

#include "ops.h"

FASTLM_TUPLE(fastlm::cpu::Lookup, &fastlm::cpu::Lookup::table, &fastlm::cpu::Lookup::ids, &fastlm::cpu::Lookup::stride,
             &fastlm::cpu::Lookup::period);
FASTLM_TUPLE(fastlm::cpu::TableGradient, &fastlm::cpu::TableGradient::data, &fastlm::cpu::TableGradient::rows,
             &fastlm::cpu::TableGradient::skip, &fastlm::cpu::TableGradient::ids);

FASTLM_FIELDS(fastlm::cpu::EmbeddingForward) {
  FIELD(lookup);
  FIELD(weight);
  FIELD(bias);
  FIELD(y);
  FIELD(mean);
  FIELD(rstd);
  FIELD(tokens);
  FIELD(cols);
  FIELD(eps);
  FIELD(dropout);
}

FASTLM_FIELDS(fastlm::cpu::EmbeddingBackward) {
  FIELD(lookup);
  FIELD(dy);
  FIELD(weight);
  FIELD(mean);
  FIELD(rstd);
  FIELD(dweight);
  FIELD(dbias);
  FIELD(dh);
  FIELD(partial);
  FIELD(gradient);
  FIELD(tokens);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(dropout);
}

namespace fastlm::cpu {

FASTLM_BIND(embedding_fwd, "args", "dtype", "threads");
FASTLM_BIND(embedding_bwd, "args", "dtype", "threads");

}  // namespace fastlm::cpu
