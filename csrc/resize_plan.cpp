// Plans resize_normalize for the kernels of other devices: all tables of a batch in one call, in one piece of memory;
// and the filters of lines, which are kept there for later batches.
#include "errors.h"

#include "resize_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "ceil_div.h"
#include "in_parallel.h"
#include "memory_format.h"
#include "resize_request.h"

namespace bitfast::resize_normalize {
namespace {

using torch::headeronly::DeviceType;
using torch::stable::Device;

// Each table begins at a multiple of so many bytes.
constexpr int64_t alignment = 16;

Tensor empty_1d(int64_t size, ScalarType dtype, const Device& device, bool pin_memory = false) {
  const auto pinned = pin_memory ? std::optional<bool>(true) : std::nullopt;
  return torch::stable::empty({&size, 1}, dtype, std::nullopt, device, pinned, std::nullopt);
}

// ---- filters that are known ---------------------------------------------------------------------------

// A table of known filters, in the order of their lines.
class Filters {
 public:
  explicit Filters(const Tensor& table) : count_(table.size(0)) {
    STD_TORCH_CHECK(
        table.dim() == 2 && table.size(1) == filter_fields && table.scalar_type() == ScalarType::Long &&
            table.is_contiguous() && table.is_cpu(),
        "the table of filters must be int64 of shape (lines, ", filter_fields, "), contiguous, on the CPU");
    rows_ = static_cast<const KnownFilter*>(table.const_data_ptr());
  }

  const KnownFilter* begin() const { return rows_; }
  const KnownFilter* end() const { return rows_ + count_; }

  // The filter of a line, or null.
  const KnownFilter* find(const Line& line) const {
    const auto is_before = [](const KnownFilter& filter, const Line& wanted) { return filter.line < wanted; };
    const KnownFilter* found = std::lower_bound(begin(), end(), line, is_before);
    return found != end() && !(line < found->line) ? found : nullptr;
  }

 private:
  int64_t count_;
  const KnownFilter* rows_;
};

// ---- the passes of an image ---------------------------------------------------------------------------

// The two passes over one image. Where the axis that comes first keeps its size there is one pass, the second.
struct Passes {
  bool has_first = false;
  Segment first, second;
};

// Where the image lies, and what is wanted of it; `between` is the offset of what its first pass makes in the buffer.
struct Picture {
  int64_t address, row_stride, pixel_stride, channel_stride, channels;
  const KnownFilter *height, *width;
  int64_t top, left;
  bool height_first;
  int64_t between;
};

void set_filter(Segment& segment, const KnownFilter& filter, bool is_height) {
  segment.starts = filter.starts;
  segment.weights = filter.weights;
  segment.taps = filter.taps;
  segment.is_height = is_height;
}

Passes passes_of(const Picture& picture) {
  const KnownFilter& a = picture.height_first ? *picture.height : *picture.width;
  const KnownFilter& b = picture.height_first ? *picture.width : *picture.height;
  Passes passes;
  Segment& second = passes.second;
  set_filter(second, b, !picture.height_first);
  second.rows = picture.height->line.count;
  second.columns = picture.width->line.count;
  second.place = picture.top;
  second.left = picture.left;
  const int64_t stride_a = picture.height_first ? picture.row_stride : picture.pixel_stride;
  const int64_t stride_b = picture.height_first ? picture.pixel_stride : picture.row_stride;
  if (a.copies_line()) {
    second.address = picture.address + a.first_input * stride_a;
    second.row_stride = picture.row_stride;
    second.pixel_stride = picture.pixel_stride;
    second.channel_stride = picture.channel_stride;
    return passes;
  }
  passes.has_first = true;
  Segment& first = passes.first;
  set_filter(first, a, picture.height_first);
  first.address = picture.address + b.first_input * stride_b;
  first.row_stride = picture.row_stride;
  first.pixel_stride = picture.pixel_stride;
  first.channel_stride = picture.channel_stride;
  // Of the other axis, only what the second pass will read.
  const int64_t span = b.end_of_inputs - b.first_input;
  first.rows = picture.height_first ? a.line.count : span;
  first.columns = picture.height_first ? span : a.line.count;
  first.place = picture.between;
  second.row_stride = first.columns * picture.channels;
  second.pixel_stride = picture.channels;
  second.channel_stride = 1;
  // The second pass counts its inputs from the image's first, not from the first that is there.
  second.address =
      picture.between - b.first_input * (picture.height_first ? second.pixel_stride : second.row_stride);
  return passes;
}

// ---- programs ---------------------------------------------------------------------------------------------

struct Tile {
  int64_t rows, inner;
};

// How the tiles of each image's result are to be written.
struct Grid {
  int64_t taps, rows, inner;

  int64_t programs(const Tile& tile) const { return ceil_div(rows, tile.rows) * ceil_div(inner, tile.inner); }
};

int64_t count_programs(const std::vector<Grid>& grids, const Tile& tile) {
  int64_t count = 0;
  for (const Grid& grid : grids) {
    STD_TORCH_CHECK(
        grid.rows <= INT32_MAX - tile.rows && grid.inner <= INT32_MAX - tile.inner,
        "a row of a result must have fewer than ", INT32_MAX, " numbers, and a column fewer rows");
    count += grid.programs(tile);
  }
  return count;
}

// The images with most taps come first: the last programs to finish should be short ones.
void write_programs(const std::vector<Grid>& grids, const Tile& tile, Program* target) {
  std::vector<int32_t> order(grids.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return grids[i].taps > grids[j].taps; });
  for (const int32_t image : order) {
    const int32_t rows = static_cast<int32_t>(grids[image].rows), inner = static_cast<int32_t>(grids[image].inner);
    for (int32_t row = 0; row < rows; row += tile.rows) {
      for (int32_t first = 0; first < inner; first += tile.inner) {
        *target++ = {image, row, first};
      }
    }
  }
}

// ---- the plan ---------------------------------------------------------------------------------------------

// The filters of each image's lines, two null pointers where no pixel of it is in the window.
struct FoundFilters {
  std::vector<const KnownFilter*> heights, widths;
  std::set<Line> missing;
};

FoundFilters find_filters(const Geometry& geometry, const Filters& filters) {
  const size_t count = geometry.rows.size();
  FoundFilters found{std::vector<const KnownFilter*>(count), std::vector<const KnownFilter*>(count), {}};
  for (size_t i = 0; i < count; ++i) {
    const Line &rows = geometry.rows[i], &columns = geometry.columns[i];
    if (rows.count == 0 || columns.count == 0) {
      continue;
    }
    found.heights[i] = filters.find(rows);
    found.widths[i] = filters.find(columns);
    if (found.heights[i] == nullptr) {
      found.missing.insert(rows);
    }
    if (found.widths[i] == nullptr) {
      found.missing.insert(columns);
    }
  }
  return found;
}

std::vector<int64_t> numbers_of(const std::set<Line>& lines) {
  std::vector<int64_t> numbers;
  for (const Line& line : lines) {
    numbers.insert(numbers.end(), {line.in_size, line.out_size, line.first, line.count});
  }
  return numbers;
}

// What both passes over the batch are.
struct BatchPasses {
  std::vector<Segment> first, second;
  std::vector<Grid> first_grids, second_grids;
  // The images whose second pass reads the buffer between the passes, and the bytes of that.
  std::vector<size_t> buffered;
  int64_t buffer_size = 0;
};

BatchPasses passes_of(const Request& request, const Geometry& geometry, const FoundFilters& filters) {
  const auto [height, width, channel] = request.dimensions();
  const int64_t channels = request.images[0].size(channel);
  const size_t count = request.images.size();
  BatchPasses batch;
  batch.first.resize(count);
  batch.second.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Grid first{0, 0, 0}, second{0, request.crop[0], request.crop[1] * channels};
    if (filters.heights[i] != nullptr) {
      const Tensor& image = request.images[i];
      const Passes passes = passes_of(Picture{
          reinterpret_cast<int64_t>(image.const_data_ptr()), image.stride(height), image.stride(width),
          image.stride(channel), channels, filters.heights[i], filters.widths[i], geometry.top[i], geometry.left[i],
          request.first_axes[i] == 0, batch.buffer_size});
      batch.first[i] = passes.first;
      batch.second[i] = passes.second;
      second.taps = passes.second.taps;
      if (passes.has_first) {
        first = {passes.first.taps, passes.first.rows, passes.first.columns * channels};
        batch.buffered.push_back(i);
        batch.buffer_size += first.rows * first.inner;
      }
    }
    batch.first_grids.push_back(first);
    batch.second_grids.push_back(second);
  }
  return batch;
}

int64_t aligned(int64_t bytes) {
  return ceil_div(bytes, alignment) * alignment;
}

// The tables of a batch, and the buffer between the passes:
//   tables: bytes; at the offsets of `places`, in this order: the first pass's segments (one per image) and programs,
//     the second pass's segments and programs;
//   between: on the images' device, of at least one byte; the second pass's segments hold its address;
//   places: four offsets in bytes, then how many programs the first pass has, and how many the second;
//   missing: lines that `filters` lacks, four numbers each. If there are any, the rest is empty.
std::tuple<Tensor, Tensor, std::vector<int64_t>, std::vector<int64_t>> resize_plan(
    const std::vector<Tensor>& images, const std::vector<int64_t>& sizes, const std::vector<int64_t>& crop,
    const std::vector<int64_t>& offsets, const std::vector<int64_t>& first_axes, bool channels_first,
    const Tensor& filters, const std::vector<int64_t>& tile_shape, bool pin_memory) {
  const Request request{images, sizes, crop, offsets, first_axes, channels_first};
  check_request(request);
  STD_TORCH_CHECK(images[0].scalar_type() == ScalarType::Byte, "images must be uint8");
  STD_TORCH_CHECK(
      tile_shape.size() == 2 && tile_shape[0] > 0 && tile_shape[1] > 0, "tile must be two positive numbers");
  const Tile tile{tile_shape[0], tile_shape[1]};
  const Device cpu(DeviceType::CPU);
  const Geometry geometry = geometry_of(request);
  const FoundFilters found = find_filters(geometry, Filters(filters));
  if (!found.missing.empty()) {
    const Tensor nothing = empty_1d(0, ScalarType::Byte, cpu);
    return {nothing, nothing, {}, numbers_of(found.missing)};
  }
  BatchPasses batch = passes_of(request, geometry, found);
  const int64_t first_programs = count_programs(batch.first_grids, tile);
  const int64_t second_programs = count_programs(batch.second_grids, tile);
  const int64_t segment_bytes = aligned(images.size() * sizeof(Segment));
  const int64_t programs = segment_bytes, second = programs + aligned(first_programs * sizeof(Program));
  const int64_t last = second + segment_bytes, size = last + aligned(second_programs * sizeof(Program));
  Tensor tables = empty_1d(size, ScalarType::Byte, cpu, pin_memory);
  Tensor between = empty_1d(std::max<int64_t>(batch.buffer_size, 1), ScalarType::Byte, images[0].device());
  for (const size_t i : batch.buffered) {
    batch.second[i].address += reinterpret_cast<int64_t>(between.const_data_ptr());
  }
  char* data = static_cast<char*>(tables.mutable_data_ptr());
  std::memcpy(data, batch.first.data(), images.size() * sizeof(Segment));
  std::memcpy(data + second, batch.second.data(), images.size() * sizeof(Segment));
  write_programs(batch.first_grids, tile, reinterpret_cast<Program*>(data + programs));
  write_programs(batch.second_grids, tile, reinterpret_cast<Program*>(data + last));
  return {tables, between, {0, programs, second, last, first_programs, second_programs}, {}};
}

// ---- more filters -------------------------------------------------------------------------------------------

std::vector<Line> lines_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() % 4 == 0, "lines must hold four numbers each");
  std::vector<Line> lines;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const Line line{numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]};
    STD_TORCH_CHECK(
        0 < line.in_size && line.in_size <= INT32_MAX && 0 <= line.first && 0 < line.count &&
            line.first + line.count <= line.out_size && line.out_size <= INT32_MAX,
        "a line must be (in_size, out_size, first, count) with outputs that exist");
    lines.push_back(line);
  }
  return lines;
}

// Computes the filters of lines that a table lacks:
//   filters: the table with these lines; their numbers begin at `place` among those of all its lines;
//   numbers: int32, for each line its starts, then its weights, taps x count, so that threads with neighbouring
//     outputs read neighbouring numbers.
std::tuple<Tensor, Tensor> resize_filters(
    const Tensor& filters, const std::vector<int64_t>& lines_flat, int64_t resample, int64_t place) {
  check_filter(resample);
  const std::vector<Line> lines = lines_of(lines_flat);
  std::vector<Axis<int32_t>> axes(lines.size());
  in_parallel(lines.size(), [&](int64_t i) {
    axes[i] = make_axis<int32_t>(lines[i], static_cast<Filter>(resample));
  });
  const Filters known(filters);
  std::vector<KnownFilter> rows(known.begin(), known.end());
  int64_t end = place;
  for (size_t i = 0; i < lines.size(); ++i) {
    const auto& axis = axes[i];
    rows.push_back({lines[i], end, end + axis.count, axis.taps, axis.first_input(), axis.end_of_inputs()});
    end += axis.count * (1 + axis.taps);
  }
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.line < b.line; });
  const Device cpu(DeviceType::CPU);
  const int64_t shape[] = {static_cast<int64_t>(rows.size()), filter_fields};
  const Tensor table =
      torch::stable::empty({shape, 2}, ScalarType::Long, std::nullopt, cpu, std::nullopt, std::nullopt);
  std::copy(rows.begin(), rows.end(), static_cast<KnownFilter*>(table.mutable_data_ptr()));
  const Tensor numbers = empty_1d(end - place, ScalarType::Int, cpu);
  int32_t* number = static_cast<int32_t*>(numbers.mutable_data_ptr());
  for (const auto& axis : axes) {
    number = std::copy(axis.starts.begin(), axis.starts.end(), number);
    for (int64_t t = 0; t < axis.taps; ++t) {
      for (int64_t i = 0; i < axis.count; ++i) {
        *number++ = axis.weights[i * axis.stride + t];
      }
    }
  }
  return {table, numbers};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def(
      "resize_plan.native(Tensor[] images, int[] sizes, int[] crop, int[] offsets, int[] first_axes, "
      "bool channels_first, Tensor filters, int[] tile, bool pin_memory) -> (Tensor, Tensor, int[], int[])");
  m.def("resize_filters.native(Tensor filters, int[] lines, int resample, int place) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CompositeExplicitAutograd, m) {
  m.impl("resize_plan.native", TORCH_BOX(&resize_plan));
  m.impl("resize_filters.native", TORCH_BOX(&resize_filters));
}

}  // namespace bitfast::resize_normalize
