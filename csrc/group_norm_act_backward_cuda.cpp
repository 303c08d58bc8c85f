// group_norm_act_backward.native and group_norm_act_recompute.native on CUDA tensors; csrc/group_norm_act.cpp has their
// schemas.
#include "errors.h"

#include "group_norm_act_backward_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "activation.h"
#include "checks.h"
#include "cuda_tensors.h"
#include "memory_format.h"

namespace bitfast::group_norm_act_backward {
namespace {

void check_feature_map(const char* name, const Tensor& map, const Tensor& x) {
  STD_TORCH_CHECK(map.dim() == 4 && map.scalar_type() == x.scalar_type(), name, " must be like x");
  STD_TORCH_CHECK(have_same_shape(map, x), name, " must have the shape of x");
  STD_TORCH_CHECK(map.get_device_index() == x.get_device_index(), name, " must be on the device of x");
}

void check_arguments(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups) {
  check_feature_maps(x);
  check_num_groups(x, num_groups);
  check_feature_map("grad", grad, x);
  if (grad_total.has_value()) {
    check_feature_map("grad_total", *grad_total, x);
  }
  for (const Tensor* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(
        parameter->dim() == 1 && parameter->size(0) == x.size(1), "weight and bias must have shape (C,)");
  }
  check_statistics(mean, rstd, x.size(0) * num_groups, "of shape (N, num_groups)");
  for (const Tensor* tensor : {&weight, &bias, &mean, &rstd}) {
    STD_TORCH_CHECK(tensor->get_device_index() == x.get_device_index(), "all tensors must be on the device of x");
  }
}

Tensor in_dtype_of(const Tensor& parameter, const Tensor& gradient) {
  const ScalarType dtype = parameter.scalar_type();
  return gradient.scalar_type() == dtype ? gradient : torch::stable::to(gradient, dtype);
}

// The gradients of x, weight and bias, and the result of the forward pass if it is computed again.
struct Gradients {
  Tensor x, weight, bias, result;
};

Gradients gradients_of(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, Activation activation,
    bool recomputes) {
  check_arguments(grad, grad_total, x, weight, bias, mean, rstd, num_groups);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor dense_weight = readable_parameter(weight), dense_bias = readable_parameter(bias);
  GroupNormActBackwardCall call = {};
  call.images = x.size(0);
  call.pixels = x.size(2) * x.size(3);
  call.channels = x.size(1);
  call.groups = num_groups;
  call.dtype = number_of(x);
  call.weight_dtype = number_of(dense_weight);
  call.bias_dtype = number_of(dense_bias);
  call.activation = static_cast<int32_t>(activation);
  int64_t bytes = 0;
  check_launch(bitfast_group_norm_act_backward_workspace(&call, &bytes));

  const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  const Tensor dense_x = readable(x), dense_grad = readable(grad);
  const std::optional<Tensor> dense_total =
      grad_total.has_value() ? std::optional<Tensor>(readable(*grad_total)) : std::nullopt;
  const Tensor grad_x = empty_channels_last(x);
  Tensor result;
  if (recomputes) result = empty_channels_last(x);
  const Tensor grad_weight = torch::stable::new_empty(dense_weight, {call.channels});
  const Tensor grad_bias = torch::stable::new_empty(dense_bias, {call.channels});
  check_launch(bitfast_group_norm_act_backward(
      &call, current_stream(x), dense_grad.const_data_ptr(),
      dense_total.has_value() ? dense_total->const_data_ptr() : nullptr, dense_x.const_data_ptr(),
      dense_weight.const_data_ptr(), dense_bias.const_data_ptr(), static_cast<const float*>(mean.const_data_ptr()),
      static_cast<const float*>(rstd.const_data_ptr()), grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
      grad_bias.mutable_data_ptr(), recomputes ? result.mutable_data_ptr() : nullptr, workspace.mutable_data_ptr()));
  const auto in_format_of_x = [&](const Tensor& map) { return torch::stable::contiguous(map, memory_format_of(x)); };
  return {
      in_format_of_x(grad_x), in_dtype_of(weight, grad_weight), in_dtype_of(bias, grad_bias),
      recomputes ? in_format_of_x(result) : result};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, StringHandle activation) {
  const Gradients gradients =
      gradients_of(grad, grad_total, x, weight, bias, mean, rstd, num_groups, take_activation(activation), false);
  return {gradients.x, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act_recompute(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, StringHandle activation) {
  const Gradients gradients =
      gradients_of(grad, grad_total, x, weight, bias, mean, rstd, num_groups, take_activation(activation), true);
  return {gradients.x, gradients.weight, gradients.bias, gradients.result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("group_norm_act_backward.native", TORCH_BOX(&group_norm_act_backward));
  m.impl("group_norm_act_recompute.native", TORCH_BOX(&group_norm_act_recompute));
}

}  // namespace bitfast::group_norm_act_backward
