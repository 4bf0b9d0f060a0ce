// Shared by the bindings of the ops: dropout is one keyword argument, a tuple of its members.
#pragma once

#include "cpu/ops.h"
#include "fields.h"

FASTLM_TUPLE(fastlm::cpu::Dropout, &fastlm::cpu::Dropout::threshold, &fastlm::cpu::Dropout::scale,
             &fastlm::cpu::Dropout::rng, &fastlm::cpu::Dropout::site);
