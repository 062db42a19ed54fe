// Launch helpers shared by the CUDA kernels.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace supy {

inline void check_cuda(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("supy.") + op + ": CUDA error " + std::to_string(status) + ": " +
                           cudaGetErrorString(status));
}

// Makes `device` current for one launch and restores the caller's afterwards.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op);
    if (device != previous_) check_cuda(cudaSetDevice(device), op);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Blocks for a grid-stride loop over `items`: enough to fill any current device, never beyond the grid's limit.
inline unsigned int grid_for(int64_t items, int threads) {
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned int>(blocks < 65536 ? blocks : 65536);
}

}  // namespace supy
