// The max-pool of channels_last feature maps, on vectors of channels.
// Included once per instruction set, inside its namespace.
#include "vectors.h"

// The taps of a window along one axis that lie inside the input: first, and one past the last.
struct Taps {
  int64_t first, last;
};

inline Taps taps_inside(int64_t start, int64_t count, int64_t dilation, int64_t size) {
  Taps taps{0, count};
  while (taps.first < count && start + taps.first * dilation < 0) {
    ++taps.first;
  }
  while (taps.last > taps.first && start + (taps.last - 1) * dilation >= size) {
    --taps.last;
  }
  return taps;
}

// Pools one row of pixels whose channels adjoin. `image` is the first row of the input, whose rows and pixels
// are `row_stride` and `pixel_stride` apart.
template <typename T>
void pool_channels(
    const T* image, Size in, int64_t row_stride, int64_t pixel_stride, int64_t channels, const Window& window, T pad,
    int64_t out_row, int64_t out_width, T* result) {
  const int64_t top = out_row * window.stride_height - window.top;
  const Taps rows = taps_inside(top, window.kernel_height, window.dilation_height, in.height);
  for (int64_t out_column = 0; out_column < out_width; ++out_column, result += channels) {
    const int64_t left = out_column * window.stride_width - window.left;
    const Taps columns = taps_inside(left, window.kernel_width, window.dilation_width, in.width);
    const bool reads_padding = (rows.last - rows.first) * (columns.last - columns.first) <
        window.kernel_height * window.kernel_width;
    const Vector start = all(reads_padding ? static_cast<float>(pad) : -INFINITY);
    for_each_vector(channels, [&](int64_t c, auto count) {
      Vector best = start;
      for (int64_t i = rows.first; i < rows.last; ++i) {
        const T* row = image + (top + i * window.dilation_height) * row_stride + c;
        for (int64_t j = columns.first; j < columns.last; ++j) {
          const Vector value = load_up_to(row + (left + j * window.dilation_width) * pixel_stride, count);
          best = best >= value || best != best ? best : value;  // NaN wins
        }
      }
      store_up_to(result + c, best, count);
    });
  }
}
