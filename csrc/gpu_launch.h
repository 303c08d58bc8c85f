// How the kernels of gpu.h are launched on a GPU, and what is asked of the driver before.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <type_traits>

#include "gpu_device.h"

namespace bitfast::gpu {

template <typename Kernel, typename = void>
constexpr bool needs_wgmma = false;
template <typename Kernel>
constexpr bool needs_wgmma<Kernel, std::void_t<decltype(Kernel::needs_wgmma)>> = Kernel::needs_wgmma;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

// Empty where it cannot run.
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::min_blocks)
    kernel(const __grid_constant__ typename Kernel::Arguments arguments) {
#if defined(__CUDA_ARCH__)
  if constexpr (__CUDA_ARCH__ >= 10 * Kernel::capability && (has_wgmma || !needs_wgmma<Kernel>)) {
    Kernel::run(arguments);
  }
#endif
}

inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The limits of the current device.
inline const char* current_device(Device& device) {
  constexpr int most = 64;
  static Device known[most];
  static std::once_flag flags[most];
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return text_of(error);
  if (index >= most) return "more than 64 CUDA devices are not supported";
  std::call_once(flags[index], [&] {
    auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      cudaDeviceGetAttribute(&value, name, index);
      return value;
    };
    known[index] = {
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
        attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrL2CacheSize)};
  });
  device = known[index];
  return device.capability > 0 ? nullptr : "the CUDA device does not tell its limits";
}

using LaunchAttributes = cudaLaunchAttribute[2];

inline cudaLaunchConfig_t launch_config(
    const LaunchShape& shape, int threads, LaunchAttributes& attributes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// Lets the kernel use as much shared memory as the shape wants, once for each device and kernel.
template <typename Kernel>
const char* allow_shared_bytes(int shared_bytes) {
  constexpr int by_default = 48 * 1024, most = 64;
  if (shared_bytes <= by_default) return nullptr;
  static std::mutex mutex;
  static int allowed[most] = {};
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return text_of(error);
  const std::lock_guard<std::mutex> lock(mutex);
  if (index < most && allowed[index] >= shared_bytes) return nullptr;
  // Of the memory that is L1 cache or shared memory, the latter gets all that it can.
  cudaFuncSetAttribute(
      kernel<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // the error is reported here, and not again by what comes next
    return text_of(error);
  }
  if (index < most) allowed[index] = shared_bytes;
  return nullptr;
}

// How many clusters of this shape work at once. The driver's answer is kept, as it costs microseconds.
template <typename Kernel>
const char* resident_clusters(const LaunchShape& shape, int64_t& clusters) {
  struct Answer {
    int device, cluster, shared_bytes, threads, clusters;
  };
  constexpr int most = 128;
  static std::mutex mutex;
  static Answer answers[most];
  static int count = 0;
  const int threads = threads_of<Kernel>(shape);
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return text_of(error);
  const std::lock_guard<std::mutex> lock(mutex);
  for (int i = 0; i < count; ++i) {
    const Answer& a = answers[i];
    if (a.device == index && a.cluster == shape.cluster && a.shared_bytes == shape.shared_bytes && a.threads == threads) {
      clusters = a.clusters;
      return nullptr;
    }
  }
  if (const char* error = allow_shared_bytes<Kernel>(shape.shared_bytes)) return error;
  LaunchShape one = shape;
  one.blocks = shape.cluster;
  int found = 0;
  cudaError_t error;
  if (shape.cluster > 1) {
    LaunchAttributes attributes;
    cudaLaunchConfig_t config = launch_config(one, threads, attributes, nullptr);
    error = cudaOccupancyMaxActiveClusters(&found, kernel<Kernel>, &config);
  } else {
    Device device;
    if (const char* problem = current_device(device)) return problem;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &found, kernel<Kernel>, threads, static_cast<size_t>(shape.shared_bytes));
    found *= device.multiprocessors;
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return text_of(error);
  }
  if (found < 1) return "the launch shape does not fit on the CUDA device";
  if (count < most) answers[count++] = {index, shape.cluster, shape.shared_bytes, threads, found};
  clusters = found;
  return nullptr;
}

// Launches on a stream of the current device. Returns null, or what went wrong.
template <typename Kernel>
const char* launch(const LaunchShape& shape, const typename Kernel::Arguments& arguments, void* stream) {
  if (shape.blocks == 0) return nullptr;
  if (shape.blocks > INT32_MAX) return "too many blocks for one launch";
  if (const char* error = allow_shared_bytes<Kernel>(shape.shared_bytes)) return error;
  LaunchAttributes attributes;
  const cudaLaunchConfig_t config = launch_config(shape, threads_of<Kernel>(shape), attributes, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel<Kernel>, arguments);
  if (error != cudaSuccess) cudaGetLastError();
  return text_of(error);
}

}  // namespace bitfast::gpu
