// The only place that launches kernels. If a test has set a recorder, `launch` calls it instead. Grids, template
// choices and parameters are computed as for a device, and tests/ptx executes the kernel.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "recorder.h"

namespace fastlm::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device the current one, and restores the previous one at the end. The launch that follows uses `stream`.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (!on_device()) return;
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Multiprocessors of a device; 2 without one, so that kernels which share out rows among blocks loop there too.
int multiprocessors(int device);

// Bytes of shared memory that a block can have. Without a device it is sm_80's, for which tests execute kernels.
size_t shared_memory(int device);

// Allows a kernel this much dynamic shared memory on the current device, if it must be requested (kUnasked).
void allow_shared(const void* kernel, size_t bytes);

// Blocks of a kernel that are resident at once on all multiprocessors of the current device, which is `device`. The
// runtime is asked once for each kernel. Without a device: one a multiprocessor, so that blocks loop.
int resident_blocks(const void* kernel, int threads, size_t shared, int device);

template <class... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t shared, int device) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared, device);
}

// A grid of this many blocks along x, at most 2^31 - 1. More would lose high bits and leave rows unwritten.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT_MAX)
    throw std::invalid_argument("expected an input of at most 2^31 - 1 blocks of a CUDA kernel, got one of " +
                                std::to_string(blocks) + "; split it");
  return unsigned(blocks);
}

// Appends a parameter where C puts it in a struct.
template <class T>
void append_parameter(std::string& params, const T& value) {
  params.resize((params.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  params.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
  if (on_device()) {
    allow_shared(reinterpret_cast<const void*>(kernel), shared);
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, stream),
          "cudaLaunchKernel");
    return;
  }
  if (!recorder()) return;
  // The host's symbol of a kernel has the name of the device's. It is visible if the kernel is not in an anonymous
  // namespace, since setup.py tells nvcc not to hide it.
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname)
    throw std::runtime_error("a kernel without a visible symbol");
  std::string params;
  (append_parameter<P>(params, static_cast<P>(args)), ...);
  const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  recorder()(info.dli_sname, shape, shared, params.data(), params.size());
}

}  // namespace fastlm::cuda
