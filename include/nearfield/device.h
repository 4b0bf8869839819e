// What the Torch side asks about the GPU, without CUDA headers. Built only with CUDA.
#pragma once

namespace nearfield {

// Text of a cudaError_t returned by a kernel launcher.
const char* cuda_error_string(int error);

struct DeviceInfo {
  int capability;  // 10 * major + minor
  int num_sms;
};
DeviceInfo device_info(int device);  // read once per device

}  // namespace nearfield
