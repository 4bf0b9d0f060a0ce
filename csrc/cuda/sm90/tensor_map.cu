#include <cudaTypedefs.h>

#include <cstring>
#include <string>

#include "../launch.h"
#include "tensor_map.h"

namespace fastlm::cuda::sm90 {

constexpr int kRank = 4, kItem = 2;

// The driver's function, through the runtime, so that nothing links to the driver.
static PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
#endif
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; expected one for CUDA 12.0 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return found;
}

// tests/ptx/core/ops_bulk.cpp: TensorMap.
struct Description {
  uint64_t magic, address;
  uint32_t rank, element;
  uint64_t sizes[5], strides[5];
  uint32_t box[5], swizzle;
};

static void refuse(const char* name, const char* expected, uint64_t got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got) +
                              "; use a copy (.clone())");
}

CUtensorMap tensor_map(const char* name, const Rows& x, Sizes n, DType dtype, int box_rows) {
  const cuuint64_t sizes[kRank] = {cuuint64_t(n.d), cuuint64_t(n.heads), cuuint64_t(n.rows), cuuint64_t(n.sequences)};
  const int64_t elements[kRank - 1] = {x.head, x.row, x.sequence};
  cuuint64_t strides[kRank - 1], dense = kItem;  // bytes
  for (int k = 0; k < kRank - 1; ++k) {
    dense *= sizes[k];
    strides[k] = sizes[k + 1] == 1 ? dense : elements[k] * kItem;  // of a single element it is checked, but not used
    if (!strides[k] || strides[k] % 16 || strides[k] >> 40)
      refuse(name, "strides of 16 bytes to 2^40, multiples of 16 bytes, for TMA", strides[k]);
  }
  const uint64_t address = reinterpret_cast<uintptr_t>(x.data);
  if (address % 16) refuse(name, "an address that is a multiple of 16 bytes, for TMA", address);
  const cuuint32_t box[kRank] = {64, 1, cuuint32_t(box_rows), 1}, steps[kRank] = {1, 1, 1, 1};
  CUtensorMap map{};
  if (!on_device()) {
    Description to{0x70616D2D787470, address, kRank, kItem, {}, {kItem}, {}, 128};
    for (int k = 0; k < 5; ++k) to.sizes[k] = k < kRank ? sizes[k] : 1, to.box[k] = k < kRank ? box[k] : 1;
    for (int k = 1; k < kRank; ++k) to.strides[k] = strides[k - 1];
    static_assert(sizeof to <= sizeof map);
    std::memcpy(&map, &to, sizeof to);
    return map;
  }
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encoder()(&map, type, kRank, const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("cuTensorMapEncodeTiled of ") + name + ": error " +
                             std::to_string(int(result)));
  return map;
}

}  // namespace fastlm::cuda::sm90
