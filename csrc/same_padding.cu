// same_padding: the CUDA kernels. One thread computes one element of the result, in the order in which
// it lies in memory, so that neighbouring threads write (and, channels_last, read) neighbouring bytes.
#include "errors.h"

#include "same_padding.h"
#include "same_padding_elements.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

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
  const int64_t blocks = (count + threads_per_block - 1) / threads_per_block;
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

Tensor same_pad_cuda(const Tensor& x, const std::vector<int64_t>& sides, double value) {
  check_image_batch(x);
  const Padding padding = padding_from(sides);
  const Size size = padded_size(size_of(x), padding);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pad_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(x.const_data_ptr()), size_of(x), strides_of(x), padding.top, padding.left,
          static_cast<T>(static_cast<float>(value)), static_cast<T*>(result.mutable_data_ptr()),
          layout_of(result), result.numel());
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> same_max_pool_cuda(
    const Tensor& x,
    const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& dilation,
    const std::vector<int64_t>& sides,
    double value,
    bool with_taps) {
  check_image_batch(x);
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const Size size = pooled_size(size_of(x), padding, window);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  Tensor taps = with_taps ? empty_spatial(x, size.height, size.width, ScalarType::Short)
                          : torch::stable::new_empty(x, {0}, ScalarType::Short);
  Tap* tap_data = with_taps ? static_cast<Tap*>(taps.mutable_data_ptr()) : nullptr;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pool_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(x.const_data_ptr()), size_of(x), strides_of(x), window,
          static_cast<T>(static_cast<float>(value)), static_cast<T*>(result.mutable_data_ptr()), tap_data,
          layout_of(result), result.numel());
    });
  });
  return {result, taps};
}

Tensor same_max_pool_backward_cuda(
    const Tensor& grad,
    const Tensor& taps,
    const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& dilation,
    const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(input_size.size() == 2, "size must be (height, width)");
  const Size size{input_size[0], input_size[1]};
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const torch::stable::accelerator::DeviceGuard guard(taps.get_device_index());
  const Tensor matching = matching_gradient(grad, taps, size, padding, window);
  Tensor result = empty_spatial(taps, size.height, size.width, grad.scalar_type());
  dispatch_floating(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_over(result, [&](auto index, unsigned blocks, cudaStream_t stream) {
      pool_backward_kernel<T, decltype(index)><<<blocks, threads_per_block, 0, stream>>>(
          static_cast<const T*>(matching.const_data_ptr()), static_cast<const Tap*>(taps.const_data_ptr()),
          size_of(taps), strides_of(taps), window, static_cast<T*>(result.mutable_data_ptr()),
          layout_of(result), result.numel());
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("same_pad.native", TORCH_BOX(&same_pad_cuda));
  m.impl("same_max_pool.native", TORCH_BOX(&same_max_pool_cuda));
  m.impl("same_max_pool_backward.native", TORCH_BOX(&same_max_pool_backward_cuda));
}

}  // namespace bitfast::same_padding
