// The properties of the devices, from the CUDA runtime: for `fastlm info`, and for choosing a kernel's configuration.
#include <cuda_runtime.h>

#include <stdexcept>

#include "device.h"
#include "launch.h"

#define FASTLM_STRING_(...) #__VA_ARGS__
#define FASTLM_STRING(...) FASTLM_STRING_(__VA_ARGS__)

namespace fastlm::cuda {

std::vector<Device> devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<Device> out;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, i), "cudaGetDeviceProperties");
    out.push_back(
        {p.name, 10 * p.major + p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin, size_t(p.l2CacheSize)});
  }
  return out;
}

// The architectures for which nvcc compiles this file: "800,900,1000" for sm_80, sm_90 and sm_100.
std::string architectures() { return FASTLM_STRING(__CUDA_ARCH_LIST__); }

std::string compiler() {
  return FASTLM_STRING(__CUDACC_VER_MAJOR__) "." FASTLM_STRING(__CUDACC_VER_MINOR__) "." FASTLM_STRING(
      __CUDACC_VER_BUILD__);
}

}  // namespace fastlm::cuda
