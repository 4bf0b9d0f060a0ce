// fastlm._cpu: the CPU kernels as Python functions over addresses (`tensor.data_ptr()`; 0 for an absent tensor), sizes
// and a thread count. No torch here: fastlm/ops/<op>.py allocates, checks and calls. The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/adamw.h"
#include "cpu/attention.h"
#include "cpu/math.h"
#include "cpu/partials.h"
#include "cpu/philox_many.h"
#include "fields.h"
#include "philox.h"

namespace py = pybind11;
using namespace fastlm;
using namespace fastlm::cpu;

namespace fastlm::python {
std::vector<Method>& methods() {
  static std::vector<Method> all;
  return all;
}
std::vector<std::pair<const char*, int64_t>>& constants() {
  static std::vector<std::pair<const char*, int64_t>> all;
  return all;
}
}  // namespace fastlm::python

namespace {

void bind_adamw(py::module_& m) {
  // spans: (x, n) each -> Σ x²
  m.def(
      "squared_norm",
      [](const std::vector<std::pair<Address, int64_t>>& spans, int threads) {
        std::vector<Span> all;
        for (const auto& [x, n] : spans) all.push_back({input<float>(x), n});
        return squared_norm(all, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  // tensors: (w, g, m, v, step, n, group) each; groups: (lr, beta1, beta2, eps, weight_decay) each
  m.def(
      "adamw",
      [](const std::vector<std::array<Address, 7>>& tensors, const std::vector<std::array<double, 5>>& groups,
         double grad_scale, int threads) {
        std::vector<AdamWTensor> all;
        for (const auto& [w, g, m, v, step, n, group] : tensors) {
          all.push_back({pointer<float>(w), input<float>(g), pointer<float>(m), pointer<float>(v), pointer<float>(step),
                         int64_t(n), int64_t(group)});
        }
        std::vector<AdamWGroup> settings;
        for (const auto& [lr, beta1, beta2, eps, weight_decay] : groups) {
          settings.push_back({lr, beta1, beta2, eps, weight_decay});
        }
        adamw(all, settings, grad_scale, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_attention(py::module_& m) {
  using StrideTuple = std::array<int64_t, 3>;  // sequence, row, head
  py::class_<Attention>(m, "Attention")
      .def(
          py::init([](Address q, Address k, Address v, StrideTuple q_stride, StrideTuple k_stride, StrideTuple v_stride,
                      Address cu_q, Address cu_k, Address key_mask, Address table, Address starts, int64_t one_way,
                      bool bidirectional, int64_t batch, int64_t heads, int64_t kv_heads, int64_t d, int64_t sq,
                      int64_t sk, int64_t left, int64_t right, float scale, uint64_t threshold, float dropout_scale,
                      Address rng, uint32_t site, int64_t lse_sequence, int64_t lse_head) {
            return Attention{input(q),
                             input(k),
                             input(v),
                             {q_stride[0], q_stride[1], q_stride[2]},
                             {k_stride[0], k_stride[1], k_stride[2]},
                             {v_stride[0], v_stride[1], v_stride[2]},
                             input<int32_t>(cu_q),
                             input<int32_t>(cu_k),
                             input<uint8_t>(key_mask),
                             input<float>(table),
                             input<int32_t>(starts),
                             one_way,
                             bidirectional,
                             batch,
                             heads,
                             kv_heads,
                             d,
                             sq,
                             sk,
                             left,
                             right,
                             scale,
                             {threshold, dropout_scale, input<int64_t>(rng), site},
                             lse_sequence,
                             lse_head};
          }));
  m.def(
      "attention_fwd",
      [](const Attention& args, Address out, Address lse, int dtype, int threads) {
        attention_fwd(args, pointer(out), pointer<float>(lse), DType(dtype), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attention_bwd",
      [](const Attention& args, Address out, Address dout, StrideTuple dout_stride, Address lse, Address dlse,
         Address dq, Address dk, Address dv, Address partial, Address dtable, Address dtable_partial, int dtype,
         int threads) {
        attention_bwd(args,
                      {input(out),
                       input(dout),
                       {dout_stride[0], dout_stride[1], dout_stride[2]},
                       input<float>(lse),
                       input<float>(dlse),
                       pointer(dq),
                       pointer(dk),
                       pointer(dv),
                       pointer<float>(partial),
                       pointer<float>(dtable),
                       pointer<float>(dtable_partial)},
                      DType(dtype), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  python::add_methods(m.ptr());
  m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const Words w = philox(c0, c1, c2, c3, {k0, k1});
    return py::make_tuple(w.r0, w.r1, w.r2, w.r3);
  });
  bind_adamw(m);
  bind_attention(m);
  m.def("philox_many", [](Address counters, int64_t n, uint32_t k0, uint32_t k1) {  // (4, n), n <= 256, in place
    Lanes lanes;
    for (int w = 0; w < 4; ++w) std::copy_n(pointer<uint32_t>(counters) + w * n, n, lanes.word[w]);
    philox_many(lanes, n, {k0, k1});
    for (int w = 0; w < 4; ++w) std::copy_n(lanes.word[w], n, pointer<uint32_t>(counters) + w * n);
  });
  m.def("row_blocks", &row_blocks);
  bind_math(m);
}
