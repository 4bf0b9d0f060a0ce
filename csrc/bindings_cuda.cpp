// fastlm._cuda: the CUDA kernels as Python functions over addresses, sizes, a device and a stream. No torch here.
// The CUDA runtime is linked statically, so the module imports on a machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"
#include "cuda/layer_norm.h"
#include "cuda/recorder.h"

namespace py = pybind11;
using namespace fastlm::cuda;

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T = void>
const T* input(Address address) {
  return reinterpret_cast<const T*>(address);
}

Place place(int device, Address stream) { return {device, reinterpret_cast<CUstream_st*>(stream)}; }

void bind_layer_norm(py::module_& m) {
  m.def(
      "layer_norm_fwd",
      [](Address x, Address residual, Address weight, Address bias, Address h, Address y, Address mean, Address rstd,
         int64_t rows, int64_t cols, int64_t stride_x, int64_t stride_residual, float eps, bool weight_is_float,
         bool bias_is_float, uint64_t threshold, float scale, Address rng, uint32_t stream, int dtype, int device,
         Address queue) {
        layer_norm_fwd({input(x),
                        input(residual),
                        input(weight),
                        input(bias),
                        pointer(h),
                        pointer(y),
                        pointer<float>(mean),
                        pointer<float>(rstd),
                        rows,
                        cols,
                        stride_x,
                        stride_residual,
                        eps,
                        weight_is_float,
                        bias_is_float,
                        {threshold, scale, input<int64_t>(rng), stream},
                        false},
                       DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm_bwd",
      [](Address dy, Address dh, Address h, Address weight, Address mean, Address rstd, Address dresidual, Address dx,
         Address dweight, Address dbias, Address partial, int64_t rows, int64_t cols, int64_t stride_dy,
         int64_t stride_dh, int64_t stride_h, bool weight_is_float, uint64_t threshold, float scale, Address rng,
         uint32_t stream, int dtype, int device, Address queue) {
        layer_norm_bwd({input(dy),
                        input(dh),
                        input(h),
                        input(weight),
                        input<float>(mean),
                        input<float>(rstd),
                        pointer(dresidual),
                        pointer(dx),
                        pointer(dweight),
                        pointer<float>(dbias),
                        pointer<float>(partial),
                        rows,
                        cols,
                        stride_dy,
                        stride_dh,
                        stride_h,
                        weight_is_float,
                        {threshold, scale, input<int64_t>(rng), stream},
                        false},
                       DType(dtype), place(device, queue));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
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
          recorder(entry, py::make_tuple(shape[0], shape[1], shape[2]), py::make_tuple(shape[3], shape[4], shape[5]),
                   shared, py::bytes(static_cast<const char*>(params), bytes));
        });
      },
      "f(entry, grid, block, shared_bytes, params) is called in place of every launch; None ends it.");
  bind_layer_norm(m);
  m.def("architectures", &architectures, "Architectures with machine code in this build, as '80,90,100'.");
}
