// What the bindings of the ops share: dropout is one argument, a tuple of its members, and so is the place.
#pragma once

#include "cuda/ops.h"
#include "fields.h"

FASTLM_TUPLE(fastlm::cuda::Dropout, &fastlm::cuda::Dropout::threshold, &fastlm::cuda::Dropout::scale,
             &fastlm::cuda::Dropout::rng, &fastlm::cuda::Dropout::site);
FASTLM_TUPLE(fastlm::cuda::Place, &fastlm::cuda::Place::device, &fastlm::cuda::Place::stream);
