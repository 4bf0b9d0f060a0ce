// fastlm._cuda: the CUDA kernels as Python functions over addresses, sizes, a device and a stream. No torch here.
// The CUDA runtime is linked statically, so the module imports on a machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/recorder.h"
#include "fields.h"

namespace py = pybind11;
using namespace fastlm;
using namespace fastlm::cuda;

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

Place place(int device, Address stream) { return {device, reinterpret_cast<CUstream_st*>(stream)}; }

using RowStrides = std::array<int64_t, 3>;  // sequence, row, head

Rows rows(Address data, const RowStrides& stride) { return {input(data), stride[0], stride[1], stride[2], false}; }

void bind_attention(py::module_& m) {
  py::class_<Attention>(m, "Attention")
      .def(py::init([](Address q, Address k, Address v, RowStrides q_stride, RowStrides k_stride, RowStrides v_stride,
                       Address cu_q, Address cu_k, Address key_mask, Address bias, int sequences, int heads, int group,
                       int d, int sq, int sk, int left, int right, int far, int far_right, float scale,
                       uint64_t threshold, float dropout_scale, Address rng, uint32_t site) {
        return Attention{rows(q, q_stride),
                         rows(k, k_stride),
                         rows(v, v_stride),
                         input<int32_t>(cu_q),
                         input<int32_t>(cu_k),
                         input<uint8_t>(key_mask),
                         input<float>(bias),
                         sequences,
                         heads,
                         group,
                         d,
                         sq,
                         sk,
                         left,
                         right,
                         far,
                         far_right,
                         scale,
                         {threshold, dropout_scale, input<int64_t>(rng), site}};
      }));
  m.def(
      "attention_bias",
      [](Address table, Address bias, const std::vector<int>& starts, int heads, bool bidirectional, int dtype,
         int device, Address queue) {
        attention_bias(input<float>(table), pointer<float>(bias), starts, heads, bidirectional, DType(dtype),
                       place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attention_fwd",
      [](const Attention& args, Address out, Address lse, int dtype, int device, Address queue) {
        attention_fwd({args, pointer(out), pointer<float>(lse), false}, DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("attention_tiles", [](const Attention& args, int dtype) { return attention_tiles(args, DType(dtype)); });
  m.def(
      "attention_bwd",
      [](const Attention& args, Address dout, RowStrides dout_stride, Address out, Address lse, Address dlse,
         Address delta, Address sequence, Address dq, Address dk, Address dv, Address partial, int dtype, int device,
         Address queue) {
        attention_bwd(
            {args, rows(dout, dout_stride), input(out), input<float>(lse), input<float>(dlse), pointer<float>(delta),
             pointer<int32_t>(sequence), pointer(dq), pointer(dk), pointer(dv), pointer<float>(partial), false},
            DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attention_dtable",
      [](Address partial, Address dtable, int64_t tiles, const std::vector<int>& starts, int heads, bool bidirectional,
         int device, Address queue) {
        attention_dtable(input<float>(partial), pointer<float>(dtable), tiles, starts, heads, bidirectional,
                         place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  python::add_methods(m.ptr());
  py::class_<Device>(m, "Device")
      .def_readonly("name", &Device::name)
      .def_readonly("capability", &Device::capability)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_memory_per_block", &Device::shared_memory_per_block)
      .def_readonly("l2_bytes", &Device::l2_bytes);
  m.def("devices", &devices,
        "The CUDA devices of this machine. Raises RuntimeError with the runtime's reason if it has none.");
  m.def("partial_rows", &partial_rows, "Rows of the scratch for partial sums that a backward pass on a device takes.");
  m.def(
      "record",
      [](py::object recorder) {
        if (recorder.is_none()) return set_recorder(nullptr);
        set_recorder([recorder](const char* entry, const unsigned* shape, size_t shared, const void* params,
                                size_t bytes) {
          const py::gil_scoped_acquire gil;
          try {
            recorder(entry, py::make_tuple(shape[0], shape[1], shape[2]), py::make_tuple(shape[3], shape[4], shape[5]),
                     shared, py::bytes(static_cast<const char*>(params), bytes));
          } catch (py::error_already_set& error) {
            error.restore();
            throw python::Failed{};
          }
        });
      },
      "f(entry, grid, block, shared_bytes, params) is called in place of every launch; None ends it.");
  m.def("drop_launches", &drop_launches,
        "Leaves launches out, for measuring the host's share of a call; False ends it.");
  bind_attention(m);
  m.def("compiler", &compiler, "The version of the nvcc that made this build, as '13.0.48'.");
  m.def("architectures", &architectures, "Architectures with machine code in this build, as '800,900,1000'.");
}
