// same_padding: the operators on CUDA tensors.
#include "errors.h"

#include "same_padding_cuda.h"
#include "cuda_tensors.h"
#include "same_padding_operators.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace bitfast::same_padding {
namespace {

// For a map of x's size, in images, channels and pixels, that becomes `result`.
SamePaddingCall call_of(
    const Tensor& x, const Tensor& result, ScalarType dtype, const Window& window, float value) {
  SamePaddingCall call = {};
  call.images = x.size(0);
  call.channels = x.size(1);
  call.height = x.size(2);
  call.width = x.size(3);
  call.result_height = result.size(2);
  call.result_width = result.size(3);
  call.image_stride = x.stride(0);
  call.channel_stride = x.stride(1);
  call.row_stride = x.stride(2);
  call.pixel_stride = x.stride(3);
  call.top = window.top;
  call.left = window.left;
  call.kernel_height = window.kernel_height;
  call.kernel_width = window.kernel_width;
  call.stride_height = window.stride_height;
  call.stride_width = window.stride_width;
  call.dilation_height = window.dilation_height;
  call.dilation_width = window.dilation_width;
  call.value = value;
  call.dtype = number_of(dtype);
  return call;
}

struct CudaKernels {
  struct DeviceGuard {
    explicit DeviceGuard(const Tensor& x) : guard(x.get_device_index()) {}
    const torch::stable::accelerator::DeviceGuard guard;
  };

  static void pad(const Tensor& x, const Padding& padding, float value, const Tensor& result) {
    const Window window{1, 1, 1, 1, 1, 1, padding.top, padding.left};
    SamePaddingCall call = call_of(x, result, x.scalar_type(), window, value);
    call.channels_last = is_channels_last(x);
    check_launch(bitfast_same_pad(&call, current_stream(x), x.const_data_ptr(), result.mutable_data_ptr()));
  }

  static void pool(const Tensor& x, const Window& window, float value, const Tensor& result, const Tensor* taps) {
    SamePaddingCall call = call_of(x, result, x.scalar_type(), window, value);
    call.channels_last = is_channels_last(x);
    check_launch(bitfast_same_max_pool(
        &call, current_stream(x), x.const_data_ptr(), result.mutable_data_ptr(),
        taps == nullptr ? nullptr : taps->mutable_data_ptr()));
  }

  static void pool_backward(const Tensor& grad, const Tensor& taps, const Window& window, const Tensor& result) {
    SamePaddingCall call = call_of(result, taps, grad.scalar_type(), window, 0);
    call.channels_last = is_channels_last(taps);
    check_launch(bitfast_same_max_pool_backward(
        &call, current_stream(taps), grad.const_data_ptr(), taps.const_data_ptr(), result.mutable_data_ptr()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("same_pad.native", TORCH_BOX(&same_pad<CudaKernels>));
  m.impl("same_max_pool.native", TORCH_BOX(&same_max_pool<CudaKernels>));
  m.impl("same_max_pool_backward.native", TORCH_BOX(&same_max_pool_backward<CudaKernels>));
}

}  // namespace bitfast::same_padding
