// The operators of same_padding on any device: arguments are checked and results allocated here,
// and filled by the kernels of same_padding.cpp or same_padding_cuda.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "same_padding.h"

namespace bitfast::same_padding {

// Kernels has a DeviceGuard, which is made from a tensor, and the functions pad, pool and pool_backward.
template <typename Kernels>
Tensor same_pad(const Tensor& x, const std::vector<int64_t>& sides, double value) {
  check_feature_maps(x);
  check_dtype(x.scalar_type());
  const Padding padding = padding_from(sides);
  const Size size = padded_size(size_of(x), padding);
  const typename Kernels::DeviceGuard guard(x);
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  Kernels::pad(x, padding, static_cast<float>(value), result);
  return result;
}

template <typename Kernels>
std::tuple<Tensor, Tensor> same_max_pool(
    const Tensor& x, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& dilation, const std::vector<int64_t>& sides, double value, bool with_taps) {
  check_feature_maps(x);
  check_dtype(x.scalar_type());
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const Size size = pooled_size(size_of(x), padding, window);
  const typename Kernels::DeviceGuard guard(x);
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  const ScalarType tap_dtype = dtype_of_taps(window);
  Tensor taps = with_taps ? empty_spatial(x, size.height, size.width, tap_dtype)
                          : torch::stable::new_empty(x, {0}, tap_dtype);
  Kernels::pool(x, window, static_cast<float>(value), result, with_taps ? &taps : nullptr);
  return {result, taps};
}

template <typename Kernels>
Tensor same_max_pool_backward(
    const Tensor& grad, const Tensor& taps, const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
    const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(input_size.size() == 2, "size must be (height, width)");
  check_dtype(grad.scalar_type());
  const Size size{input_size[0], input_size[1]};
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const typename Kernels::DeviceGuard guard(taps);
  const Tensor matching = matching_gradient(grad, taps, size, padding, window);
  Tensor result = empty_spatial(taps, size.height, size.width, grad.scalar_type());
  Kernels::pool_backward(matching, taps, window, result);
  return result;
}

}  // namespace bitfast::same_padding
