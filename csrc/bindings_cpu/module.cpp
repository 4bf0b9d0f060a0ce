// fastlm._cpu: the CPU kernels as Python functions over addresses (`tensor.data_ptr()`; 0 for an absent tensor), sizes
// and a thread count. No torch here: fastlm/ops/<op>.py allocates, checks and calls. The GIL is released in every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/adamw.h"
#include "cpu/cross_entropy.h"
#include "cpu/embedding.h"
#include "cpu/gelu.h"
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

// Three each: word, position, type.
using Three = std::array<Address, 3>;
using Sizes = std::array<int64_t, 3>;

void fill_lookup(Lookup* lookup, const Three& tables, const Three& ids, const Sizes& strides, const Sizes& periods) {
  for (int k = 0; k < 3; ++k) lookup[k] = {input(tables[k]), input<int64_t>(ids[k]), strides[k], periods[k]};
}

void bind_embedding(py::module_& m) {
  m.def("embedding_fwd",
        [](const Three& tables, const Three& ids, const Sizes& strides, const Sizes& periods, Address weight,
           Address bias, Address y, Address mean, Address rstd, int64_t tokens, int64_t cols, float eps,
           uint64_t threshold, float scale, Address rng, uint32_t site, int dtype, int threads) {
          const py::gil_scoped_release release;
          EmbeddingForward args{{},
                                input<float>(weight),
                                input<float>(bias),
                                pointer(y),
                                pointer<float>(mean),
                                pointer<float>(rstd),
                                tokens,
                                cols,
                                eps,
                                {threshold, scale, input<int64_t>(rng), site}};
          fill_lookup(args.lookup, tables, ids, strides, periods);
          embedding_fwd(args, DType(dtype), threads);
        });
  m.def("embedding_bwd",
        [](const Three& tables, const Three& ids, const Sizes& strides, const Sizes& periods, Address dy,
           Address weight, Address mean, Address rstd, Address dweight, Address dbias, Address dh, Address partial,
           const Three& gradients, const Sizes& rows, const Sizes& skip, int64_t tokens, int64_t cols,
           int64_t stride_dy, uint64_t threshold, float scale, Address rng, uint32_t site, int dtype, int threads) {
          const py::gil_scoped_release release;
          EmbeddingBackward args{{},
                                 input(dy),
                                 input<float>(weight),
                                 input<float>(mean),
                                 input<float>(rstd),
                                 pointer<float>(dweight),
                                 pointer<float>(dbias),
                                 pointer<float>(dh),
                                 pointer<float>(partial),
                                 {},
                                 tokens,
                                 cols,
                                 stride_dy,
                                 {threshold, scale, input<int64_t>(rng), site}};
          fill_lookup(args.lookup, tables, ids, strides, periods);
          for (int k = 0; k < 3; ++k) args.gradient[k] = {pointer<float>(gradients[k]), rows[k], skip[k]};
          embedding_bwd(args, DType(dtype), threads);
        });
}

void bind_gelu(py::module_& m) {
  m.def(
      "gelu_fwd",
      [](Address x, Address bias, Address gate, Address y, int64_t rows, int64_t cols, int64_t stride_x,
         int64_t stride_gate, bool tanh, int dtype, int threads) {
        gelu_fwd({input(x), input<float>(bias), input(gate), pointer(y), rows, cols, stride_x, stride_gate, tanh},
                 DType(dtype), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gelu_bwd",
      [](Address dy, Address x, Address bias, Address gate, Address dx, Address dgate, Address dbias, Address partial,
         int64_t rows, int64_t cols, int64_t stride_dy, int64_t stride_x, int64_t stride_gate, bool tanh, int dtype,
         int threads) {
        gelu_bwd({input(dy), input(x), input<float>(bias), input(gate), pointer(dx), pointer(dgate),
                  pointer<float>(dbias), pointer<float>(partial), rows, cols, stride_dy, stride_x, stride_gate, tanh},
                 DType(dtype), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_cross_entropy(py::module_& m) {
  // -> (the first row whose target is outside, or -1; Σ of the targets' weights)
  m.def("cross_entropy_count",
        [](Address target, Address weight, int64_t rows, int64_t vocabulary, int64_t ignore_index) {
          const TargetCount count =
              cross_entropy_count(input<int64_t>(target), input<float>(weight), rows, vocabulary, ignore_index);
          return std::make_pair(count.outside, count.weight);
        });
  m.def(
      "cross_entropy_fwd",
      [](Address logits, Address target, Address weight, Address dloss, Address loss, Address dlogits, int64_t rows,
         int64_t vocabulary, int64_t stride_x, int64_t stride_dx, int64_t ignore_index, float label_smoothing,
         float z_loss, double denominator, int dtype, int threads) {
        return cross_entropy_fwd({input(logits), input<int64_t>(target), input<float>(weight), input<float>(dloss),
                                  pointer<float>(loss), pointer(dlogits), rows, vocabulary, stride_x, stride_dx,
                                  ignore_index, label_smoothing, z_loss, denominator},
                                 DType(dtype), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cross_entropy_bwd",
      [](Address dlogits, Address dloss, Address out, int64_t rows, int64_t cols, int64_t stride_x, int64_t stride_y,
         bool per_row, int dtype, int threads) {
        cross_entropy_bwd({input(dlogits), input<float>(dloss), pointer(out), rows, cols, stride_x, stride_y, per_row},
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
  bind_cross_entropy(m);
  m.def("philox_many", [](Address counters, int64_t n, uint32_t k0, uint32_t k1) {  // (4, n), n <= 256, in place
    Lanes lanes;
    for (int w = 0; w < 4; ++w) std::copy_n(pointer<uint32_t>(counters) + w * n, n, lanes.word[w]);
    philox_many(lanes, n, {k0, k1});
    for (int w = 0; w < 4; ++w) std::copy_n(lanes.word[w], n, pointer<uint32_t>(counters) + w * n);
  });
  m.def("row_blocks", &row_blocks);
  bind_embedding(m);
  bind_gelu(m);
  bind_math(m);
}
