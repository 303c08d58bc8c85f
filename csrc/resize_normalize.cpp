// resize_normalize: the schemas, and the operators on the CPU, which divide the work and call the loops.
// bitfast/ops/resize_normalize.py says what each takes and returns.
#include "errors.h"

#include "resize_normalize.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <map>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "in_parallel.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"
#include "resize_request.h"

#include "no_fp_contraction.h"

#define BITFAST_LOOPS "resize_normalize_loops.h"
#define BITFAST_OP resize_normalize
#include "each_instruction_set.h"

namespace bitfast::resize_normalize {
namespace {

// Neighbouring bands resample some rows twice; with fewer rows than this in a band, too many.
constexpr int64_t rows_per_band = 16;
// More than one, so that others take over the bands of a thread that is held up.
constexpr int64_t bands_per_thread = 2;

// ---- tables -----------------------------------------------------------------------------------------

// The axis of each line, once for all images that have the same line.
template <typename Weight>
std::map<Line, Axis<Weight>> axes_of(const Geometry& geometry, Filter filter) {
  std::map<Line, Axis<Weight>> axes;
  for (const auto* lines : {&geometry.rows, &geometry.columns}) {
    for (const Line& line : *lines) {
      if (line.count > 0) {
        axes.try_emplace(line);
      }
    }
  }
  std::vector<std::pair<const Line, Axis<Weight>>*> items;
  for (auto& item : axes) {
    items.push_back(&item);
  }
  in_parallel(items.size(), [&](int64_t i) {
    items[i]->second = make_axis<Weight>(items[i]->first, filter);
  });
  return axes;
}

// ---- windows ----------------------------------------------------------------------------------------

template <typename Pixel>
Image<Pixel> image_of(const Tensor& tensor) {
  Image<Pixel> image;
  image.data = static_cast<const Pixel*>(tensor.const_data_ptr());
  image.height = tensor.size(0);
  image.width = tensor.size(1);
  image.channels = tensor.size(2);
  image.row_stride = tensor.stride(0);
  image.pixel_stride = tensor.stride(1);
  image.channel_stride = tensor.stride(2);
  return image;
}

// The products that an image takes, about.
template <typename Pixel>
double cost_of(const Plan<Pixel>& plan) {
  if (plan.rows == nullptr) {
    return 1;
  }
  const double rows_read = plan.rows->end_of_inputs() - plan.rows->first_input();
  const double columns_read = plan.columns->end_of_inputs() - plan.columns->first_input();
  const double width = static_cast<double>(plan.columns->count) * plan.columns->taps;
  const double height = static_cast<double>(plan.rows->count) * plan.rows->taps;
  return plan.height_first ? columns_read * height + plan.rows->count * width
                           : rows_read * width + plan.columns->count * height;
}

// Some rows of one window.
struct Band {
  size_t image;
  int64_t first, last;
};

template <typename Pixel>
std::vector<Band> bands_of(const std::vector<Plan<Pixel>>& plans, int64_t height) {
  std::vector<double> costs;
  double total = 0;
  for (const auto& plan : plans) {
    costs.push_back(cost_of(plan));
    total += costs.back();
  }
  const double wanted = total / (bands_per_thread * torch::stable::get_num_threads());
  std::vector<Band> bands;
  for (size_t i = 0; i < plans.size(); ++i) {
    const int64_t most = std::max<int64_t>(1, height / rows_per_band);
    const int64_t count = std::clamp<int64_t>(static_cast<int64_t>(costs[i] / wanted + 0.5), 1, most);
    for (int64_t b = 0; b < count; ++b) {
      bands.push_back({i, height * b / count, height * (b + 1) / count});
    }
  }
  return bands;
}

template <typename Pixel, typename Element>
void fill(const std::vector<Plan<Pixel>>& plans, const Element* values, const Tensor& result) {
  const int64_t height = result.size(2);
  Element* data = static_cast<Element*>(result.mutable_data_ptr());
  const std::vector<Band> bands = bands_of(plans, height);
  auto* resize = choose(BITFAST_EACH(resize_rows<Pixel, Element>));
  in_parallel(bands.size(), [&](int64_t i) {
    const auto [image, first, last] = bands[i];
    Window<Element> window;
    window.data = data + image * result.stride(0);
    window.height = height;
    window.width = result.size(3);
    window.row_stride = result.stride(2);
    window.pixel_stride = result.stride(3);
    window.channel_stride = result.stride(1);
    window.values = values;
    resize(plans[image], window, first, last);
  });
}

// Calls function(plans), with one for each image.
template <typename Pixel, typename Function>
void with_plans(const Request& request, Filter filter, const Function& function) {
  using Weight = typename WeightOf<Pixel>::type;
  const std::vector<Tensor>& images = request.images;
  const Geometry geometry = geometry_of(request);
  const std::map<Line, Axis<Weight>> axes = axes_of<Weight>(geometry, filter);
  std::vector<Plan<Pixel>> plans;
  for (size_t i = 0; i < images.size(); ++i) {
    const Line &rows = geometry.rows[i], &columns = geometry.columns[i];
    const bool is_empty = rows.count == 0 || columns.count == 0;
    Plan<Pixel> plan;
    plan.image = image_of<Pixel>(images[i]);
    plan.rows = is_empty ? nullptr : &axes.at(rows);
    plan.columns = is_empty ? nullptr : &axes.at(columns);
    plan.top = geometry.top[i];
    plan.left = geometry.left[i];
    plan.height_first = request.first_axes[i] == 0;
    plans.push_back(plan);
  }
  function(plans);
}

Tensor empty_batch(const Request& request, ScalarType dtype, bool channels_last) {
  const Tensor& first = request.images[0];
  return empty_4d(
      {static_cast<int64_t>(request.images.size()), first.size(2), request.crop[0], request.crop[1]}, dtype,
      first.device(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor resize_bytes(const Request& request, Filter filter, const Tensor& values, bool channels_last) {
  STD_TORCH_CHECK(
      values.dim() == 2 && values.size(0) == 256 && values.size(1) == request.images[0].size(2),
      "values must have shape (256, C)");
  Tensor result = empty_batch(request, values.scalar_type(), channels_last);
  const Tensor by_channel = torch::stable::contiguous(torch::stable::transpose(values, 0, 1));
  const void* data = by_channel.const_data_ptr();
  with_plans<uint8_t>(request, filter, [&](const auto& plans) {
    switch (values.element_size()) {
      case 1:
        return fill(plans, static_cast<const uint8_t*>(data), result);
      case 2:
        return fill(plans, static_cast<const uint16_t*>(data), result);
      case 4:
        return fill(plans, static_cast<const uint32_t*>(data), result);
      case 8:
        return fill(plans, static_cast<const uint64_t*>(data), result);
      default:
        STD_TORCH_CHECK(false, "values must have elements of 1, 2, 4 or 8 bytes");
    }
  });
  return result;
}

Tensor resize_floats(const Request& request, Filter filter, bool channels_last) {
  Tensor result = empty_batch(request, ScalarType::Float, channels_last);
  with_plans<float>(request, filter, [&](const auto& plans) {
    fill(plans, static_cast<const float*>(nullptr), result);
  });
  return result;
}

// ---- operators --------------------------------------------------------------------------------------

Tensor resize_normalize_pixels(
    const std::vector<Tensor>& images, const std::vector<int64_t>& sizes, const std::vector<int64_t>& crop,
    const std::vector<int64_t>& offsets, int64_t resample, const std::optional<Tensor>& values, bool channels_last,
    const std::vector<int64_t>& first_axes) {
  const Request request{images, sizes, crop, offsets, first_axes};
  check_request(request);
  check_filter(resample);
  const Filter filter = static_cast<Filter>(resample);
  STD_TORCH_CHECK(
      images[0].scalar_type() == (values ? ScalarType::Byte : ScalarType::Float),
      "images must be uint8 with values, float32 without");
  return values ? resize_bytes(request, filter, *values, channels_last)
                : resize_floats(request, filter, channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def(
      "resize_normalize_pixels.native(Tensor[] images, SymInt[] sizes, SymInt[] crop, SymInt[] offsets, "
      "int resample, Tensor? values, bool channels_last, int[] first_axes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("resize_normalize_pixels.native", TORCH_BOX(&resize_normalize_pixels));
}

}  // namespace bitfast::resize_normalize
