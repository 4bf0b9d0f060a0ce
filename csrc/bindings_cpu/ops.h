// What the bindings of the ops share: dropout is one argument, a tuple of its members.
#pragma once

#include "cpu/ops.h"
#include "fields.h"

FASTLM_TUPLE(fastlm::cpu::Dropout, &fastlm::cpu::Dropout::threshold, &fastlm::cpu::Dropout::scale,
             &fastlm::cpu::Dropout::rng, &fastlm::cpu::Dropout::site);
