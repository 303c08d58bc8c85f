// group_norm_act: the schemas, and the operators on the CPU, which divide the work and call the loops.
// bitfast/ops/group_norm_act_contract.py says what each takes and returns.
#include "errors.h"

#include "group_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "ceil_div.h"
#include "checks.h"
#include "float_data.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "group_norm_act_loops.h"
#define BITFAST_OP group_norm_act
#include "each_instruction_set.h"

namespace bitfast::group_norm_act {
namespace {

// A task of fewer elements than this is not worth another thread.
constexpr int64_t elements_per_task = 32768;
// What a task reads twice should still be in a core's own cache the second time.
constexpr int64_t task_bytes = 1 << 20;
// A block should have at least line_bytes of each pixel, or cache lines are read in part; with row_bytes fewer pixels
// compete for the same places in the cache.
constexpr int64_t line_bytes = 64, row_bytes = 256;

// Cuts a batch into tasks: enough of them for all threads, none too small to be worth one.
Division divide(const Tensor& x, int64_t groups, int64_t element_bytes) {
  Division division;
  division.images = x.size(0);
  division.channels = x.size(1);
  division.pixels = x.size(2) * x.size(3);
  division.groups = groups;
  division.channels_last = is_channels_last(x);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = division.group_size();
  int64_t groups_per_block = 1;
  if (division.channels_last) {
    const int64_t bytes_per_pixel = size * element_bytes;
    groups_per_block = std::clamp<int64_t>(row_bytes / bytes_per_pixel, 1, groups);
    const auto is_too_wide = [&] {
      const bool spills = groups_per_block * bytes_per_pixel * division.pixels > task_bytes;
      const bool idles = division.images * ceil_div(groups, groups_per_block) % threads != 0;
      return (spills || idles) && groups_per_block / 2 * bytes_per_pixel >= line_bytes;
    };
    while (is_too_wide()) {
      groups_per_block /= 2;
    }
  }
  division.block = groups_per_block * size;
  division.blocks = ceil_div(groups, groups_per_block);
  const int64_t tasks = division.images * division.blocks;
  const int64_t worthwhile = std::max<int64_t>(1, division.block * division.pixels / elements_per_task);
  const bool are_enough = tasks == 0 || tasks >= threads;
  const int64_t pieces = are_enough ? 1 : std::clamp<int64_t>(ceil_div(threads, tasks), 1, worthwhile);
  division.piece = ceil_div(division.pixels, pieces);
  division.pieces = ceil_div(division.pixels, division.piece);
  return division;
}

// For what goes through channels_last memory in order: whole pixels, of an image or of a piece of it.
Division divide_pixels(const Tensor& x, int64_t groups, int64_t element_bytes) {
  Division division = divide(x, groups, element_bytes);
  if (!division.channels_last) {
    return division;
  }
  division.block = division.channels;
  division.blocks = 1;
  const int64_t threads = torch::stable::get_num_threads(), images = division.images;
  const int64_t most = std::max<int64_t>(1, division.channels * division.pixels / elements_per_task);
  int64_t pieces = 1;
  while (pieces < std::min(most, threads) && images * pieces % threads != 0 && images * pieces < 4 * threads) {
    ++pieces;
  }
  division.piece = ceil_div(division.pixels, pieces);
  division.pieces = ceil_div(division.pixels, division.piece);
  return division;
}

template <typename Work>
void for_each_task(const Work& work, void (*step)(const Work&, const Task&)) {
  const Division& division = work.division;
  const int64_t grain = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, division.block * division.piece));
  torch::stable::parallel_for(0, division.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      step(work, task_of(division, number));
    }
  });
}

// Calls both(work, task) for each task, or, where tasks share a group, first(work, task) for all of them and then
// second(work, task).
template <typename Work>
void in_one_pass_or_two(
    const Work& work, void (*both)(const Work&, const Task&), void (*first)(const Work&, const Task&),
    void (*second)(const Work&, const Task&)) {
  if (work.division.pieces == 1) {
    return for_each_task(work, both);
  }
  for_each_task(work, first);
  for_each_task(work, second);
}

// The memory of ChannelPairs.
struct PairStorage {
  std::vector<double> numbers;
  ChannelPairs pairs;

  explicit PairStorage(const Division& d) : numbers(2 * d.images * d.pieces * d.channels) {
    pairs = {numbers.data(), numbers.data() + numbers.size() / 2};
  }
};

void check_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups) {
  check_feature_maps(x);
  check_num_groups(x, num_groups);
  for (const Tensor* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(
        parameter->dim() == 1 && parameter->size(0) == x.size(1), "weight and bias must have shape (C,)");
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == x.scalar_type(), name, " must be like x");
  STD_TORCH_CHECK(have_same_shape(tensor, x), name, " must have the shape of x");
}

void check_same_layout(const char* name, const Tensor& tensor, const Tensor& x) {
  check_like(name, tensor, x);
  STD_TORCH_CHECK(
      (x.is_contiguous() && tensor.is_contiguous()) || (is_channels_last(x) && is_channels_last(tensor)), "x and ",
      name, " must both be contiguous or both channels_last");
}

// Null without a tensor.
template <typename T>
T* data_of(const std::optional<Tensor>& x) {
  if constexpr (std::is_const_v<T>) {
    return x.has_value() ? static_cast<T*>(x->const_data_ptr()) : nullptr;
  } else {
    return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
  }
}

// The arguments that all norms have.
struct Norm {
  const Tensor &weight, &bias;
  int64_t num_groups;
  double eps;
  Activation activation;
};

// What only some norms read or write. Feature maps are dense, in the layout of x.
struct Options {
  std::optional<Tensor> residual, total;  // x + residual goes to total, and is normalized instead of x
  std::optional<Tensor> moments;          // of x, if they are known
  std::optional<Tensor> shortcut;         // added before the activation
  std::optional<Tensor> mean, rstd;       // of each group, for the backward pass
};

// Normalizes x, which is dense, into a result of its layout, which may be x itself.
void normalize(const Tensor& x, const Norm& norm, const Options& options, const Tensor& result) {
  const FloatData weight(norm.weight), bias(norm.bias);
  if (options.moments.has_value()) {
    check_moments(*options.moments, x);
  }
  dispatch_kernel_dtype("group_norm_act", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Forward<T> work{};
    work.division = divide(x, norm.num_groups, sizeof(T));
    PairStorage storage(work.division);
    work.activation = norm.activation;
    work.eps = norm.eps;
    work.x = static_cast<const T*>(x.const_data_ptr());
    work.residual = data_of<const T>(options.residual);
    work.total = data_of<T>(options.total);
    work.result = static_cast<T*>(result.mutable_data_ptr());
    work.weight = weight.data();
    work.bias = bias.data();
    work.mean = data_of<float>(options.mean);
    work.rstd = data_of<float>(options.rstd);
    work.moments = storage.pairs;
    work.shortcut = data_of<const T>(options.shortcut);
    if (options.moments.has_value()) {
      work.known_means = data_of<const double>(options.moments);
      work.known_variances = work.known_means + work.division.images * work.division.channels;
      return for_each_task(work, choose(BITFAST_EACH(forward_normalize<T>)));
    }
    in_one_pass_or_two(
        work, choose(BITFAST_EACH(forward<T>)), choose(BITFAST_EACH(forward_moments<T>)),
        choose(BITFAST_EACH(forward_normalize<T>)));
  });
}

// Total (x itself without a residual), result, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, const std::optional<Tensor>& residual, const Norm& norm) {
  check_arguments(x, norm.weight, norm.bias, norm.num_groups);
  const auto memory_format = memory_format_of(x);
  x = torch::stable::contiguous(x, memory_format);
  const auto empty_like_x = [&] { return empty_spatial(x, x.size(2), x.size(3), x.scalar_type()); };
  const auto empty_statistic = [&] {
    return torch::stable::new_empty(x, {x.size(0), norm.num_groups}, ScalarType::Float);
  };
  Options options;
  if (residual.has_value()) {
    check_like("residual", *residual, x);
    options.residual = torch::stable::contiguous(*residual, memory_format);
    options.total = empty_like_x();
  }
  const Tensor result = empty_like_x();
  options.mean = empty_statistic();
  options.rstd = empty_statistic();
  normalize(x, norm, options, result);
  return {options.total.value_or(x), result, *options.mean, *options.rstd};
}

// The result alone, in memory of the caller's, which may be that of x; with the moments of x, if they are
// known, and a shortcut added before the activation.
void group_norm_act_into(
    const Tensor& x, const std::optional<Tensor>& moments, const Tensor& weight, const Tensor& bias, int64_t num_groups,
    double eps, StringHandle activation, const std::optional<Tensor>& shortcut, const Tensor& result) {
  check_arguments(x, weight, bias, num_groups);
  check_same_layout("result", result, x);
  if (shortcut.has_value()) {
    check_same_layout("shortcut", *shortcut, x);
  }
  Options options;
  options.moments = moments;
  options.shortcut = shortcut;
  normalize(x, {weight, bias, num_groups, eps, take_activation(activation)}, options, result);
}

void group_norm_act_in_place(
    const Tensor& x, const std::optional<Tensor>& moments, const Tensor& weight, const Tensor& bias, int64_t num_groups,
    double eps, StringHandle activation, const std::optional<Tensor>& shortcut) {
  group_norm_act_into(x, moments, weight, bias, num_groups, eps, activation, shortcut, x);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups, double eps,
    StringHandle activation) {
  const Norm norm{weight, bias, num_groups, eps, take_activation(activation)};
  auto [total, result, mean, rstd] = forward(x, std::nullopt, norm);
  return {result, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_act(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, int64_t num_groups, double eps,
    StringHandle activation) {
  return forward(x, residual, {weight, bias, num_groups, eps, take_activation(activation)});
}

// A parameter's gradient: for each channel the sum of what each image and piece contributes.
Tensor parameter_gradient(const double* parts, const Division& division, const Tensor& parameter) {
  Tensor result = torch::stable::new_empty(parameter, {division.channels}, ScalarType::Float);
  std::vector<double> sums(division.channels);
  for (int64_t row = 0; row < division.images * division.pieces; ++row) {
    for (int64_t c = 0; c < division.channels; ++c) {
      sums[c] += parts[row * division.channels + c];
    }
  }
  std::copy(sums.begin(), sums.end(), static_cast<float*>(result.mutable_data_ptr()));
  return parameter.scalar_type() == ScalarType::Float ? result
                                                      : torch::stable::to(result, parameter.scalar_type());
}

// The gradients of x, weight and bias, and the result of the forward pass if it is computed again.
struct Gradients {
  Tensor x, weight, bias, result;
};

Gradients gradients_of(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, Activation activation,
    bool recomputes) {
  check_arguments(x, weight, bias, num_groups);
  check_like("grad", grad, x);
  check_statistics(mean, rstd, x.size(0) * num_groups, "of shape (N, num_groups)");
  const auto memory_format = memory_format_of(x);
  const Tensor dense_x = torch::stable::contiguous(x, memory_format);
  const Tensor dense_grad = torch::stable::contiguous(grad, memory_format);
  std::optional<Tensor> dense_grad_total;
  if (grad_total.has_value()) {
    check_like("grad_total", *grad_total, x);
    dense_grad_total = torch::stable::contiguous(*grad_total, memory_format);
  }
  const auto empty_like_x = [&] { return empty_spatial(dense_x, x.size(2), x.size(3), x.scalar_type()); };
  Gradients gradients;
  gradients.x = empty_like_x();
  if (recomputes) {
    gradients.result = empty_like_x();
  }
  const FloatData weights(weight), biases(bias);
  dispatch_kernel_dtype("group_norm_act", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Backward<T> work{};
    work.division = divide_pixels(dense_x, num_groups, sizeof(T));
    PairStorage storage(work.division);
    work.activation = activation;
    work.grad = static_cast<const T*>(dense_grad.const_data_ptr());
    work.grad_total = data_of<const T>(dense_grad_total);
    work.x = static_cast<const T*>(dense_x.const_data_ptr());
    work.grad_x = static_cast<T*>(gradients.x.mutable_data_ptr());
    work.result = recomputes ? static_cast<T*>(gradients.result.mutable_data_ptr()) : nullptr;
    work.weight = weights.data();
    work.bias = biases.data();
    work.mean = static_cast<const float*>(mean.const_data_ptr());
    work.rstd = static_cast<const float*>(rstd.const_data_ptr());
    work.sums = storage.pairs;
    in_one_pass_or_two(
        work, choose(BITFAST_EACH(backward<T>)), choose(BITFAST_EACH(backward_sums<T>)),
        choose(BITFAST_EACH(backward_grad<T>)));
    gradients.weight = parameter_gradient(storage.pairs.second, work.division, weight);
    gradients.bias = parameter_gradient(storage.pairs.first, work.division, bias);
  });
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, StringHandle activation) {
  const Gradients gradients =
      gradients_of(grad, grad_total, x, weight, bias, mean, rstd, num_groups, take_activation(activation), false);
  return {gradients.x, gradients.weight, gradients.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act_recompute(
    const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups, StringHandle activation) {
  const Gradients gradients =
      gradients_of(grad, grad_total, x, weight, bias, mean, rstd, num_groups, take_activation(activation), true);
  return {gradients.x, gradients.weight, gradients.bias, gradients.result};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def(
      "group_norm_act.native(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, str activation) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_act_.native(Tensor(a!) x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, "
      "float eps, str activation, Tensor? shortcut) -> ()");
  m.def(
      "group_norm_act_into.native(Tensor x, Tensor? moments, Tensor weight, Tensor bias, int num_groups, "
      "float eps, str activation, Tensor? shortcut, Tensor(a!) result) -> ()");
  m.def(
      "add_group_norm_act.native(Tensor x, Tensor residual, Tensor weight, Tensor bias, int num_groups, "
      "float eps, str activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_act_backward.native(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor rstd, int num_groups, str activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_act_recompute.native(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor rstd, int num_groups, str activation) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("group_norm_act.native", TORCH_BOX(&group_norm_act));
  m.impl("group_norm_act_.native", TORCH_BOX(&group_norm_act_in_place));
  m.impl("group_norm_act_into.native", TORCH_BOX(&group_norm_act_into));
  m.impl("add_group_norm_act.native", TORCH_BOX(&add_group_norm_act));
  m.impl("group_norm_act_backward.native", TORCH_BOX(&group_norm_act_backward));
  m.impl("group_norm_act_recompute.native", TORCH_BOX(&group_norm_act_recompute));
}

}  // namespace bitfast::group_norm_act
