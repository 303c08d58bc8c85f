// same_padding: the kernels on CUDA GPUs. One thread computes one element of the result, in the order in which
// it lies in memory, so that neighbouring threads write (and, channels_last, read) neighbouring bytes.
#include "errors.h"

#include "same_padding_operators.h"
#include "same_padding_elements.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "ceil_div.h"

namespace bitfast::same_padding {
namespace {

constexpr int threads_per_block = 256;

Layout layout_of(const Tensor& x) {
  return {x.size(1), x.size(2), x.size(3), is_channels_last(x)};
}

Strides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

__device__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
}

template <typename T, typename Index>
__global__ void pad_kernel(
    const T* x, Size size, Strides strides, int64_t top, int64_t left, T value, T* result, Layout layout,
    int64_t count) {
  const int64_t offset = thread_index();
  if (offset < count) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    result[offset] = padded_element(x, size, strides, top, left, value, at);
  }
}

template <typename T, typename Index>
__global__ void pool_kernel(
    const T* x, Size size, Strides strides, Window window, T pad, T* result, Tap* taps, Layout layout,
    int64_t count) {
  const int64_t offset = thread_index();
  if (offset < count) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    const Maximum<T> maximum = pooled_element(x, size, strides, window, pad, at);
    result[offset] = maximum.value;
    if (taps != nullptr) {
      taps[offset] = maximum.tap;
    }
  }
}

template <typename T, typename Index>
__global__ void pool_backward_kernel(
    const T* grad, const Tap* taps, Size pooled, Strides strides, Window window, T* result, Layout layout,
    int64_t count) {
  const int64_t offset = thread_index();
  if (offset < count) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    result[offset] = gradient_element(grad, taps, pooled, strides, window, at);
  }
}

// Launches on the current stream of the tensor's device, with 32-bit arithmetic where the result allows
// it: launch(Index{}, blocks, stream).
template <typename Launch>
void launch_over(const Tensor& result, const Launch& launch) {
  const int64_t count = result.numel();
  if (count == 0) {
    return;
  }
  const int64_t blocks = ceil_div(count, threads_per_block);
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "the result has too many elements: ", count);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(result.get_device_index(), &stream));
  if (count <= std::numeric_limits<uint32_t>::max()) {
    launch(uint32_t{}, static_cast<unsigned>(blocks), static_cast<cudaStream_t>(stream));
  } else {
    launch(int64_t{}, static_cast<unsigned>(blocks), static_cast<cudaStream_t>(stream));
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "launch failed: ", cudaGetErrorString(error));
}

struct CudaKernels {
  struct DeviceGuard {
    explicit DeviceGuard(const Tensor& x) : guard(x.get_device_index()) {}
    const torch::stable::accelerator::DeviceGuard guard;
  };

  template <typename T>
  static void pad(const Tensor& x, const Padding& padding, T value, const Tensor& result) {
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pad_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(x.const_data_ptr()), size_of(x), strides_of(x), padding.top, padding.left, value,
          static_cast<T*>(result.mutable_data_ptr()), layout_of(result), result.numel());
    });
  }

  template <typename T>
  static void pool(const Tensor& x, const Window& window, T pad, const Tensor& result, Tap* taps) {
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pool_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(x.const_data_ptr()), size_of(x), strides_of(x), window, pad,
          static_cast<T*>(result.mutable_data_ptr()), taps, layout_of(result), result.numel());
    });
  }

  template <typename T>
  static void pool_backward(const Tensor& grad, const Tensor& taps, const Window& window, const Tensor& result) {
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pool_backward_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(grad.const_data_ptr()), static_cast<const Tap*>(taps.const_data_ptr()), size_of(taps),
          strides_of(taps), window, static_cast<T*>(result.mutable_data_ptr()), layout_of(result), result.numel());
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("same_pad.native", TORCH_BOX(&same_pad<CudaKernels>));
  m.impl("same_max_pool.native", TORCH_BOX(&same_max_pool<CudaKernels>));
  m.impl("same_max_pool_backward.native", TORCH_BOX(&same_max_pool_backward<CudaKernels>));
}

}  // namespace bitfast::same_padding
