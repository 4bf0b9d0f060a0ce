// Addresses in the bindings that pybind11 makes: `tensor.data_ptr()` as an integer, 0 for an absent tensor.
#pragma once

#include <cstdint>

namespace fastlm {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T = void>
const T* input(Address address) {
  return reinterpret_cast<const T*>(address);
}

}  // namespace fastlm
