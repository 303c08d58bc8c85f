// The arguments of same_padding, checked, and its dtypes:
// what the operators and their kernels on CPUs and GPUs share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "checks.h"
#include "errors.h"
#include "memory_format.h"
#include "same_padding_geometry.h"

namespace bitfast::same_padding {

inline Size size_of(const Tensor& x) {
  return {x.size(2), x.size(3)};
}

inline Padding padding_from(const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(
      padding.size() == 4, "padding must be (top, bottom, left, right), got ", padding.size(), " numbers");
  return {padding[0], padding[1], padding[2], padding[3]};
}

inline Window window_from(
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
    const Padding& padding) {
  for (const auto* pair : {&kernel_size, &stride, &dilation}) {
    STD_TORCH_CHECK(
        pair->size() == 2 && (*pair)[0] > 0 && (*pair)[1] > 0,
        "kernel_size, stride and dilation must each be two positive numbers (height, width)");
  }
  STD_TORCH_CHECK(
      kernel_size[0] <= max_window && kernel_size[1] <= max_window &&
          kernel_size[0] * kernel_size[1] <= max_window,
      "kernel_size must cover at most ", max_window, " pixels, got ", kernel_size[0], " x ", kernel_size[1]);
  STD_TORCH_CHECK(
      padding.top >= 0 && padding.bottom >= 0 && padding.left >= 0 && padding.right >= 0,
      "the padding of a pool must not be negative");
  Window window;
  window.kernel_height = kernel_size[0];
  window.kernel_width = kernel_size[1];
  window.stride_height = stride[0];
  window.stride_width = stride[1];
  window.dilation_height = dilation[0];
  window.dilation_width = dilation[1];
  window.top = padding.top;
  window.left = padding.left;
  return window;
}

inline Size padded_size(Size size, const Padding& padding) {
  const Size result{size.height + padding.top + padding.bottom, size.width + padding.left + padding.right};
  STD_TORCH_CHECK(
      result.height >= 0 && result.width >= 0,
      "cannot crop more than the ", size.height, " x ", size.width, " pixels that there are");
  return result;
}

inline int64_t pooled_length(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t span = (kernel - 1) * dilation + 1;
  STD_TORCH_CHECK(
      padded >= span, "x must be at least as large as the window once it is padded: ", padded, " < ", span);
  return (padded - span) / stride + 1;
}

inline Size pooled_size(Size size, const Padding& padding, const Window& window) {
  const Size padded = padded_size(size, padding);
  return {
      pooled_length(padded.height, window.kernel_height, window.stride_height, window.dilation_height),
      pooled_length(padded.width, window.kernel_width, window.stride_width, window.dilation_width)};
}

inline ScalarType dtype_of_taps(const Window& window) {
  return window.kernel_height * window.kernel_width <= byte_window ? ScalarType::Byte : ScalarType::Short;
}

// Calls function(Tap{}) with the C++ type of a window's taps.
template <typename Function>
void dispatch_taps(const Window& window, const Function& function) {
  if (dtype_of_taps(window) == ScalarType::Byte) {
    function(uint8_t{});
  } else {
    function(int16_t{});
  }
}

// The gradient in the layout of the taps, which say where that of each pooled pixel goes.
inline Tensor matching_gradient(
    const Tensor& grad, const Tensor& taps, Size size, const Padding& padding, const Window& window) {
  const ScalarType dtype = dtype_of_taps(window);
  STD_TORCH_CHECK(
      taps.dim() == 4 && taps.scalar_type() == dtype, "taps must be 4-D and ",
      dtype == ScalarType::Byte ? "uint8" : "int16");
  STD_TORCH_CHECK(
      taps.is_contiguous() || is_channels_last(taps), "taps must be contiguous or channels_last");
  const Size pooled = pooled_size(size, padding, window);
  STD_TORCH_CHECK(
      pooled.height == taps.size(2) && pooled.width == taps.size(3), "taps do not fit the size of x");
  STD_TORCH_CHECK(grad.dim() == 4, "grad must be 4-D");
  STD_TORCH_CHECK(have_same_shape(grad, taps), "grad must have the shape of taps");
  return torch::stable::contiguous(grad, memory_format_of(taps));
}

inline void check_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "same_padding: the native kernels support float32, bfloat16 and float16");
}

// Calls function(T{}) with the C++ type of a dtype that check_dtype lets pass.
template <typename Function>
void dispatch_floating(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    default:
      return function(float{});
  }
}

}  // namespace bitfast::same_padding
