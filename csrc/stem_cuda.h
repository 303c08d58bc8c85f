// stem: how its kernels are called; shared by csrc/stem.cu and by bitfast/ops/stem.py, which makes this struct anew.
#pragma once

#include <cstdint>

namespace bitfast::stem {

// What stays the same from call to call. The result is channels_last: (images, result_height, result_width, channels).
struct Call {
  int32_t dtype;        // gpu::Dtype of weight and result: bfloat16 or float16
  int32_t image_dtype;  // the same, or float32
  int64_t images;
  int32_t height, width;
  int64_t image_stride, channel_stride, row_stride, pixel_stride;  // of the images, in numbers
  int32_t channels;                                                // of the result, a multiple of 64
  int32_t top, left;                                               // zeros before the images, 0 to 6
  int32_t conv_height, conv_width;                                 // so many zeros follow the images
  int32_t pools;                                                   // whether 3x3 stride 2 max-pooling follows
  int32_t pool_top, pool_left;                                     // zeros before what is pooled, 0 to 2
  int32_t result_height, result_width;
};

}  // namespace bitfast::stem
