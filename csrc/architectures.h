// Which GPUs this build has code for. Host only.
#pragma once

#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif

#include <sstream>
#include <string>

namespace nearfield {

#ifdef NEARFIELD_CUDA_ARCHS
constexpr const char* kArchitectures = NEARFIELD_CUDA_ARCHS;
#else
constexpr const char* kArchitectures = "";  // built without CUDA kernels
#endif

// True where code for one of the architectures runs: "80" on 8.0 to 8.9, "90a" on 9.0 only.
inline bool is_built_for(const char* architectures, int capability) {
  std::istringstream archs(architectures);
  for (std::string arch; std::getline(archs, arch, ';');) {
    const int number = std::stoi(arch);
    const bool only = arch.back() < '0' || arch.back() > '9';
    if (only ? number == capability : number / 10 == capability / 10 && number <= capability) return true;
  }
  return false;
}

inline std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace nearfield
