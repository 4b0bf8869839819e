#include "nearfield/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

namespace nearfield {

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

DeviceInfo device_info(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceInfo, kMaxDevices> known{};
  static std::array<std::once_flag, kMaxDevices> once;
  std::call_once(once[device], [&] {
    int major = 0, minor = 0, sms = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    known[device] = {10 * major + minor, sms};
  });
  return known[device];
}

}  // namespace nearfield
