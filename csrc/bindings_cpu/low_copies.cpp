#include "cpu/low_copies.h"

#include "fields.h"

FASTLM_TUPLE(fastlm::cpu::LowCopy, &fastlm::cpu::LowCopy::w, &fastlm::cpu::LowCopy::low, &fastlm::cpu::LowCopy::n);

namespace fastlm::cpu {

FASTLM_BIND(changed_copy, "copies", "samples");

}  // namespace fastlm::cpu
