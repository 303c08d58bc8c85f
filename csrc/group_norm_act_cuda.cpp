// group_norm_act, forward, on CUDA tensors; csrc/group_norm_act.cpp has the schemas, and
// bitfast/ops/group_norm_act_contract.py says what each takes and returns.
#include "errors.h"

#include "group_norm_act_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "activation.h"
#include "checks.h"
#include "cuda_tensors.h"
#include "memory_format.h"

namespace bitfast::group_norm_act {
namespace {

using torch::stable::accelerator::DeviceGuard;

// The arguments that all norms have.
struct Norm {
  const Tensor &weight, &bias;
  int64_t num_groups;
  double eps;
  Activation activation;
};

void check_feature_map(const char* name, const Tensor& map, const Tensor& x) {
  STD_TORCH_CHECK(map.dim() == 4 && map.scalar_type() == x.scalar_type(), name, " must be like x");
  STD_TORCH_CHECK(have_same_shape(map, x), name, " must have the shape of x");
  STD_TORCH_CHECK(map.get_device_index() == x.get_device_index(), name, " must be on the device of x");
}

void check_arguments(const Tensor& x, const Norm& norm) {
  check_feature_maps(x);
  check_num_groups(x, norm.num_groups);
  for (const Tensor* parameter : {&norm.weight, &norm.bias}) {
    STD_TORCH_CHECK(
        parameter->dim() == 1 && parameter->size(0) == x.size(1), "weight and bias must have shape (C,)");
    STD_TORCH_CHECK(
        parameter->get_device_index() == x.get_device_index(), "weight and bias must be on the device of x");
  }
}

// Launches the kernels on maps that are dense with channels innermost. mean and rstd are null, or of shape (N, groups).
void launch(
    const Tensor& x, const Tensor* residual, const Norm& norm, const Tensor* total, const Tensor& result, float* mean,
    float* rstd) {
  const Tensor weight = readable_parameter(norm.weight), bias = readable_parameter(norm.bias);
  GroupNormActCall call = {};
  call.images = x.size(0);
  call.pixels = x.size(2) * x.size(3);
  call.channels = x.size(1);
  call.groups = norm.num_groups;
  call.eps = static_cast<float>(norm.eps);
  call.activation = static_cast<int32_t>(norm.activation);
  call.dtype = number_of(x);
  call.weight_dtype = number_of(weight);
  call.bias_dtype = number_of(bias);
  call.is_aligned = is_aligned(x) && is_aligned(result) && (residual == nullptr || is_aligned(*residual)) &&
                    (total == nullptr || is_aligned(*total));
  int64_t bytes = 0;
  check_launch(bitfast_group_norm_act_workspace(&call, &bytes));
  std::optional<Tensor> workspace;
  if (bytes > 0) {
    workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  }
  check_launch(bitfast_group_norm_act_forward(
      &call, current_stream(x), x.const_data_ptr(), residual != nullptr ? residual->const_data_ptr() : nullptr,
      weight.const_data_ptr(), bias.const_data_ptr(), total != nullptr ? total->mutable_data_ptr() : nullptr,
      result.mutable_data_ptr(), mean, rstd, workspace.has_value() ? workspace->mutable_data_ptr() : nullptr));
}

// Total (x itself without a residual), result, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor* residual, const Norm& norm) {
  check_arguments(x, norm);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = memory_format_of(x);
  const Tensor result = empty_channels_last(x);
  const Tensor mean = torch::stable::new_empty(x, {x.size(0), norm.num_groups}, ScalarType::Float);
  const Tensor rstd = torch::stable::new_empty(mean, {x.size(0), norm.num_groups});
  auto* means = static_cast<float*>(mean.mutable_data_ptr());
  auto* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  const Tensor dense = readable(x);
  if (residual == nullptr) {
    launch(dense, nullptr, norm, nullptr, result, means, rstds);
    return {x, torch::stable::contiguous(result, format), mean, rstd};
  }
  check_feature_map("residual", *residual, x);
  const Tensor dense_residual = readable(*residual), total = empty_channels_last(x);
  launch(dense, &dense_residual, norm, &total, result, means, rstds);
  return {torch::stable::contiguous(total, format), torch::stable::contiguous(result, format), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups, double eps,
    StringHandle activation) {
  const Norm norm{weight, bias, num_groups, eps, take_activation(activation)};
  auto [total, result, mean, rstd] = forward(x, nullptr, norm);
  return {result, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_act(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, int64_t num_groups, double eps,
    StringHandle activation) {
  return forward(x, &residual, {weight, bias, num_groups, eps, take_activation(activation)});
}

// The result alone, in memory of the caller's, which may be that of x.
void group_norm_act_into(
    const Tensor& x, const std::optional<Tensor>& moments, const Tensor& weight, const Tensor& bias, int64_t num_groups,
    double eps, StringHandle activation, const std::optional<Tensor>& shortcut, const Tensor& result) {
  STD_TORCH_CHECK(!moments.has_value() && !shortcut.has_value(), "the CUDA kernels take no moments and no shortcut");
  const Norm norm{weight, bias, num_groups, eps, take_activation(activation)};
  check_arguments(x, norm);
  check_feature_map("result", result, x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor dense = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor dense_result = torch::stable::contiguous(result, MemoryFormat::ChannelsLast);
  launch(dense, nullptr, norm, nullptr, dense_result, nullptr, nullptr);
  if (dense_result.const_data_ptr() != result.const_data_ptr()) {
    Tensor given = result;
    torch::stable::copy_(given, dense_result);
  }
}

void group_norm_act_in_place(
    const Tensor& x, const std::optional<Tensor>& moments, const Tensor& weight, const Tensor& bias, int64_t num_groups,
    double eps, StringHandle activation, const std::optional<Tensor>& shortcut) {
  group_norm_act_into(x, moments, weight, bias, num_groups, eps, activation, shortcut, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("group_norm_act.native", TORCH_BOX(&group_norm_act));
  m.impl("group_norm_act_.native", TORCH_BOX(&group_norm_act_in_place));
  m.impl("group_norm_act_into.native", TORCH_BOX(&group_norm_act_into));
  m.impl("add_group_norm_act.native", TORCH_BOX(&add_group_norm_act));
}

}  // namespace bitfast::group_norm_act
