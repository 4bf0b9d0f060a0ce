#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fastlm::cuda {

struct Device {
  std::string name;
  int capability;  // 90 for sm_90
  int multiprocessors;
  size_t shared_memory_per_block;  // bytes, the most that a kernel may opt in to
  size_t l2_bytes;
};

std::vector<Device> devices();
std::string architectures();
std::string compiler();

}  // namespace fastlm::cuda
