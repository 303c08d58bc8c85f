// Checks what is asked of resize_normalize, and says which part of each image is wanted.
#include "errors.h"

#include "resize_request.h"

#include <algorithm>
#include <utility>

namespace bitfast::resize_normalize {
namespace {

// The part of a window that lies in a line of `size` pixels, and where that part begins in the window.
std::pair<Line, int64_t> line_within(int64_t in_size, int64_t size, int64_t offset, int64_t window) {
  const int64_t first = std::clamp<int64_t>(offset, 0, size);
  const int64_t last = std::clamp(offset + window, first, size);
  return {{in_size, size, first, last - first}, std::clamp<int64_t>(first - offset, 0, window)};
}

}  // namespace

void check_filter(int64_t resample) {
  STD_TORCH_CHECK(0 <= resample && resample <= 5, "resample must be one of Pillow's filters, 0 to 5, got ", resample);
}

void check_request(const Request& request) {
  const auto& [images, sizes, crop, offsets, first_axes, channels_first] = request;
  const size_t count = images.size();
  STD_TORCH_CHECK(
      count > 0 && sizes.size() == 2 * count && offsets.size() == 2 * count && first_axes.size() == count,
      "sizes, offsets and first_axes must fit the number of images, which is at least 1");
  STD_TORCH_CHECK(crop.size() == 2 && crop[0] > 0 && crop[1] > 0, "crop must be a positive height and width");
  STD_TORCH_CHECK(
      *std::min_element(sizes.begin(), sizes.end()) > 0 && *std::max_element(sizes.begin(), sizes.end()) <= INT32_MAX,
      "sizes must be from 1 to ", INT32_MAX);
  const auto [height, width, channels] = request.dimensions();
  const auto dtype = images[0].scalar_type();
  for (const auto& image : images) {
    STD_TORCH_CHECK(
        image.dim() == 3 && image.numel() > 0 && image.size(channels) == images[0].size(channels) &&
            image.scalar_type() == dtype,
        "images must have shape ", channels_first ? "(C, H, W)" : "(H, W, C)",
        ", none of them 0, and one dtype and C");
    STD_TORCH_CHECK(
        image.size(height) <= INT32_MAX && image.size(width) <= INT32_MAX, "images must have sides up to ", INT32_MAX);
  }
}

Geometry geometry_of(const Request& request) {
  const auto [height, width, channels] = request.dimensions();
  Geometry geometry;
  for (size_t i = 0; i < request.images.size(); ++i) {
    const auto& image = request.images[i];
    const int64_t *size = &request.sizes[2 * i], *offset = &request.offsets[2 * i];
    const auto [rows, top] = line_within(image.size(height), size[0], offset[0], request.crop[0]);
    const auto [columns, left] = line_within(image.size(width), size[1], offset[1], request.crop[1]);
    geometry.rows.push_back(rows);
    geometry.columns.push_back(columns);
    geometry.top.push_back(top);
    geometry.left.push_back(left);
  }
  return geometry;
}

}  // namespace bitfast::resize_normalize
