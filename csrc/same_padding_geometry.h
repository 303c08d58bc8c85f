// The geometry of same_padding and its rule for the maximum.
// No tensors here, so that code for GPUs and the tests of that code on the host can include it.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <limits>

namespace bitfast::same_padding {

using Tap = int16_t;  // the number of a pixel within its window, row by row
constexpr int64_t max_window = std::numeric_limits<Tap>::max();

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

C10_HOST_DEVICE inline bool inside(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

// As in torch's max-pooling: the first of equal pixels wins, and a NaN wins over everything before it.
C10_HOST_DEVICE inline bool beats(float candidate, float best) {
  return candidate > best || candidate != candidate;
}

}  // namespace bitfast::same_padding
