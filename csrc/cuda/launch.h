// Launches that are checked. Errors come from the calls themselves, never from
// cudaGetLastError, which would take away one of torch's.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace qk::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

inline std::string sizes_of(dim3 size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

template <class... Expected, class... Actual>
void launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Actual&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(args)...);
  if (status != cudaSuccess) {
    throw std::runtime_error("CUDA: a launch of " + sizes_of(grid) + " blocks of " + sizes_of(block) +
                             " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory failed: " + cudaGetErrorString(status));
  }
}

// Lets the kernel be launched with that much dynamic shared memory; once per kernel and device.
template <class... Parameters>
void raise_shared_limit(void (*kernel)(Parameters...), size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> raised;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& limit = raised[{reinterpret_cast<const void*>(kernel), device}];
  if (limit < bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "raising a kernel's limit of shared memory");
    limit = bytes;
  }
}

inline void fill_zero(void* pointer, size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(pointer, 0, bytes, stream), "filling memory with zeros");
}

// The static runtime keeps its own idea of the current device, which need not be torch's.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    check(cudaSetDevice(device), "choosing a device");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace qk::cuda
