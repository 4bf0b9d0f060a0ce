// Lets a torch that was built for the CPU run autograd on fake tensors of device "cuda": one device, one stream, and no
// memory. Loaded by LD_PRELOAD, since torch resolves getAccelerator when it is loaded.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

const Device kDevice{DeviceType::CUDA, 0};
const Stream kStream{Stream::DEFAULT, kDevice};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return kStream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : CUDAHooksInterface {  // torch finds it by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
Stream getCurrentStream(DeviceIndex) { return kStream; }
}  // namespace accelerator

}  // namespace at
