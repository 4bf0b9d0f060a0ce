// fastlm._cuda: the CUDA kernels as Python functions with keyword arguments (csrc/common/fields.h). Each op has a file
// beside this one. There is no torch here. The CUDA runtime is linked statically, so the module can be imported on a
// machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"
#include "cuda/ops.h"
#include "cuda/recorder.h"
#include "fields.h"

namespace py = pybind11;
using namespace fastlm;
using namespace fastlm::cuda;

FASTLM_BINDINGS;

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
  m.attr("UNASKED_SHARED") = kUnasked;
  m.def("compiler", &compiler, "The version of the nvcc that made this build, as '13.0.48'.");
  m.def("architectures", &architectures, "Architectures with machine code in this build, as '800,900,1000'.");
}
