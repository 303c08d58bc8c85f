// What each pixel of a resampled line is made of: the tables of Pillow's filters,
// for the CPU kernels and, by the operator resize_filters, for those of other devices.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

namespace bitfast::resize_normalize {

// Of the weights of 8-bit pixels, which are integers.
constexpr int precision_bits = 32 - 8 - 2;

// Pillow's numbers.
enum class Filter { nearest, lanczos, bilinear, bicubic, box, hamming };

// Outputs `first` to `first + count` of a line of `in_size` pixels that gets `out_size`.
struct Line {
  int64_t in_size, out_size, first, count;

  bool operator<(const Line& other) const {
    return std::tie(in_size, out_size, first, count) <
        std::tie(other.in_size, other.out_size, other.first, other.count);
  }
};

// What the outputs of a line are made of: output i is the sum of weights[i * stride + t] times
// input starts[i] + t, over t < taps. All of these inputs exist. Weights from `taps` to `stride` are zero.
template <typename Weight>
struct Axis {
  int64_t count = 0, taps = 1, stride = 1;
  // Each output is one input as it is.
  bool copies = false;
  std::vector<int32_t> starts;
  std::vector<Weight> weights;

  int64_t first_input() const { return starts.front(); }
  int64_t end_of_inputs() const { return starts.back() + taps; }
};

// The axis of a line with at least one output. Weight is int32_t for 8-bit pixels, double for floating ones.
template <typename Weight>
Axis<Weight> make_axis(const Line& line, Filter filter);

}  // namespace bitfast::resize_normalize
