// What is asked of resize_normalize, for whichever device: checked, and the part of each image that is wanted.
#pragma once

#include "errors.h"

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "resampling_weights.h"

namespace bitfast::resize_normalize {

// The arguments, as bitfast/ops/resize_normalize.py describes them.
struct Request {
  const std::vector<torch::stable::Tensor>& images;
  const std::vector<int64_t>&sizes, &crop, &offsets;
  const std::vector<int64_t>& first_axes;
  // Whether the images are (C, H, W) rather than (H, W, C).
  bool channels_first = false;

  // The dimensions of height, width and channels.
  std::array<int64_t, 3> dimensions() const {
    return channels_first ? std::array<int64_t, 3>{1, 2, 0} : std::array<int64_t, 3>{0, 1, 2};
  }
};

void check_request(const Request& request);

void check_filter(int64_t resample);

// How each image is to be resized.
struct Geometry {
  std::vector<Line> rows, columns;
  // Where the part of the window that lies in the image begins in the window.
  std::vector<int64_t> top, left;
};

Geometry geometry_of(const Request& request);

}  // namespace bitfast::resize_normalize
