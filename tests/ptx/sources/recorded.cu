// Host code whose launches can be executed by the interpreter: the seam that csrc/cuda needs. See docs/ptx.md.
//
// `launch` is the only place that launches. With a recorder set it hands over the kernel's name, the configuration and
// the bytes of the parameters instead; grids, template choices and strides are computed as for a device.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>

using Recorder = void (*)(const char* entry, const unsigned* grid_and_block, size_t shared, const void* params,
                          size_t bytes);
static Recorder recorder = nullptr;

// Appends a parameter where C puts it in a struct.
template <class T>
void append(std::string& params, const T& value) {
  params.resize((params.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  params.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
  if (!recorder) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    if (cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, stream) != cudaSuccess) {
      throw std::runtime_error("launch failed");
    }
    return;
  }
  // The host's symbol of a kernel has the name of the device's. It must be visible, which since CUDA 13 takes
  // -static-global-template-stub=false and -device-entity-has-hidden-visibility=false.
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname)
    throw std::runtime_error("a kernel without a visible symbol");
  std::string params;
  (append<P>(params, static_cast<P>(args)), ...);
  unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  recorder(info.dli_sname, shape, shared, params.data(), params.size());
}

struct Rows {
  const float* x;
  float* y;
  int cols;
};

template <int VECTOR>
__global__ void scale_rows(Rows rows, const float* factor, long stride) {
  for (int c = threadIdx.x; c < rows.cols / VECTOR; c += blockDim.x) {
    for (int k = 0; k < VECTOR; ++k) {
      rows.y[blockIdx.x * stride + c * VECTOR + k] = rows.x[blockIdx.x * stride + c * VECTOR + k] * factor[blockIdx.x];
    }
  }
}

extern "C" void record(Recorder r) { recorder = r; }

extern "C" void scale(const float* x, float* y, const float* factor, int n, int cols, long stride) {
  Rows rows{x, y, cols};
  if (cols % 4 == 0) {
    launch(scale_rows<4>, n, 64, 0, nullptr, rows, factor, stride);
  } else {
    launch(scale_rows<1>, n, 64, 0, nullptr, rows, factor, stride);
  }
}
