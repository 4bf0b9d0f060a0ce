// fastlm._cuda: the CUDA kernels as Python functions over addresses, sizes, a device and a stream. No torch here.
// The CUDA runtime is linked statically, so the module imports on a machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/cross_entropy.h"
#include "cuda/device.h"
#include "cuda/mlm_mask.h"
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
}  // namespace fastlm::python

namespace {

Place place(int device, Address stream) { return {device, reinterpret_cast<CUstream_st*>(stream)}; }

void bind_cross_entropy(py::module_& m) {
  m.attr("LOSS_PARTS") = kLossParts;
  m.def(
      "cross_entropy_fwd",
      [](Address x, Address target, Address weight, Address weight_sum, Address parts, Address dloss, Address loss,
         Address dx, int64_t rows, int64_t cols, int64_t stride_x, int64_t stride_dx, int64_t ignore_index,
         float label_smoothing, float z_loss, int dtype, int device, Address queue) {
        cross_entropy_fwd({input(x), input<int64_t>(target), input<float>(weight), input<float>(weight_sum),
                           input<float>(parts), input<float>(dloss), pointer<float>(loss), pointer(dx), rows, cols,
                           stride_x, stride_dx, ignore_index, label_smoothing, z_loss, 0},
                          DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cross_entropy_count",
      [](Address target, Address weight, Address parts, int64_t rows, int64_t cols, int64_t ignore_index, int device,
         Address queue) {
        cross_entropy_count(
            {input<int64_t>(target), input<float>(weight), pointer<float>(parts), rows, cols, ignore_index},
            place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cross_entropy_sum",
      [](Address loss, Address parts, Address scratch, Address out, int64_t rows, int device, Address queue) {
        cross_entropy_sum({input<float>(loss), input<float>(parts), pointer<float>(scratch), pointer<float>(out), rows},
                          place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cross_entropy_bwd",
      [](Address x, Address dloss, Address y, int64_t rows, int64_t cols, int64_t stride_x, int64_t stride_y,
         bool per_row, int dtype, int device, Address queue) {
        cross_entropy_bwd({input(x), input<float>(dloss), pointer(y), rows, cols, stride_x, stride_y, per_row},
                          DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  python::add_methods(m.ptr());
  m.attr("MASK_BLOCK") = kMaskBlock;
  m.attr("MASK_RANGES") = kMaskRanges;
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
  bind_cross_entropy(m);
  m.def("compiler", &compiler, "The version of the nvcc that made this build, as '13.0.48'.");
  m.def("architectures", &architectures, "Architectures with machine code in this build, as '800,900,1000'.");
}
