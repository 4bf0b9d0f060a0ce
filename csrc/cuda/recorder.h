// The seam that tests take the launches of kernels by: see launch.h.
#pragma once

#include <cstddef>
#include <functional>

namespace fastlm::cuda {

// (entry, {grid x, y, z, block x, y, z}, bytes of dynamic shared memory, parameters, their bytes)
using Recorder = std::function<void(const char*, const unsigned*, size_t, const void*, size_t)>;
void set_recorder(Recorder recorder);
const Recorder& recorder();

// For measuring the host's share of a call: launches are left out, and nobody is told.
void drop_launches(bool on);
// Whether kernels are launched, neither recorded nor dropped. Else no device is asked for anything.
bool on_device();

}  // namespace fastlm::cuda
