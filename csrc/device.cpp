#include "nearfield/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <memory>
#include <mutex>
#include <vector>

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

// ---- Side streams ----

struct SideStream::Streams {
  int device;
  cudaStream_t side;
  cudaEvent_t begun, done;
  bool taken = true;
};

namespace {

// 0: nothing is being captured.
cudaError_t capture_of(cudaStream_t stream, unsigned long long* id) {
  *id = 0;
  if (stream == nullptr) return cudaSuccess;  // the default stream is never captured
  cudaStreamCaptureStatus status{};
  const cudaError_t e = cudaStreamGetCaptureInfo(stream, &status, id);
  return status == cudaStreamCaptureStatusInvalidated ? cudaErrorStreamCaptureInvalidated : e;
}

std::mutex side_streams_mutex;
// Never destroyed: the driver may be gone when statics are.
auto& side_streams = *new std::vector<std::unique_ptr<SideStream::Streams>>;

}  // namespace

// A stream that has been part of a capture stays so until that ends: then it serves the same capture only.
SideStream::SideStream(void* main) : main_(main), streams_(nullptr), error_(0) {
  int device = 0;
  unsigned long long capture = 0;
  if ((error_ = cudaGetDevice(&device))) return;
  if ((error_ = capture_of(static_cast<cudaStream_t>(main), &capture))) return;
  const std::lock_guard lock(side_streams_mutex);
  for (const auto& streams : side_streams) {
    unsigned long long other = 0;
    if (streams->taken || streams->device != device) continue;
    if (capture_of(streams->side, &other) != cudaSuccess || other != capture) continue;
    streams->taken = true, streams_ = streams.get();
    return;
  }
  auto streams = std::make_unique<Streams>();
  streams->device = device;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  error_ = cudaStreamCreateWithFlags(&streams->side, cudaStreamNonBlocking);
  for (cudaEvent_t* event : {&streams->begun, &streams->done})
    if (error_ == 0) error_ = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error_ != 0) return;
  streams_ = streams.get();
  side_streams.push_back(std::move(streams));
}

SideStream::~SideStream() {
  if (streams_ == nullptr) return;
  join();
  const std::lock_guard lock(side_streams_mutex);
  streams_->taken = false;
}

void* SideStream::stream() const { return streams_ == nullptr ? nullptr : streams_->side; }
void* SideStream::event() const { return streams_ == nullptr ? nullptr : streams_->begun; }

int SideStream::wait() {
  if (error_ != 0) return error_;
  joined_ = false;
  return cudaStreamWaitEvent(streams_->side, streams_->begun, 0);
}

int SideStream::join() {
  if (error_ != 0 || joined_) return error_;
  joined_ = true;
  if (const cudaError_t e = cudaEventRecord(streams_->done, streams_->side)) return e;
  return cudaStreamWaitEvent(static_cast<cudaStream_t>(main_), streams_->done, 0);
}

}  // namespace nearfield
