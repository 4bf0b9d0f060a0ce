// fastlm._cuda: the CUDA kernels as Python functions over addresses, sizes, a device and a stream. No torch here.
// The CUDA runtime is linked statically, so the module imports on a machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"

namespace py = pybind11;
using namespace fastlm::cuda;

PYBIND11_MODULE(_cuda, m) {
  py::class_<Device>(m, "Device")
      .def_readonly("name", &Device::name)
      .def_readonly("capability", &Device::capability)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_memory_per_block", &Device::shared_memory_per_block)
      .def_readonly("l2_bytes", &Device::l2_bytes);
  m.def("devices", &devices,
        "The CUDA devices of this machine. Raises RuntimeError with the runtime's reason if it has none.");
  m.def("architectures", &architectures, "Architectures with machine code in this build, as '80,90,100'.");
}
