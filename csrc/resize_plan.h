// The tables that drive the kernels of resize_normalize on other devices: kernels/resize_normalize.py says what the
// numbers mean, and kernels/resize_normalize_tiles.py reads them.
#pragma once

#include <cstdint>

#include "resampling_weights.h"

namespace bitfast::resize_normalize {

// One pass over one image: a row of int64 numbers, FIELDS in kernels/resize_normalize.py.
struct Segment {
  int64_t address = 0, row_stride = 0, pixel_stride = 0, channel_stride = 0;
  int64_t starts = 0, weights = 0, taps = 0, is_height = 0;
  int64_t rows = 0, columns = 0, place = 0, left = 0;
};

// The tile that one program makes: an image's number, and the first row and inner index.
struct Program {
  int32_t image, row, inner;
};

// A line whose filter is on the device: a row of the table that bitfast/ops/resize_filters.py keeps.
struct KnownFilter {
  Line line;
  // Where its starts and its weights (taps, count) begin among the numbers there.
  int64_t starts, weights;
  int64_t taps;
  // The range of the inputs that are read.
  int64_t first_input, end_of_inputs;

  // Each output is an input as it is.
  bool copies_line() const { return line.in_size == line.out_size; }
};

constexpr int64_t segment_fields = sizeof(Segment) / sizeof(int64_t);
constexpr int64_t filter_fields = sizeof(KnownFilter) / sizeof(int64_t);
static_assert(segment_fields == 12 && filter_fields == 9 && sizeof(Program) == 12);

}  // namespace bitfast::resize_normalize
