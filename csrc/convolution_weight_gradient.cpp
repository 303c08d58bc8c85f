// convolution_weight_gradient: the schema, and the operator on CPUs with AVX-512, which divides the work and calls the
// loops. bitfast/ops/convolution_gradients.py says what it takes and returns.
#include "errors.h"

#include "convolution_weight_gradient.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "convolution_checks.h"
#include "float_data.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "convolution_weight_gradient_loops.h"
#define BITFAST_OP convolution_weight_gradient
#define BITFAST_SETS BITFAST_AVX512 + BITFAST_AVX512_BF16
#include "each_instruction_set.h"

namespace bitfast::convolution_weight_gradient {
namespace {

// A task of fewer multiplications than this is not worth another thread.
constexpr int64_t multiplications_per_task = 1 << 18;

using Pair = std::array<int64_t, 2>;

struct Convolution {
  Pair stride, padding, dilation;
};

Pair pair_of(const char* name, const std::vector<int64_t>& values, int64_t least) {
  STD_TORCH_CHECK(
      values.size() == 2 && values[0] >= least && values[1] >= least, name, " must be two numbers of at least ", least);
  return {values[0], values[1]};
}

void check_arguments(const Tensor& x, const Tensor& grad, const Tensor& result, const Convolution& convolution) {
  check_feature_maps(x);
  for (const Tensor* tensor : {&grad, &result}) {
    STD_TORCH_CHECK(
        tensor->dim() == 4 && tensor->scalar_type() == x.scalar_type(), "grad and result must have the dtype of x");
  }
  STD_TORCH_CHECK(
      result.size(0) == grad.size(1) && result.size(1) == x.size(1), "result must have the channels of grad and x");
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "grad must have as many images as x");
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = convolution.dilation[axis] * (result.size(2 + axis) - 1) + 1;
    const int64_t padded = x.size(2 + axis) + 2 * convolution.padding[axis];
    STD_TORCH_CHECK(
        padded >= reach && grad.size(2 + axis) == (padded - reach) / convolution.stride[axis] + 1,
        "grad must have the shape of the convolution's result");
  }
  STD_TORCH_CHECK(is_dense_channels_last(x) && is_dense_channels_last(grad), "x and grad must be channels_last");
  STD_TORCH_CHECK(
      result.is_contiguous() || is_channels_last(result), "result must be contiguous or channels_last");
}

// (x - center) * scale + shift, for each image and channel.
struct Coefficients {
  std::vector<float> center, scale, shift;
};

// A norm as the operator takes it; none without a weight.
struct Norm {
  std::optional<Tensor> mean, rstd, weight, bias;
  int64_t groups;
};

Coefficients coefficients_of(const Norm& norm, const Tensor& x) {
  check_num_groups(x, norm.groups);
  STD_TORCH_CHECK(
      norm.mean.has_value() && norm.rstd.has_value() && norm.bias.has_value(),
      "a norm has a weight, a bias, a mean and an rstd");
  check_statistics(*norm.mean, *norm.rstd, x.size(0) * norm.groups, "of shape (N, num_groups)");
  const int64_t images = x.size(0), channels = x.size(1), size = channels / norm.groups;
  for (const std::optional<Tensor>* parameter : {&norm.weight, &norm.bias}) {
    STD_TORCH_CHECK(
        (*parameter)->dim() == 1 && (*parameter)->size(0) == channels,
        "the norm's weight and bias must have shape (C,)");
  }
  const float* mean = static_cast<const float*>(norm.mean->const_data_ptr());
  const float* rstd = static_cast<const float*>(norm.rstd->const_data_ptr());
  const FloatData weight(*norm.weight), bias(*norm.bias);
  Coefficients result;
  for (int64_t at = 0; at < images * channels; ++at) {
    const int64_t group = at / size, c = at % channels;
    result.center.push_back(mean[group]);
    result.scale.push_back(weight.data()[c] * rstd[group]);
    result.shift.push_back(bias.data()[c]);
  }
  return result;
}

template <typename T>
Work<T> work_of(const Tensor& x, const Tensor& grad, const Tensor& result, const Convolution& convolution) {
  Work<T> work{};
  work.images = x.size(0);
  work.in_channels = x.size(1);
  work.in_height = x.size(2);
  work.in_width = x.size(3);
  work.out_channels = grad.size(1);
  work.height = grad.size(2);
  work.width = grad.size(3);
  work.kernel_height = result.size(2);
  work.kernel_width = result.size(3);
  for (int axis = 0; axis < 2; ++axis) {
    work.stride[axis] = convolution.stride[axis];
    work.padding[axis] = convolution.padding[axis];
    work.dilation[axis] = convolution.dilation[axis];
  }
  work.x = static_cast<const T*>(x.const_data_ptr());
  work.grad = static_cast<const T*>(grad.const_data_ptr());
  const Pair none{0, 0}, one{1, 1};
  if (work.kernel_height == 1 && work.kernel_width == 1 && convolution.stride == one && convolution.padding == none) {
    work.is_flat = true;
    work.pixels = work.height * work.width;
    work.height = ceil_div(work.pixels, flat_pixels);
    work.width = ceil_div(ceil_div(work.pixels, std::max<int64_t>(1, work.height)), 2) * 2;
    work.height = ceil_div(work.pixels, std::max<int64_t>(1, work.width));
  }
  return work;
}

// Cuts the work into tasks. More splits of the sums cost memory that is written and read again; more blocks of channels
// cost packing the others again.
template <typename T>
void divide(Work<T>& work) {
  const int64_t words = work.rows() * work.words_of_row(), chunks = ceil_div(work.out_channels, chunk_words);
  const int64_t cost = words * work.products() * work.out_channels * work.in_channels;
  const int64_t wanted =
      std::clamp<int64_t>(cost / multiplications_per_task, 1, torch::stable::get_num_threads());
  const int64_t x_words = work.in_channels * work.versions() * words;
  const int64_t grad_words = work.out_channels * (work.is_winograd ? positions : 1) * words;
  const int64_t most_splits = std::max<int64_t>(1, ceil_div(work.rows(), work.rows_at_once()));
  const bool splits = 2 * sums_words(work) < std::min(x_words, grad_words);
  work.splits = splits ? std::min(wanted, most_splits) : 1;
  const int64_t blocks = ceil_div(wanted, work.splits);
  work.row_blocks = grad_words > x_words ? std::min(blocks, chunks) : 1;
  work.column_blocks = std::min(ceil_div(blocks, work.row_blocks), work.panels());
  work.row_blocks = std::min(ceil_div(blocks, work.column_blocks), chunks);
  if (!splits) {
    work.splits = std::min(ceil_div(wanted, work.row_blocks * work.column_blocks), most_splits);
  }
}

template <typename T>
void run(const Work<T>& work, const Tensor& result) {
#if BITFAST_X86
  const int64_t chunked = ceil_div(scratch_words(work), chunk_words) * chunk_words + 16 * chunk_words;
  Tensor scratch = torch::stable::new_empty(result, {work.tasks() * chunked}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(result, {work.splits * sums_words(work)}, ScalarType::Float);
  float* memory = static_cast<float*>(scratch.mutable_data_ptr());
  float* all_sums = static_cast<float*>(sums.mutable_data_ptr());
  const int64_t blocks = work.row_blocks * work.column_blocks;
  torch::stable::parallel_for(0, work.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      float* of_split = all_sums + number / blocks * sums_words(work);
      if constexpr (sizeof(T) == 4) {
        avx512::sum_products<T>(work, task_of(work, number), memory + number * chunked, of_split);
      } else {
        avx512_bf16::sum_products<T>(work, task_of(work, number), memory + number * chunked, of_split);
      }
    }
  });
  Output<T> output;
  const int64_t taps = work.kernel_height * work.kernel_width;
  const bool taps_first = is_channels_last(result);
  output.result = static_cast<T*>(result.mutable_data_ptr());
  output.out_stride = work.in_channels * taps;
  output.in_stride = taps_first ? 1 : taps;
  output.tap_stride = taps_first ? work.in_channels : 1;
  output.sums = all_sums;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work.out_channels * taps * panel_columns));
  torch::stable::parallel_for(0, work.panels(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      avx512::write_panel<T>(work, output, panel);
    }
  });
#endif
}

void convolution_weight_gradient(
    const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, int64_t num_groups,
    StringHandle activation, const Tensor& grad, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool winograd, const Tensor& result) {
  const Convolution convolution{
      pair_of("stride", stride, 1), pair_of("padding", padding, 0), pair_of("dilation", dilation, 1)};
  check_arguments(x, grad, result, convolution);
  const std::string problem = convolution_problem(x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(problem.empty(), "convolution_weight_gradient cannot run here: ", problem);
  const Pair one{1, 1};
  STD_TORCH_CHECK(
      !winograd ||
          (x.scalar_type() == ScalarType::Float && result.size(2) == 3 && result.size(3) == 3 &&
           convolution.stride == one && convolution.padding == one && convolution.dilation == one),
      "Winograd's products are for 3x3 filters of stride and padding 1, in float32");
  dispatch_kernel_dtype("convolution_weight_gradient", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Work<T> work = work_of<T>(x, grad, result, convolution);
    work.is_winograd = winograd;
    work.activation = take_activation(activation);
    Coefficients coefficients;
    if (norm_weight.has_value()) {
      coefficients = coefficients_of({mean, rstd, norm_weight, norm_bias, num_groups}, x);
      work.center = coefficients.center.data();
      work.scale = coefficients.scale.data();
      work.shift = coefficients.shift.data();
    }
    if (result.numel() == 0) {
      return;
    }
    if (work.rows() * work.width == 0) {
      T* target = static_cast<T*>(result.mutable_data_ptr());
      std::fill(target, target + result.numel(), T(0.0f));
      return;
    }
    divide(work);
    run(work, result);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def(
      "convolution_weight_gradient.native(Tensor x, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
      "Tensor? norm_bias, int num_groups, str activation, Tensor grad, int[] stride, int[] padding, int[] dilation, "
      "bool winograd, Tensor(a!) result) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("convolution_weight_gradient.native", TORCH_BOX(&convolution_weight_gradient));
}

}  // namespace bitfast::convolution_weight_gradient
