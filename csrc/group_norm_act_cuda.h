// What the operators, prepared calls and tests hand to the entries of group_norm_act.cu.
// bitfast/ops/group_norm_act_cuda.py repeats the structure for ctypes.
#pragma once

#include <cstdint>

// One forward pass of group_norm_act or add_group_norm_act over dense channels_last feature maps.
struct GroupNormActCall {
  int64_t images, pixels, channels, groups;
  float eps;
  int32_t activation;  // a bitfast::Activation
  // bitfast::gpu::Dtype, of the feature maps and of the parameters.
  int32_t dtype, weight_dtype, bias_dtype;
  // Whether the addresses of all feature maps are multiples of 16.
  int32_t is_aligned;
};

extern "C" {

// How many bytes of memory the launches need besides their arguments; null, or what went wrong.
const char* bitfast_group_norm_act_workspace(const GroupNormActCall* call, int64_t* bytes);

// result = activation(norm(x)), or, with a residual, of total = x + residual rounded to the dtype.
//
// residual: null if there is none; total is then not written. total may be x or residual, and result may be x or
//   residual if total is not the same. mean, rstd: float32 (images, groups), or both null. weight, bias: `channels` numbers.
//   workspace: a multiple of 16, or null where none is needed.
const char* bitfast_group_norm_act_forward(
    const GroupNormActCall* call, void* stream, const void* x, const void* residual, const void* weight,
    const void* bias, void* total, void* result, float* mean, float* rstd, void* workspace);
}
