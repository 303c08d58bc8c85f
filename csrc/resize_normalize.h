// What the loops of resize_normalize work on;
// shared by resize_normalize.cpp and the loops.
#pragma once

#include <cstdint>

#include "resampling_weights.h"

namespace bitfast::resize_normalize {

// Pixels are worked on as four channels side by side, however many an image has; an image of more is worked on four
// channels after the other.
constexpr int64_t channels_at_once = 4;
// Rows that are resampled at once, so that weights are read once for all of them.
constexpr int64_t rows_at_once = 4;

template <typename Pixel>
struct Image {
  const Pixel* data;
  int64_t height, width, channels;
  int64_t row_stride, pixel_stride, channel_stride;
};

template <typename Pixel>
struct WeightOf {
  using type = double;
};

template <>
struct WeightOf<uint8_t> {
  using type = int32_t;
};

// How one image becomes a window of its resized version.
template <typename Pixel>
struct Plan {
  using Weights = Axis<typename WeightOf<Pixel>::type>;

  Image<Pixel> image;
  // What the part of the window within the image is made of; null if there is no such part.
  const Weights *rows, *columns;
  // Where that part begins in the window; all else is zero.
  int64_t top, left;
  // Whether columns of pixels are resampled before rows.
  bool height_first;
};

// One window of the result. For bytes, `values` holds what each of 256 stands for, channel after channel.
template <typename Element>
struct Window {
  Element* data;
  int64_t height, width;
  int64_t row_stride, pixel_stride, channel_stride;
  const Element* values;
};

}  // namespace bitfast::resize_normalize
