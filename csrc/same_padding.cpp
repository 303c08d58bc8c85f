// same_padding: the schemas, and the CPU kernels. bitfast/ops/same_padding.py says what each takes and
// returns.
#include "errors.h"

#include "same_padding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "instruction_sets.h"
#include "kernel_dtypes.h"

#define BITFAST_LOOPS "same_padding_loops.h"
#define BITFAST_OP same_padding
#include "each_instruction_set.h"

namespace bitfast::same_padding {
namespace {

// A task of fewer elements than this is not worth another thread.
constexpr int64_t elements_per_task = 32768;

int64_t rows_per_task(int64_t elements_per_row) {
  return std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, elements_per_row));
}

// Compiles a loop for several instruction sets, of which the loader takes the best that the CPU has.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define BITFAST_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BITFAST_FOR_EACH_CPU
#endif

// ---- pad --------------------------------------------------------------------------------------------

// Writes `length` elements: the `available` elements of `row` starting at position `left` (which may be
// negative), and `value` around them.
template <typename T>
void pad_row(
    const T* row, int64_t stride, int64_t available, int64_t left, T value, T* result, int64_t length) {
  const int64_t first = std::clamp<int64_t>(left, 0, length);
  const int64_t last = std::clamp<int64_t>(left + available, first, length);
  std::fill(result, result + first, value);
  if (stride == 1) {
    std::copy(row + (first - left), row + (last - left), result + first);
  } else {
    for (int64_t i = first; i < last; ++i) {
      result[i] = row[(i - left) * stride];
    }
  }
  std::fill(result + last, result + length, value);
}

// A batch of planes of rows: one plane per channel where channels are outermost; where they are
// innermost one per image, whose rows hold all channels of each pixel.
template <typename T>
void pad_planes(const Tensor& x, const Padding& padding, T value, const Tensor& result) {
  const bool channels_last = is_channels_last(x);
  const Size in = size_of(x);
  const Size out = size_of(result);
  const int64_t channels = x.size(1);
  const int64_t planes_per_image = channels_last ? 1 : channels;
  const int64_t pixel = channels_last ? channels : 1;
  const int64_t element_stride = channels_last ? 1 : x.stride(3);
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t rows = x.size(0) * planes_per_image * out.height;
  torch::stable::parallel_for(
      0, rows, rows_per_task(out.width * pixel), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          T* target_row = target + r * out.width * pixel;
          const int64_t y = r % out.height - padding.top;
          if (!inside(y, in.height)) {
            std::fill(target_row, target_row + out.width * pixel, value);
            continue;
          }
          const int64_t plane = r / out.height;
          const T* row = source + plane / planes_per_image * x.stride(0) +
              plane % planes_per_image * x.stride(1) + y * x.stride(2);
          pad_row(
              row, element_stride, in.width * pixel, padding.left * pixel, value, target_row,
              out.width * pixel);
        }
      });
}

Tensor same_pad(const Tensor& x, const std::vector<int64_t>& sides, double value) {
  check_image_batch(x);
  const Padding padding = padding_from(sides);
  const Size size = padded_size(size_of(x), padding);
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    pad_planes<T>(x, padding, static_cast<T>(static_cast<float>(value)), result);
  });
  return result;
}

// ---- max-pool ---------------------------------------------------------------------------------------

// The output columns whose pixel number `tap_column` of the window lies inside the input.
struct Columns {
  int64_t first, last;
};

Columns inside_columns(const Window& window, int64_t tap_column, int64_t width, int64_t out_width) {
  const int64_t start = tap_column * window.dilation_width - window.left;
  const auto columns_before = [&](int64_t x) {  // how many output columns read left of input column x
    return x <= start ? 0 : (x - start + window.stride_width - 1) / window.stride_width;
  };
  const int64_t first = std::min(columns_before(0), out_width);
  return {first, std::clamp(columns_before(width), first, out_width)};
}

// Lets `count` values compete with the best so far.
template <typename T>
BITFAST_FOR_EACH_CPU void compete(const T* values, int64_t stride, int64_t count, Tap tap, float* best, Tap* best_tap) {
  if (best_tap == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(values[i * stride]);
      best[i] = beats(value, best[i]) ? value : best[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(values[i * stride]);
    const bool wins = beats(value, best[i]);
    best[i] = wins ? value : best[i];
    best_tap[i] = wins ? tap : best_tap[i];
  }
}

// Pools one row. A pixel has `depth` adjacent values: all channels where they are innermost, else one.
// `image` is the first row of the input plane, whose rows and pixels are `row_stride` and `pixel_stride`
// apart.
template <typename T>
void pool_row(
    const T* image, Size in, int64_t row_stride, int64_t pixel_stride, int64_t depth, const Window& window,
    T pad, int64_t out_row, int64_t out_width, float* best, Tap* best_tap) {
  const auto tap_at = [&](int64_t i) { return best_tap == nullptr ? nullptr : best_tap + i; };
  std::fill(best, best + out_width * depth, -INFINITY);
  if (best_tap != nullptr) {
    std::fill(best_tap, best_tap + out_width * depth, Tap{0});
  }
  Tap tap = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t y = out_row * window.stride_height - window.top + i * window.dilation_height;
    for (int64_t j = 0; j < window.kernel_width; ++j, ++tap) {
      const Columns columns =
          inside(y, in.height) ? inside_columns(window, j, in.width, out_width) : Columns{0, 0};
      const int64_t before = columns.first * depth, after = columns.last * depth;
      compete(&pad, 0, before, tap, best, tap_at(0));
      compete(&pad, 0, out_width * depth - after, tap, best + after, tap_at(after));
      if (columns.first == columns.last) {
        continue;
      }
      const int64_t start = j * window.dilation_width - window.left;
      const T* values = image + y * row_stride + (columns.first * window.stride_width + start) * pixel_stride;
      const int64_t step = window.stride_width * pixel_stride;
      if (depth == 1) {
        compete(values, step, columns.last - columns.first, tap, best + before, tap_at(before));
        continue;
      }
      for (int64_t c = columns.first; c < columns.last; ++c, values += step) {
        compete(values, 1, depth, tap, best + c * depth, tap_at(c * depth));
      }
    }
  }
}

template <typename T>
void pool_planes(const Tensor& x, const Window& window, T pad, const Tensor& result, Tap* taps) {
  const bool channels_last = is_channels_last(x);
  const Size in = size_of(x), out = size_of(result);
  const int64_t planes_per_image = channels_last ? 1 : x.size(1);
  const int64_t depth = channels_last ? x.size(1) : 1;
  const int64_t row_length = out.width * depth;
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t cost = row_length * window.kernel_height * window.kernel_width;
  if constexpr (!std::is_same_v<T, torch::headeronly::Half>) {
    if (channels_last && taps == nullptr) {
      const auto pool = choose(BITFAST_EACH(pool_channels<T>));
      return torch::stable::parallel_for(
          0, x.size(0) * out.height, rows_per_task(cost), [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
              pool(
                  source + r / out.height * x.stride(0), in, x.stride(2), x.stride(3), depth, window, pad,
                  r % out.height, out.width, target + r * row_length);
            }
          });
    }
  }
  torch::stable::parallel_for(
      0, x.size(0) * planes_per_image * out.height, rows_per_task(cost), [&](int64_t begin, int64_t end) {
        std::vector<float> best(row_length);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t plane = r / out.height;
          const T* image = source + plane / planes_per_image * x.stride(0) +
              plane % planes_per_image * x.stride(1);
          pool_row(
              image, in, x.stride(2), x.stride(3), depth, window, pad, r % out.height, out.width,
              best.data(), taps == nullptr ? nullptr : taps + r * row_length);
          std::copy(best.begin(), best.end(), target + r * row_length);
        }
      });
}

std::tuple<Tensor, Tensor> same_max_pool(
    const Tensor& x,
    const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& dilation,
    const std::vector<int64_t>& sides,
    double value,
    bool with_taps) {
  check_image_batch(x);
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const Size size = pooled_size(size_of(x), padding, window);
  Tensor result = empty_spatial(x, size.height, size.width, x.scalar_type());
  Tensor taps = with_taps ? empty_spatial(x, size.height, size.width, ScalarType::Short)
                          : torch::stable::new_empty(x, {0}, ScalarType::Short);
  Tap* tap_data = with_taps ? static_cast<Tap*>(taps.mutable_data_ptr()) : nullptr;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T pad = static_cast<T>(static_cast<float>(value));
    pool_planes<T>(x, window, pad, result, tap_data);
  });
  return {result, taps};
}

// ---- max-pool backward ------------------------------------------------------------------------------

// Adds `count` gradients to those of the input pixels `stride` apart, where the maximum came from `tap`.
template <typename T>
BITFAST_FOR_EACH_CPU void pass_on(const T* grad, const Tap* taps, Tap tap, int64_t count, int64_t stride, float* sum) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = static_cast<float>(grad[i]);
    sum[i * stride] += taps[i] == tap ? g : 0.0f;
  }
}

// Sums up for one row of the input what the windows that reach it pass on.
template <typename T>
void gather_row(
    const T* grad, const Tap* taps, Size pooled, int64_t depth, const Window& window, int64_t in_row,
    int64_t in_width, float* sum) {
  std::fill(sum, sum + in_width * depth, 0.0f);
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t y = in_row + window.top - i * window.dilation_height;
    if (y % window.stride_height != 0 || !inside(y / window.stride_height, pooled.height)) {
      continue;
    }
    const int64_t row = y / window.stride_height * pooled.width;
    for (int64_t j = 0; j < window.kernel_width; ++j) {
      const Tap tap = static_cast<Tap>(i * window.kernel_width + j);
      const int64_t start = j * window.dilation_width - window.left;
      const Columns columns = inside_columns(window, j, in_width, pooled.width);
      int64_t from = (row + columns.first) * depth;
      if (depth == 1 && columns.first < columns.last) {
        const int64_t to = columns.first * window.stride_width + start;
        const int64_t count = columns.last - columns.first;
        pass_on(grad + from, taps + from, tap, count, window.stride_width, sum + to);
        continue;
      }
      for (int64_t c = columns.first; c < columns.last; ++c, from += depth) {
        const int64_t to = (c * window.stride_width + start) * depth;
        pass_on(grad + from, taps + from, tap, depth, 1, sum + to);
      }
    }
  }
}

template <typename T>
void gather_planes(const Tensor& grad, const Tensor& taps, const Window& window, const Tensor& result) {
  const bool channels_last = is_channels_last(taps);
  const Size in = size_of(result), pooled = size_of(taps);
  const int64_t planes_per_image = channels_last ? 1 : result.size(1);
  const int64_t depth = channels_last ? result.size(1) : 1;
  const int64_t row_length = in.width * depth;
  const T* grad_data = static_cast<const T*>(grad.const_data_ptr());
  const Tap* tap_data = static_cast<const Tap*>(taps.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t cost = row_length * window.kernel_height * window.kernel_width;
  torch::stable::parallel_for(
      0, result.size(0) * planes_per_image * in.height, rows_per_task(cost),
      [&](int64_t begin, int64_t end) {
        std::vector<float> sum(row_length);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t plane = r / in.height * pooled.height * pooled.width * depth;
          gather_row(
              grad_data + plane, tap_data + plane, pooled, depth, window, r % in.height, in.width,
              sum.data());
          std::copy(sum.begin(), sum.end(), target + r * row_length);
        }
      });
}

Tensor same_max_pool_backward(
    const Tensor& grad,
    const Tensor& taps,
    const std::vector<int64_t>& input_size,
    const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& dilation,
    const std::vector<int64_t>& sides) {
  STD_TORCH_CHECK(input_size.size() == 2, "size must be (height, width)");
  const Size size{input_size[0], input_size[1]};
  const Padding padding = padding_from(sides);
  const Window window = window_from(kernel_size, stride, dilation, padding);
  const Tensor matching = matching_gradient(grad, taps, size, padding, window);
  Tensor result = empty_spatial(taps, size.height, size.width, grad.scalar_type());
  dispatch_floating(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gather_planes<T>(matching, taps, window, result);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("same_pad.native(Tensor x, SymInt[] padding, float value) -> Tensor");
  m.def(
      "same_max_pool.native(Tensor x, int[] kernel_size, int[] stride, int[] dilation, SymInt[] padding, "
      "float value, bool with_taps) -> (Tensor, Tensor)");
  m.def(
      "same_max_pool_backward.native(Tensor grad, Tensor taps, SymInt[] size, int[] kernel_size, "
      "int[] stride, int[] dilation, SymInt[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("same_pad.native", TORCH_BOX(&same_pad));
  m.impl("same_max_pool.native", TORCH_BOX(&same_max_pool));
  m.impl("same_max_pool_backward.native", TORCH_BOX(&same_max_pool_backward));
}

}  // namespace bitfast::same_padding
