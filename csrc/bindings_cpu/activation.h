// The arguments of an activation, by name.
#pragma once

#include "cpu/activation.h"
#include "fields.h"

FASTLM_FIELDS(fastlm::cpu::ActivationForward) {
  FIELD(x);
  FIELD(bias);
  FIELD(gate);
  FIELD(y);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_x);
  FIELD(stride_gate);
}

FASTLM_FIELDS(fastlm::cpu::ActivationBackward) {
  FIELD(dy);
  FIELD(x);
  FIELD(bias);
  FIELD(gate);
  FIELD(dx);
  FIELD(dgate);
  FIELD(dbias);
  FIELD(partial);
  FIELD(rows);
  FIELD(cols);
  FIELD(stride_dy);
  FIELD(stride_x);
  FIELD(stride_gate);
}
