#include "cpu/adamw.h"

#include "cpu/lamb.h"
#include "fields.h"

FASTLM_TUPLE(fastlm::cpu::Span, &fastlm::cpu::Span::data, &fastlm::cpu::Span::n, &fastlm::cpu::Span::dtype);
FASTLM_TUPLE(fastlm::cpu::AdamWTensor, &fastlm::cpu::AdamWTensor::w, &fastlm::cpu::AdamWTensor::g,
             &fastlm::cpu::AdamWTensor::m, &fastlm::cpu::AdamWTensor::v, &fastlm::cpu::AdamWTensor::step,
             &fastlm::cpu::AdamWTensor::low, &fastlm::cpu::AdamWTensor::n, &fastlm::cpu::AdamWTensor::group,
             &fastlm::cpu::AdamWTensor::gradient);
FASTLM_TUPLE(fastlm::cpu::AdamWGroup, &fastlm::cpu::AdamWGroup::lr, &fastlm::cpu::AdamWGroup::beta1,
             &fastlm::cpu::AdamWGroup::beta2, &fastlm::cpu::AdamWGroup::eps, &fastlm::cpu::AdamWGroup::weight_decay);

namespace fastlm::cpu {

FASTLM_BIND(squared_norm, "spans", "threads");
FASTLM_BIND(adamw, "tensors", "groups", "grad_scale", "threads");
FASTLM_BIND(lamb, "tensors", "groups", "grad_scale", "threads");

}  // namespace fastlm::cpu
