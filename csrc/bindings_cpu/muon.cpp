#include "cpu/muon.h"

#include "fields.h"

FASTLM_FIELDS(fastlm::cpu::MuonDirection) {
  FIELD(g);
  FIELD(m);
  FIELD(u);
  FIELD(n);
  FIELD(gradient);
  FIELD(momentum);
}

FASTLM_FIELDS(fastlm::cpu::MuonUpdate) {
  FIELD(w);
  FIELD(o);
  FIELD(low);
  FIELD(n);
  FIELD(decay);
  FIELD(step);
}

namespace fastlm::cpu {

FASTLM_BIND(muon_direction, "args", "gradient_dtype", "dtype", "threads");
FASTLM_BIND(muon_update, "args", "dtype", "threads");

}  // namespace fastlm::cpu
