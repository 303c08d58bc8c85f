// The backward pass of group_norm_act on CUDA GPUs: the entries, which plan and launch.
#include "gpu.h"

#include <cmath>
#include <type_traits>

#include "group_norm_act_backward_cuda.h"
#include "group_norm_act_backward_on_chip.h"
#include "group_norm_act_backward_plan.h"
#include "group_norm_act_backward_two_pass.h"

namespace bitfast::group_norm_act_backward {
namespace {

using Call = GroupNormActBackwardCall;

struct Addresses {
  const void *grad, *grad_total, *x, *weight, *bias;
  const float *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;
  void* result;  // null: nobody wants it
  void* workspace;
};

const char* plan_call(const Call& call, BackwardPlan& plan, Device& device) {
  if (const char* error = current_device(device)) return error;
  if (call.images < 0 || call.pixels < 1 || call.groups < 1 || call.channels < 1 || call.channels % call.groups != 0) {
    return "group_norm_act: the sizes of the backward pass are wrong";
  }
  const auto activation = static_cast<Activation>(call.activation);
  const bool is_simple = activation == Activation::none || activation == Activation::relu;
  const int element_bytes = static_cast<Dtype>(call.dtype) == Dtype::float32 ? 4 : 2;
  plan = plan_backward(call.images, call.pixels, call.channels, call.groups, element_bytes, is_simple, device);
  return nullptr;
}

// Calls function with whether the result is written, a constant: what does not write it pays nothing for it.
template <typename Function>
const char* dispatch_recomputing(const void* result, const Function& function) {
  return result != nullptr ? function(std::true_type{}) : function(std::false_type{});
}

template <typename Kernel>
const char* launch_on_chip(const OnChipArguments& arguments, void* stream) {
  const OnChipPlan& plan = arguments.plan;
  LaunchShape shape{plan.cluster, plan.cluster, plan.shared_bytes};
  int64_t resident = 0;
  if (const char* error = resident_clusters<Kernel>(shape, resident)) return error;
  // As many as work at once, or fewer if all have then as much to do.
  const int64_t rounds = ceil_div(arguments.units, resident);
  shape.blocks = ceil_div(arguments.units, rounds) * plan.cluster;
  return launch<Kernel>(shape, arguments, stream);
}

int64_t distance(const void* from, const void* to) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from));
}

const char* run_on_chip(const Call& call, const BackwardPlan& plan, const Addresses& at, void* stream) {
  OnChipArguments arguments{};
  arguments.grad = static_cast<const unsigned char*>(at.grad);
  arguments.grad_total = static_cast<const unsigned char*>(at.grad_total);
  arguments.x = static_cast<const unsigned char*>(at.x);
  arguments.grad_x = static_cast<unsigned char*>(at.grad_x);
  arguments.weight = at.weight;
  arguments.bias = at.bias;
  arguments.mean = at.mean;
  arguments.rstd = at.rstd;
  arguments.sums = static_cast<float*>(at.workspace);
  arguments.plan = plan.on_chip;
  arguments.slices = static_cast<int>(call.channels / plan.on_chip.width);
  arguments.units = static_cast<int>(call.images) * arguments.slices;
  arguments.pixels = static_cast<int>(call.pixels);
  arguments.channels = static_cast<int>(call.channels);
  arguments.groups = static_cast<int>(call.groups);
  arguments.weight_dtype = static_cast<Dtype>(call.weight_dtype);
  arguments.bias_dtype = static_cast<Dtype>(call.bias_dtype);
  arguments.is_relu = static_cast<Activation>(call.activation) == Activation::relu;
  arguments.result_after = distance(at.grad_x, at.result);
  arguments.grad_after = distance(at.x, at.grad);
  arguments.least = arguments.is_relu ? 0.0f : -INFINITY;
  return dispatch(static_cast<Dtype>(call.dtype), [&](auto zero) {
    return dispatch_recomputing(at.result, [&](auto recomputes) {
      using Small = OnChipBackward<decltype(zero), 192, blocks_of(192), recomputes>;
      using Large = OnChipBackward<decltype(zero), 384, blocks_of(384), recomputes>;
      return plan.on_chip.threads == 192 ? launch_on_chip<Small>(arguments, stream)
                                         : launch_on_chip<Large>(arguments, stream);
    });
  });
}

template <typename T, int vector>
const char* launch_two_passes(const TwoPassArguments& arguments, int64_t images, void* stream) {
  const TwoPassPlan& plan = arguments.plan;
  const int64_t blocks = images * plan.tiles * plan.chunks;
  using First = SumTile<T, vector>;
  if (const char* error = launch<First>({blocks, 1, First::shared_bytes(plan)}, arguments, stream)) return error;
  const LaunchShape averages{images * arguments.groups, 1, AverageGroup::shared_bytes};
  if (const char* error = launch<AverageGroup>(averages, arguments, stream)) return error;
  return dispatch_recomputing(arguments.result, [&](auto recomputes) {
    return launch<WriteTile<T, vector, recomputes>>({blocks}, arguments, stream);
  });
}

const char* run_two_passes(const Call& call, const BackwardPlan& plan, const Addresses& at, void* stream) {
  TwoPassArguments arguments{};
  arguments.grad = at.grad;
  arguments.grad_total = at.grad_total;
  arguments.x = at.x;
  arguments.grad_x = at.grad_x;
  arguments.result = at.result;
  arguments.weight = at.weight;
  arguments.bias = at.bias;
  arguments.mean = at.mean;
  arguments.rstd = at.rstd;
  arguments.sums = static_cast<float*>(at.workspace);
  arguments.group_means = arguments.sums + plan.rows * 2 * call.channels;
  arguments.plan = plan.two_pass;
  arguments.pixels = call.pixels;
  arguments.channels = call.channels;
  arguments.groups = call.groups;
  arguments.weight_dtype = static_cast<Dtype>(call.weight_dtype);
  arguments.bias_dtype = static_cast<Dtype>(call.bias_dtype);
  arguments.activation = static_cast<Activation>(call.activation);
  return dispatch(static_cast<Dtype>(call.dtype), [&](auto zero) {
    using T = decltype(zero);
    return plan.two_pass.vector == 1 ? launch_two_passes<T, 1>(arguments, call.images, stream)
                                     : launch_two_passes<T, vector_size<T>>(arguments, call.images, stream);
  });
}

const char* merge_sums(const Call& call, const BackwardPlan& plan, const Addresses& at, void* stream) {
  MergeArguments arguments{};
  arguments.sums = static_cast<const float*>(at.workspace);
  arguments.rows = plan.rows;
  arguments.channels = call.channels;
  arguments.grad_weight = at.grad_weight;
  arguments.grad_bias = at.grad_bias;
  arguments.weight_dtype = static_cast<Dtype>(call.weight_dtype);
  arguments.bias_dtype = static_cast<Dtype>(call.bias_dtype);
  return launch<MergeSums>({MergeSums::blocks(call.channels), 1, MergeSums::shared_bytes}, arguments, stream);
}

bool are_aligned(const Addresses& at) {
  const void *grad_x = at.grad_x, *result = at.result;
  for (const void* map : {at.grad, at.grad_total, at.x, grad_x, result}) {
    if (reinterpret_cast<uintptr_t>(map) % 16 != 0) return false;
  }
  return true;
}

const char* run_backward(const Call& call, const Addresses& at, void* stream) {
  Device device;
  BackwardPlan plan;
  if (const char* error = plan_call(call, plan, device)) return error;
  const bool has_vectors = plan.on_chip.threads != 0 || plan.two_pass.vector > 1;
  if (has_vectors && !are_aligned(at)) return "group_norm_act: a feature map is not aligned to 16 bytes";
  if (call.images > 0) {
    const auto run = plan.on_chip.threads != 0 ? run_on_chip : run_two_passes;
    if (const char* error = run(call, plan, at, stream)) return error;
  }
  return merge_sums(call, plan, at, stream);
}

}  // namespace
}  // namespace bitfast::group_norm_act_backward

BITFAST_ENTRY const char* bitfast_group_norm_act_backward_workspace(
    const bitfast::group_norm_act_backward::GroupNormActBackwardCall* call, int64_t* bytes) {
  bitfast::group_norm_act_backward::BackwardPlan plan;
  bitfast::gpu::Device device;
  if (const char* error = bitfast::group_norm_act_backward::plan_call(*call, plan, device)) return error;
  *bytes = (plan.rows * 2 * call->channels + plan.group_means) * static_cast<int64_t>(sizeof(float));
  return nullptr;
}

BITFAST_ENTRY const char* bitfast_group_norm_act_backward(
    const bitfast::group_norm_act_backward::GroupNormActBackwardCall* call, void* stream, const void* grad,
    const void* grad_total, const void* x, const void* weight, const void* bias, const float* mean, const float* rstd,
    void* grad_x, void* grad_weight, void* grad_bias, void* result, void* workspace) {
  return bitfast::group_norm_act_backward::run_backward(
      *call, {grad, grad_total, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias, result, workspace},
      stream);
}
