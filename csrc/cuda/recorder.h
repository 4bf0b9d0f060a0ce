// The seam that tests take the launches of kernels by: see launch.h.
#pragma once

#include <cstddef>
#include <functional>

namespace fastlm::cuda {

// (entry, {grid x, y, z, block x, y, z}, bytes of dynamic shared memory, parameters, their bytes)
using Recorder = std::function<void(const char*, const unsigned*, size_t, const void*, size_t)>;
void set_recorder(Recorder recorder);
const Recorder& recorder();

}  // namespace fastlm::cuda
