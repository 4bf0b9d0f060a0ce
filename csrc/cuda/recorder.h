// Lets tests take over the launches of kernels: see launch.h.
#pragma once

#include <cstddef>
#include <functional>

namespace fastlm::cuda {

// (entry, {grid x, y, z, block x, y, z}, bytes of dynamic shared memory, parameters, their bytes)
using Recorder = std::function<void(const char*, const unsigned*, size_t, const void*, size_t)>;
void set_recorder(Recorder recorder);
const Recorder& recorder();

// Bytes of dynamic shared memory up to which a launch requests nothing. Unrequested are 48 KB, static memory included:
// the rest is left to that. tests/test_cuda.py compares it with what the kernels have.
constexpr size_t kUnasked = 32 * 1024;

// For measuring the host's share of a call: launches are left out, without a recorder.
void drop_launches(bool on);
// Whether kernels are launched, neither recorded nor dropped. If not, the device is not used at all.
bool on_device();

}  // namespace fastlm::cuda
