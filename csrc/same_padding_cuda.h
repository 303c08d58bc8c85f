// The functions of csrc/same_padding.cu, which operators and prepared calls share.
// They return null, or what went wrong.
#pragma once

#include <cstdint>

// What stays the same from call to call. The order of the fields is known to bitfast/ops/same_padding_cuda.py.
struct SamePaddingCall {
  int64_t images, channels;
  int64_t height, width;                // of x, and of its gradient
  int64_t result_height, result_width;  // of x when it is padded, or pooled
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // of x, in elements
  int64_t top, left;                    // the padding before x; negative where x is cropped
  int64_t kernel_height, kernel_width;  // of a pool's window, as all that follow
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  float value;         // of the padding
  int dtype;           // of all but the taps: a bitfast::gpu::Dtype
  int channels_last;   // 1: all tensors are dense with channels innermost; 0: all but x are contiguous
};

extern "C" {

// result: x, padded.
const char* bitfast_same_pad(const SamePaddingCall* call, void* stream, const void* x, void* result);

// result: x, padded and pooled. taps: of its shape, uint8 in windows of up to 256 pixels and else int16, or null.
const char* bitfast_same_max_pool(const SamePaddingCall* call, void* stream, const void* x, void* result, void* taps);

// result: the gradient of x, from that of the pooled map and from its taps. All have the layout of the taps.
const char* bitfast_same_max_pool_backward(
    const SamePaddingCall* call, void* stream, const void* grad, const void* taps, void* result);
}
