// same_padding on GPUs for any window, layout and strides: a thread computes one element of the result, in the order in
// which they lie in memory, so that neighbouring threads write neighbouring bytes.
#pragma once

#include "ceil_div.h"
#include "gpu.h"
#include "same_padding_cuda.h"
#include "same_padding_geometry.h"

namespace bitfast::same_padding {

using gpu::Dtype;

// The numbers of a call as integers of one type. Divisions of 32 bits are several times faster than those of 64.
template <typename Index>
struct Elements {
  Index count, channels, height, width;  // of the result
  Index source_height, source_width;     // of what is read
  Index image_stride, channel_stride, row_stride, pixel_stride;  // of what is read
  Index top, left;
  Index kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
  bool channels_last;
};

template <typename Index>
struct Position {
  Index image, channel, row, column;
};

template <typename Index>
BITFAST_GPU Position<Index> position_of(Index offset, const Elements<Index>& e) {
  if (e.channels_last) {
    const Index pixel = offset / e.channels, row = pixel / e.width, image = row / e.height;
    return {image, offset - pixel * e.channels, row - image * e.height, pixel - row * e.width};
  }
  const Index row = offset / e.width, plane = row / e.height, image = plane / e.channels;
  return {image, plane - image * e.channels, row - plane * e.height, offset - row * e.width};
}

// Where the plane of an element begins in what is read.
template <typename Index>
BITFAST_GPU Index plane_offset(const Position<Index>& at, const Elements<Index>& e) {
  return at.image * e.image_stride + at.channel * e.channel_stride;
}

constexpr int threads_per_block = 256;

// Calls function(offset) for the thread's element, if there is one.
template <typename Index, typename Function>
BITFAST_GPU void for_own_element(const Elements<Index>& e, const Function& function) {
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * threads_per_block + threadIdx.x;
  if (offset < e.count) function(static_cast<Index>(offset));
}

// A number of a dtype as a word of four bytes, which holds two of them if they have two bytes.
BITFAST_GPU uint32_t word_of_number(float value, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return gpu::bits_of(value);
    case Dtype::bfloat16:
      return gpu::pack_two<gpu::BFloat16>(value, value);
    default:
      return gpu::pack_two<gpu::Half>(value, value);
  }
}

// ---- pad ------------------------------------------------------------------------------------------------------------

// Bits: an unsigned integer of the dtype's size.
template <typename Bits, typename Index>
struct PadElements {
  struct Arguments {
    Elements<Index> e;
    const Bits* x;
    Bits* result;
    float value;
    Dtype dtype;
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    for_own_element(a.e, [&](Index offset) {
      const Position<Index> at = position_of(offset, a.e);
      const Index row = at.row - a.e.top, column = at.column - a.e.left;
      const bool is_pixel = inside(row, a.e.source_height) && inside(column, a.e.source_width);
      a.result[offset] = is_pixel ? a.x[plane_offset(at, a.e) + row * a.e.row_stride + column * a.e.pixel_stride]
                                  : static_cast<Bits>(word_of_number(a.value, a.dtype));
    });
  }
};

// ---- max-pool -------------------------------------------------------------------------------------------------------

template <typename T, typename Index>
struct PoolElements {
  struct Arguments {
    Elements<Index> e;
    const T* x;
    T* result;
    void* taps;  // null: not wanted
    float value;
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    for_own_element(a.e, [&](Index offset) {
      const Elements<Index>& e = a.e;
      const Position<Index> at = position_of(offset, e);
      const T* plane = a.x + plane_offset(at, e);
      const T pad = gpu::rounded<T>(a.value);
      float best = gpu::float_from_bits(0xff800000u);  // -inf
      T value = gpu::rounded<T>(best);
      int tap = 0, best_tap = 0;
      for (Index i = 0; i < e.kernel_height; ++i) {
        const Index row = at.row * e.stride_height - e.top + i * e.dilation_height;
        for (Index j = 0; j < e.kernel_width; ++j, ++tap) {
          const Index column = at.column * e.stride_width - e.left + j * e.dilation_width;
          const bool is_pixel = inside(row, e.source_height) && inside(column, e.source_width);
          const T candidate = is_pixel ? plane[row * e.row_stride + column * e.pixel_stride] : pad;
          if (beats(gpu::to_float(candidate), best)) {
            best = gpu::to_float(candidate);
            value = candidate;
            best_tap = tap;
          }
        }
      }
      a.result[offset] = value;
      if (a.taps == nullptr) return;
      if (e.kernel_height * e.kernel_width <= byte_window) {
        static_cast<uint8_t*>(a.taps)[offset] = static_cast<uint8_t>(best_tap);
      } else {
        static_cast<int16_t*>(a.taps)[offset] = static_cast<int16_t>(best_tap);
      }
    });
  }
};

// ---- max-pool backward ----------------------------------------------------------------------------------------------

// An input pixel gathers the gradients of the windows whose maximum it was, in the order of its taps.
template <typename T, typename Index>
struct GatherElements {
  struct Arguments {
    Elements<Index> e;  // the pooled map is what is read
    const T* grad;
    const void* taps;
    T* result;
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    for_own_element(a.e, [&](Index offset) {
      const Elements<Index>& e = a.e;
      const Position<Index> at = position_of(offset, e);
      const Index plane = plane_offset(at, e);
      const bool bytes = e.kernel_height * e.kernel_width <= byte_window;
      float sum = 0;
      for (Index i = 0; i < e.kernel_height; ++i) {
        const Index below = at.row + e.top - i * e.dilation_height, row = below / e.stride_height;
        if (row * e.stride_height != below || !inside(row, e.source_height)) continue;
        for (Index j = 0; j < e.kernel_width; ++j) {
          const Index beside = at.column + e.left - j * e.dilation_width, column = beside / e.stride_width;
          if (column * e.stride_width != beside || !inside(column, e.source_width)) continue;
          const Index from = plane + row * e.row_stride + column * e.pixel_stride;
          const int tap = bytes ? static_cast<const uint8_t*>(a.taps)[from] : static_cast<const int16_t*>(a.taps)[from];
          if (tap == static_cast<int>(i * e.kernel_width + j)) sum += gpu::to_float(a.grad[from]);
        }
      }
      a.result[offset] = gpu::rounded<T>(sum);
    });
  }
};

// ---- launches -------------------------------------------------------------------------------------------------------

// What a launch over the elements of a padded or pooled map reads and writes.
template <typename Index>
Elements<Index> forward_elements(const SamePaddingCall& c) {
  auto index = [](int64_t n) { return static_cast<Index>(n); };
  return {
      index(c.images * c.channels * c.result_height * c.result_width), index(c.channels), index(c.result_height),
      index(c.result_width), index(c.height), index(c.width), index(c.image_stride), index(c.channel_stride),
      index(c.row_stride), index(c.pixel_stride), index(c.top), index(c.left), index(c.kernel_height),
      index(c.kernel_width), index(c.stride_height), index(c.stride_width), index(c.dilation_height),
      index(c.dilation_width), c.channels_last != 0};
}

// The same of a launch over the elements of x's gradient, which reads the pooled map.
template <typename Index>
Elements<Index> backward_elements(const SamePaddingCall& c) {
  Elements<Index> e = forward_elements<Index>(c);
  e.count = static_cast<Index>(c.images * c.channels * c.height * c.width);
  e.height = static_cast<Index>(c.height);
  e.width = static_cast<Index>(c.width);
  e.source_height = static_cast<Index>(c.result_height);
  e.source_width = static_cast<Index>(c.result_width);
  e.channel_stride = e.channels_last ? 1 : e.source_height * e.source_width;
  e.pixel_stride = e.channels_last ? e.channels : 1;
  e.row_stride = e.pixel_stride * e.source_width;
  e.image_stride = e.channels * e.source_height * e.source_width;
  return e;
}

// Whether 32 bits hold every number that the kernels of a call compute.
inline bool fits_in_32_bits(const SamePaddingCall& c) {
  constexpr int64_t most = INT32_MAX - threads_per_block;
  for (const int64_t step : {c.stride_height, c.stride_width, c.dilation_height, c.dilation_width}) {
    if (step > most) return false;
  }
  const int64_t last_of_x = (c.images - 1) * c.image_stride + (c.channels - 1) * c.channel_stride +
                            (c.height - 1) * c.row_stride + (c.width - 1) * c.pixel_stride;
  const int64_t rows = c.height + c.top + c.result_height * c.stride_height + c.kernel_height * c.dilation_height;
  const int64_t columns = c.width + c.left + c.result_width * c.stride_width + c.kernel_width * c.dilation_width;
  return c.images * c.channels * c.result_height * c.result_width <= most &&
         c.images * c.channels * c.height * c.width <= most && last_of_x <= most && rows <= most && columns <= most;
}

// Launches Kernel<Number, int32_t> or, where the numbers are too large, Kernel<Number, int64_t>.
// Their arguments are the elements, which are those of the gradient of x if `backward`, and what follows.
template <template <typename, typename> class Kernel, typename Number, typename... Arguments>
const char* launch_elements(const SamePaddingCall& call, bool backward, void* stream, Arguments... arguments) {
  auto launch = [&](auto index) {
    using Index = decltype(index);
    const Elements<Index> e = backward ? backward_elements<Index>(call) : forward_elements<Index>(call);
    const gpu::LaunchShape shape{ceil_div(static_cast<int64_t>(e.count), threads_per_block)};
    return gpu::launch<Kernel<Number, Index>>(shape, {e, arguments...}, stream);
  };
  return fits_in_32_bits(call) ? launch(int32_t{}) : launch(int64_t{});
}

}  // namespace bitfast::same_padding
