// The geometry of same_padding and its rule for the maximum.
// No tensors here, so that code for GPUs and the tests of that code on the host can include it.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define BITFAST_HOST_DEVICE __host__ __device__
#else
#define BITFAST_HOST_DEVICE
#endif

namespace bitfast::same_padding {

// A tap is the number of a pixel within its window, row by row:
// uint8 in windows of up to byte_window pixels, else int16.
constexpr int64_t byte_window = 256;
constexpr int64_t max_window = std::numeric_limits<int16_t>::max();

struct Size {
  int64_t height, width;
};

struct Padding {
  int64_t top, bottom, left, right;
};

// A pooling window, and where the first one starts: at row -top and column -left of the input.
struct Window {
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  int64_t top, left;
};

template <typename Integer>
BITFAST_HOST_DEVICE inline bool inside(Integer index, Integer size) {
  using Unsigned = std::make_unsigned_t<Integer>;
  return static_cast<Unsigned>(index) < static_cast<Unsigned>(size);
}

// As in torch's max-pooling: the first of equal pixels wins, and a NaN wins over everything before it.
BITFAST_HOST_DEVICE inline bool beats(float candidate, float best) {
  return candidate > best || candidate != candidate;
}

}  // namespace bitfast::same_padding
