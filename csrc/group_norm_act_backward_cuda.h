// The backward pass of group_norm_act on CUDA GPUs: what its operator, prepared calls and the tests call.
#pragma once

#include <cstdint>

namespace bitfast::group_norm_act_backward {

// The feature maps are dense in channels_last, of one dtype. Dtypes are numbers of gpu::Dtype.
struct GroupNormActBackwardCall {
  int64_t images;  // 0 or more
  int64_t pixels, channels, groups;
  int32_t dtype, weight_dtype, bias_dtype;
  int32_t activation;  // an Activation
};

}  // namespace bitfast::group_norm_act_backward

extern "C" {

// How many bytes of workspace a call on the current device needs.
const char* bitfast_group_norm_act_backward_workspace(
    const bitfast::group_norm_act_backward::GroupNormActBackwardCall* call, int64_t* bytes);

// The gradients of x, weight and bias, each of the dtype of what it belongs to; and the result of the forward pass for x
// if that is not null. The feature maps (grad, grad_total, which may be null, x, grad_x, result) begin at multiples of
// 16 bytes; mean and rstd are float32, one for each image and group; the workspace is aligned to 4 bytes. grad_x and
// result may be none of the others. Kernels are launched on a stream of the current device. Both functions return
// null, or what went wrong.
const char* bitfast_group_norm_act_backward(
    const bitfast::group_norm_act_backward::GroupNormActBackwardCall* call, void* stream, const void* grad,
    const void* grad_total, const void* x, const void* weight, const void* bias, const float* mean, const float* rstd,
    void* grad_x, void* grad_weight, void* grad_bias, void* result, void* workspace);

}  // extern "C"
