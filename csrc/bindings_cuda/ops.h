// Shared by the bindings of the ops: dropout and place are one keyword argument each, a tuple of its members.
#pragma once

#include "cuda/ops.h"
#include "fields.h"

FASTLM_TUPLE(fastlm::cuda::Dropout, &fastlm::cuda::Dropout::threshold, &fastlm::cuda::Dropout::scale,
             &fastlm::cuda::Dropout::rng, &fastlm::cuda::Dropout::site);
FASTLM_TUPLE(fastlm::cuda::Place, &fastlm::cuda::Place::device, &fastlm::cuda::Place::stream);
