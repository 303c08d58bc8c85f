// stem: the 7x7 stride 2 convolution of three channels, and the zero pad and 3x3 stride 2 max-pool after it.
// csrc/stem_cuda.h says how it is called, csrc/stem_tiles.h how the work is cut.
#include "stem_cuda.h"

#include <algorithm>

#include "ceil_div.h"
#include "stem_kernel.h"

namespace bitfast::stem {
namespace {

constexpr int most_strips = 64;

// How many tiles of so many columns a row of the result is cut into.
int tiles_of(const Call& call, int columns, Arguments& a) {
  a.first_tile_results = call.pools ? (columns - 1 + call.pool_left) / 2 : columns;
  a.tile_results = call.pools ? (columns - 1) / 2 : columns;
  a.tiles = 1 + static_cast<int>(ceil_div(std::max(call.result_width - a.first_tile_results, 0), a.tile_results));
  return a.tiles;
}

// Cuts images into strips so that as few rounds of blocks as possible compute as few steps as possible. `parts`: images
// times tiles times groups; `at_once`: blocks that work at the same time. A strip costs about two steps more than it
// has: the filters and the first rows come in, and the row above is computed anew.
int strips_of(int64_t parts, int steps, int64_t at_once) {
  int best = 1;
  int64_t least = INT64_MAX;
  // Many rounds are as good as full whatever the strips.
  const int64_t most = std::max<int64_t>(std::min<int64_t>(std::min(steps, most_strips), 4 * at_once / parts), 1);
  for (int strips = 1; strips <= most; ++strips) {
    const int64_t cost = ceil_div(parts * strips, at_once) * (ceil_div(steps, strips) + 2);
    if (cost < least) {
      least = cost;
      best = strips;
    }
  }
  return best;
}

const char* why_wrong(const Call& call) {
  if (call.dtype != static_cast<int32_t>(Dtype::bfloat16) && call.dtype != static_cast<int32_t>(Dtype::float16)) {
    return "stem: the result must be bfloat16 or float16";
  }
  if (call.image_dtype != call.dtype && call.image_dtype != static_cast<int32_t>(Dtype::float32)) {
    return "stem: images must have the dtype of the result, or float32";
  }
  if (call.channels < group_channels || call.channels % group_channels != 0) {
    return "stem: channels must be a multiple of 64";
  }
  if (call.top < 0 || call.left < 0 || call.top >= filter_size || call.left >= filter_size) {
    return "stem: the padding must be smaller than the filters";
  }
  if (call.pool_top < 0 || call.pool_left < 0 || call.pool_top >= pool_size || call.pool_left >= pool_size) {
    return "stem: the pool's padding must be smaller than its window";
  }
  if (call.height < 1 || call.width < 1 || call.result_height < 1 || call.result_width < 1) {
    return "stem: images and result must not be empty";
  }
  return nullptr;
}

template <typename Kernel>
const char* run(const Call& call, Arguments& a, void* stream) {
  LaunchShape shape;
  shape.shared_bytes = Kernel::Layout::bytes;
  int64_t at_once;
  if (const char* error = resident_clusters<Kernel>(shape, at_once)) return error;
  const int64_t parts = call.images * a.tiles * a.groups;
  a.steps_per_strip = static_cast<int>(ceil_div(a.steps, strips_of(parts, a.steps, at_once)));
  a.strips = static_cast<int>(ceil_div(a.steps, a.steps_per_strip));
  shape.blocks = parts * a.strips;
  return launch<Kernel>(shape, a, stream);
}

template <typename T, typename Number, template <typename, int> class Product, int narrow, int wide>
const char* run_narrow_or_wide(const Call& call, Arguments& a, void* stream) {
  if (tiles_of(call, narrow, a) * narrow < tiles_of(call, wide, a) * wide) {
    tiles_of(call, narrow, a);
    return run<Stem<T, Number, Product<T, narrow>>>(call, a, stream);
  }
  return run<Stem<T, Number, Product<T, wide>>>(call, a, stream);
}

template <typename T, typename Number>
const char* run_on_device(const Call& call, Arguments& a, void* stream) {
  Device device;
  if (const char* error = current_device(device)) return error;
  // What is wide is made for images of 224 pixels. Groups of warps multiply 64 columns each.
  if (device.capability == 90) return run_narrow_or_wide<T, Number, ByWarpGroups, 64, 128>(call, a, stream);
  return run_narrow_or_wide<T, Number, ByWarps, 64, 112>(call, a, stream);
}

template <typename T>
const char* run_for_images(const Call& call, Arguments& a, void* stream) {
  const bool is_float32 = call.image_dtype == static_cast<int32_t>(Dtype::float32);
  return is_float32 ? run_on_device<T, float>(call, a, stream) : run_on_device<T, T>(call, a, stream);
}

}  // namespace
}  // namespace bitfast::stem

// Convolves images with prepared filters: (channels, 7 rows, 8 pixels, 4 channels), where the last channel is zero, and
// so is the first pixel if `left` is odd, else the last. Addresses of weight and result are multiples of 16.
BITFAST_ENTRY const char* bitfast_stem(
    const bitfast::stem::Call* call, void* stream, const void* images, const void* weight, void* result) {
  using namespace bitfast::stem;
  if (const char* problem = why_wrong(*call)) return problem;
  if (call->images == 0) return nullptr;
  Arguments a = {};
  a.images = images_of(*call, images);
  a.weight = weight;
  a.result = result;
  a.conv_height = call->conv_height;
  a.conv_width = call->conv_width;
  a.channels = call->channels;
  a.pools = call->pools != 0;
  a.pool_left = call->pool_left;
  a.result_height = call->result_height;
  a.result_width = call->result_width;
  a.first_conv_row = a.pools ? 1 - call->pool_top : 0;
  a.first_image_row = 2 * a.first_conv_row - call->top;
  a.pairs_before = (call->left + 1) / 2;
  a.first_is_unused = call->left % 2 != 0;
  a.steps = a.pools ? a.result_height : static_cast<int>(bitfast::ceil_div(a.conv_height, rows_per_step));
  a.groups = call->channels / group_channels;
  return call->dtype == static_cast<int32_t>(bitfast::gpu::Dtype::bfloat16)
             ? run_for_images<bitfast::gpu::BFloat16>(*call, a, stream)
             : run_for_images<bitfast::gpu::Half>(*call, a, stream);
}
