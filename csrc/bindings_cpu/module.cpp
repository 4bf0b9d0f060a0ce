// fastlm._cpu: the CPU kernels as Python functions with keyword arguments (csrc/common/fields.h). Each op has a file
// beside this one. There is no torch here: fastlm/ops/_cpu/<op>.py allocates tensors and calls the functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/math.h"
#include "cpu/partials.h"
#include "cpu/philox_many.h"
#include "cpu/units.h"
#include "fields.h"
#include "philox.h"

namespace py = pybind11;
using namespace fastlm;
using namespace fastlm::cpu;

FASTLM_BINDINGS;

namespace {

void bind_math(py::module_& m) {
  const std::pair<const char*, void (*)(const float*, float*, int64_t)> functions[] = {
      {"exp_array", exp_array},
      {"expm1_neg_array", expm1_neg_array},
      {"erf_array", erf_array},
      {"tanh_array", tanh_array},
  };
  for (const auto& [name, function] : functions) {
    m.def(name,
          [function = function](Address x, Address y, int64_t n) { function(input<float>(x), pointer<float>(y), n); });
  }
}

void bind_isa(py::module_& m) {
  m.def("isa", &isa_name);
  m.def("isas", &isas);
  m.def("use_isa", [](const std::optional<std::string>& name) { return use_isa(name.value_or("auto")); });
  m.def("bf16_product", [](Address a, Address b, Address c, int64_t rows, int64_t columns, int64_t depth) {
    bf16_product(input<>(a), input<uint32_t>(b), pointer<float>(c), rows, columns, depth);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  python::add_methods(m.ptr());
  m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const Words w = philox(c0, c1, c2, c3, {k0, k1});
    return py::make_tuple(w.r0, w.r1, w.r2, w.r3);
  });
  m.def("philox_many", [](Address counters, int64_t n, uint32_t k0, uint32_t k1) {  // (4, n), n <= 256, in place
    Lanes lanes;
    for (int w = 0; w < 4; ++w) std::copy_n(pointer<uint32_t>(counters) + w * n, n, lanes.word[w]);
    philox_many(lanes, n, {k0, k1});
    for (int w = 0; w < 4; ++w) std::copy_n(lanes.word[w], n, pointer<uint32_t>(counters) + w * n);
  });
  m.def("row_blocks", &row_blocks);
  bind_math(m);
  bind_isa(m);
}
