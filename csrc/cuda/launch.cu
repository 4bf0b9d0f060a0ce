#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace fastlm::cuda {

static Recorder current;
static bool dropped = false;

void set_recorder(Recorder recorder) { current = std::move(recorder); }

const Recorder& recorder() { return current; }

void drop_launches(bool on) { dropped = on; }

bool on_device() { return !dropped && !current; }

static std::mutex mutex;

// An attribute of a device. The runtime is asked once.
static int attribute(cudaDeviceAttr which, int device) {
  static std::map<std::pair<int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& value = known[{which, device}];
  if (!value) check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

int multiprocessors(int device) { return on_device() ? attribute(cudaDevAttrMultiProcessorCount, device) : 2; }

size_t shared_memory(int device) {
  return on_device() ? attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) : 163 * 1024;
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= kUnasked) return;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "cudaFuncSetAttribute");
  most = bytes;
}

int resident_blocks(const void* kernel, int threads, size_t shared, int device) {
  if (!on_device()) return multiprocessors(device);
  allow_shared(kernel, shared);
  static std::map<std::tuple<const void*, int, size_t, int>, int> known;
  int a_multiprocessor = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    int& value = known[{kernel, threads, shared, device}];
    if (!value) {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, kernel, threads, shared),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      value = std::max(1, value);
    }
    a_multiprocessor = value;
  }
  return a_multiprocessor * multiprocessors(device);
}

}  // namespace fastlm::cuda
