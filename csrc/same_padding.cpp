// same_padding: the schemas, and the kernels on the CPU. bitfast/ops/same_padding.py says what each operator takes
// and returns.
#include "errors.h"

#include "same_padding_operators.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ceil_div.h"
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

// How feature maps are divided into planes of rows: one plane per channel where channels are outermost; where they are
// innermost one per image, whose pixels have `depth` adjacent values, all the channels.
struct Planes {
  bool channels_last;
  int64_t per_image, depth;
};

Planes planes_of(const Tensor& x) {
  return is_channels_last(x) ? Planes{true, 1, x.size(1)} : Planes{false, x.size(1), 1};
}

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

template <typename T>
void pad_planes(const Tensor& x, const Padding& padding, T value, const Tensor& result) {
  const Size in = size_of(x), out = size_of(result);
  const Planes planes = planes_of(x);
  const int64_t element_stride = planes.channels_last ? 1 : x.stride(3);
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t row_length = out.width * planes.depth;
  const int64_t rows = x.size(0) * planes.per_image * out.height;
  torch::stable::parallel_for(0, rows, rows_per_task(row_length), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* target_row = target + r * row_length;
      const int64_t y = r % out.height - padding.top;
      if (!inside(y, in.height)) {
        std::fill(target_row, target_row + row_length, value);
        continue;
      }
      const int64_t plane = r / out.height;
      const T* row = source + plane / planes.per_image * x.stride(0) + plane % planes.per_image * x.stride(1) +
          y * x.stride(2);
      pad_row(
          row, element_stride, in.width * planes.depth, padding.left * planes.depth, value, target_row, row_length);
    }
  });
}

// ---- max-pool ---------------------------------------------------------------------------------------

// The output columns whose pixel number `tap_column` of the window lies inside the input.
struct Columns {
  int64_t first, last;
};

Columns inside_columns(const Window& window, int64_t tap_column, int64_t width, int64_t out_width) {
  const int64_t start = tap_column * window.dilation_width - window.left;
  const auto columns_before = [&](int64_t x) {  // how many output columns read left of input column x
    return x <= start ? 0 : ceil_div(x - start, window.stride_width);
  };
  const int64_t first = std::min(columns_before(0), out_width);
  return {first, std::clamp(columns_before(width), first, out_width)};
}

// Replaces the best values so far, and the taps that they came from, by those of `tap` where these beat them.
// Taps are as wide as values here, so that vectors hold as many of both.
template <typename T>
BITFAST_FOR_EACH_CPU void update_best(
    const T* values, int64_t stride, int64_t count, int32_t tap, float* best, int32_t* best_tap) {
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
    T pad, int64_t out_row, int64_t out_width, float* best, int32_t* best_tap) {
  const auto tap_at = [&](int64_t i) { return best_tap == nullptr ? nullptr : best_tap + i; };
  std::fill(best, best + out_width * depth, -INFINITY);
  if (best_tap != nullptr) {
    std::fill(best_tap, best_tap + out_width * depth, 0);
  }
  int32_t tap = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t y = out_row * window.stride_height - window.top + i * window.dilation_height;
    for (int64_t j = 0; j < window.kernel_width; ++j, ++tap) {
      const Columns columns =
          inside(y, in.height) ? inside_columns(window, j, in.width, out_width) : Columns{0, 0};
      const int64_t before = columns.first * depth, after = columns.last * depth;
      update_best(&pad, 0, before, tap, best, tap_at(0));
      update_best(&pad, 0, out_width * depth - after, tap, best + after, tap_at(after));
      if (columns.first == columns.last) {
        continue;
      }
      const int64_t start = j * window.dilation_width - window.left;
      const T* values = image + y * row_stride + (columns.first * window.stride_width + start) * pixel_stride;
      const int64_t step = window.stride_width * pixel_stride;
      if (depth == 1) {
        update_best(values, step, columns.last - columns.first, tap, best + before, tap_at(before));
        continue;
      }
      for (int64_t c = columns.first; c < columns.last; ++c, values += step) {
        update_best(values, 1, depth, tap, best + c * depth, tap_at(c * depth));
      }
    }
  }
}

template <typename T, typename Tap>
void pool_planes(const Tensor& x, const Window& window, T pad, const Tensor& result, Tap* taps) {
  const Size in = size_of(x), out = size_of(result);
  const Planes planes = planes_of(x);
  const int64_t depth = planes.depth;
  const int64_t row_length = out.width * depth;
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t cost = row_length * window.kernel_height * window.kernel_width;
  if constexpr (!std::is_same_v<T, torch::headeronly::Half>) {
    if (planes.channels_last && taps == nullptr) {
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
      0, x.size(0) * planes.per_image * out.height, rows_per_task(cost), [&](int64_t begin, int64_t end) {
        std::vector<float> best(row_length);
        std::vector<int32_t> best_taps(taps == nullptr ? 0 : row_length);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t plane = r / out.height;
          const T* image = source + plane / planes.per_image * x.stride(0) +
              plane % planes.per_image * x.stride(1);
          pool_row(
              image, in, x.stride(2), x.stride(3), depth, window, pad, r % out.height, out.width,
              best.data(), taps == nullptr ? nullptr : best_taps.data());
          std::copy(best.begin(), best.end(), target + r * row_length);
          if (taps != nullptr) {
            std::copy(best_taps.begin(), best_taps.end(), taps + r * row_length);
          }
        }
      });
}

// ---- max-pool backward ------------------------------------------------------------------------------

// Adds `count` gradients to the sums of input pixels `stride` apart, where the maximum came from `tap`.
template <typename T, typename Tap>
BITFAST_FOR_EACH_CPU void add_gradients(
    const T* grad, const Tap* taps, Tap tap, int64_t count, int64_t stride, float* sum) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = static_cast<float>(grad[i]);
    sum[i * stride] += taps[i] == tap ? g : 0.0f;
  }
}

// Sums up for one row of the input the gradients of the windows that reach it.
template <typename T, typename Tap>
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
        add_gradients(grad + from, taps + from, tap, count, window.stride_width, sum + to);
        continue;
      }
      for (int64_t c = columns.first; c < columns.last; ++c, from += depth) {
        const int64_t to = (c * window.stride_width + start) * depth;
        add_gradients(grad + from, taps + from, tap, depth, 1, sum + to);
      }
    }
  }
}

template <typename T, typename Tap>
void gather_planes(const Tensor& grad, const Tensor& taps, const Window& window, const Tensor& result) {
  const Size in = size_of(result), pooled = size_of(taps);
  const Planes planes = planes_of(taps);
  const int64_t depth = planes.depth;
  const int64_t row_length = in.width * depth;
  const T* grad_data = static_cast<const T*>(grad.const_data_ptr());
  const Tap* tap_data = static_cast<const Tap*>(taps.const_data_ptr());
  T* target = static_cast<T*>(result.mutable_data_ptr());
  const int64_t cost = row_length * window.kernel_height * window.kernel_width;
  torch::stable::parallel_for(
      0, result.size(0) * planes.per_image * in.height, rows_per_task(cost),
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

// ---- operators --------------------------------------------------------------------------------------

struct CpuKernels {
  struct DeviceGuard {
    explicit DeviceGuard(const Tensor&) {}
  };

  static void pad(const Tensor& x, const Padding& padding, float value, const Tensor& result) {
    dispatch_floating(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      pad_planes<T>(x, padding, static_cast<T>(value), result);
    });
  }

  static void pool(const Tensor& x, const Window& window, float value, const Tensor& result, const Tensor* taps) {
    dispatch_floating(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      dispatch_taps(window, [&](auto first) {
        using Tap = decltype(first);
        Tap* tap_data = taps == nullptr ? nullptr : static_cast<Tap*>(taps->mutable_data_ptr());
        pool_planes<T, Tap>(x, window, static_cast<T>(value), result, tap_data);
      });
    });
  }

  static void pool_backward(const Tensor& grad, const Tensor& taps, const Window& window, const Tensor& result) {
    dispatch_floating(grad.scalar_type(), [&](auto zero) {
      dispatch_taps(window, [&](auto first) {
        gather_planes<decltype(zero), decltype(first)>(grad, taps, window, result);
      });
    });
  }
};

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
  m.impl("same_pad.native", TORCH_BOX(&same_pad<CpuKernels>));
  m.impl("same_max_pool.native", TORCH_BOX(&same_max_pool<CpuKernels>));
  m.impl("same_max_pool_backward.native", TORCH_BOX(&same_max_pool_backward<CpuKernels>));
}

}  // namespace bitfast::same_padding
