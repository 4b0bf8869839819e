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

// A stream of the current device beside another, for kernels that are to run beside one of its kernels. Both
// may belong to a graph that is being captured. Functions return a cudaError_t.
class SideStream {
 public:
  explicit SideStream(void* main);  // a cudaStream_t
  ~SideStream();                    // joins, if that has not been done
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  void* stream() const;
  void* event() const;  // for a launch to the main stream to record; then
  int wait();           // what is launched here from now on waits for it
  int join();           // what is launched to the main stream from now on waits for what is here

  struct Streams;

 private:
  void* main_;
  Streams* streams_;
  bool joined_ = true;
  int error_;
};

}  // namespace nearfield
