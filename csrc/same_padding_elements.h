// What one CUDA thread of same_padding does: compute one element of the result. It compiles for the host, too, so
// that tests/host can run it where there is no GPU.
#pragma once

#include <cmath>

#include "same_padding_geometry.h"

namespace bitfast::same_padding {

struct Strides {
  int64_t batch, channel, row, column;
};

// A contiguous or channels_last tensor: the axes by which an offset into its memory is read.
struct Layout {
  int64_t channels, height, width;
  bool channels_last;
};

struct Position {
  int64_t batch, channel, row, column;
};

template <typename T>
struct Maximum {
  T value;
  Tap tap;
};

// Index: an integer type that holds every offset; 32-bit divisions are several times faster.
template <typename Index>
C10_HOST_DEVICE Position position_of(Index offset, const Layout& layout) {
  const Index channels = static_cast<Index>(layout.channels);
  const Index height = static_cast<Index>(layout.height);
  const Index width = static_cast<Index>(layout.width);
  if (layout.channels_last) {
    const Index pixel = offset / channels, row = pixel / width;
    return {row / height, offset % channels, row % height, pixel % width};
  }
  const Index row = offset / width, plane = row / height;
  return {plane / channels, plane % channels, row % height, offset % width};
}

C10_HOST_DEVICE inline int64_t plane_offset(const Position& at, const Strides& strides) {
  return at.batch * strides.batch + at.channel * strides.channel;
}

template <typename T>
C10_HOST_DEVICE T padded_element(
    const T* x, Size size, const Strides& strides, int64_t top, int64_t left, T value, const Position& at) {
  const int64_t row = at.row - top, column = at.column - left;
  const bool is_pixel = inside(row, size.height) && inside(column, size.width);
  return is_pixel ? x[plane_offset(at, strides) + row * strides.row + column * strides.column] : value;
}

// The maximum of the window of output pixel `at`; what lies outside the plane is `pad`.
template <typename T>
C10_HOST_DEVICE Maximum<T> pooled_element(
    const T* x, Size size, const Strides& strides, const Window& window, T pad, const Position& at) {
  const T* plane = x + plane_offset(at, strides);
  float best = -INFINITY;
  Maximum<T> result{static_cast<T>(best), 0};
  Tap tap = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t row = at.row * window.stride_height - window.top + i * window.dilation_height;
    for (int64_t j = 0; j < window.kernel_width; ++j, ++tap) {
      const int64_t column = at.column * window.stride_width - window.left + j * window.dilation_width;
      const bool is_pixel = inside(row, size.height) && inside(column, size.width);
      const T value = is_pixel ? plane[row * strides.row + column * strides.column] : pad;
      if (beats(static_cast<float>(value), best)) {
        best = static_cast<float>(value);
        result = {value, tap};
      }
    }
  }
  return result;
}

// The gradient of input pixel `at`: the sum over the windows whose maximum it was, in a fixed order.
// `strides` are those of grad and of taps.
template <typename T>
C10_HOST_DEVICE T gradient_element(
    const T* grad, const Tap* taps, Size pooled, const Strides& strides, const Window& window,
    const Position& at) {
  const int64_t plane = plane_offset(at, strides);
  float sum = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t y = at.row + window.top - i * window.dilation_height;
    if (y % window.stride_height != 0 || !inside(y / window.stride_height, pooled.height)) {
      continue;
    }
    for (int64_t j = 0; j < window.kernel_width; ++j) {
      const int64_t x = at.column + window.left - j * window.dilation_width;
      if (x % window.stride_width != 0 || !inside(x / window.stride_width, pooled.width)) {
        continue;
      }
      const int64_t offset =
          plane + y / window.stride_height * strides.row + x / window.stride_width * strides.column;
      if (taps[offset] == i * window.kernel_width + j) {
        sum += static_cast<float>(grad[offset]);
      }
    }
  }
  return static_cast<T>(sum);
}

}  // namespace bitfast::same_padding
