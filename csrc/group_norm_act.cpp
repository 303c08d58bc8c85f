// group_norm_act: the schemas, and the CPU kernels. bitfast/ops/group_norm_act.py says what each takes and
// returns.
#include "errors.h"

#include "group_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "float_data.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "group_norm_act_loops.h"
#define BITFAST_NAMES using namespace bitfast::group_norm_act;
#include "each_instruction_set.h"

namespace bitfast::group_norm_act {
namespace {

using torch::headeronly::ScalarType;

// A task of fewer elements than this is not worth another thread.
constexpr int64_t elements_per_task = 32768;
// What a task reads twice should still be in a core's own cache the second time.
constexpr int64_t task_bytes = 1 << 20;
// Fewer adjacent bytes than this waste cache lines; more than the second make rows of the cache collide less.
constexpr int64_t line_bytes = 64, row_bytes = 256;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

Division divide(const Tensor& x, int64_t groups, int64_t element_bytes) {
  Division d;
  d.images = x.size(0);
  d.channels = x.size(1);
  d.pixels = x.size(2) * x.size(3);
  d.groups = groups;
  d.channels_last = is_channels_last(x);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = d.group_size();
  int64_t groups_per_block = 1;
  if (d.channels_last) {
    const int64_t bytes_per_pixel = size * element_bytes;
    groups_per_block = std::clamp<int64_t>(row_bytes / bytes_per_pixel, 1, groups);
    const auto is_too_wide = [&] {
      const bool spills = groups_per_block * bytes_per_pixel * d.pixels > task_bytes;
      const bool idles = d.images * ceil_div(groups, groups_per_block) % threads != 0;
      return (spills || idles) && groups_per_block / 2 * bytes_per_pixel >= line_bytes;
    };
    while (is_too_wide()) {
      groups_per_block /= 2;
    }
  }
  d.block = groups_per_block * size;
  d.blocks = ceil_div(groups, groups_per_block);
  const int64_t tasks = d.images * d.blocks;
  const int64_t worthwhile = d.block * d.pixels / elements_per_task;
  const int64_t pieces =
      tasks == 0 || tasks >= threads ? 1 : std::clamp<int64_t>(ceil_div(threads, tasks), 1, std::max<int64_t>(1, worthwhile));
  d.piece = ceil_div(d.pixels, pieces);
  d.pieces = ceil_div(d.pixels, d.piece);
  return d;
}

template <typename Work>
void run_all(const Work& work, void (*step)(const Work&, const Task&)) {
  const Division& division = work.division;
  const int64_t grain = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, division.block * division.piece));
  torch::stable::parallel_for(0, division.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      step(work, task_of(division, number));
    }
  });
}

// Runs whole(task) for each task, or, where tasks share a group, first(task) for all and then second(task).
template <typename Work>
void run(
    const Work& work,
    void (*whole)(const Work&, const Task&),
    void (*first)(const Work&, const Task&),
    void (*second)(const Work&, const Task&)) {
  if (work.division.pieces == 1) {
    return run_all(work, whole);
  }
  run_all(work, first);
  run_all(work, second);
}

// Two numbers for each image, piece and channel.
struct PartialStorage {
  std::vector<double> numbers;
  Partial partial;

  explicit PartialStorage(const Division& d) : numbers(2 * d.images * d.pieces * d.channels) {
    partial = {numbers.data(), numbers.data() + numbers.size() / 2};
  }
};

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (N, C, H, W), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(
      num_groups >= 1 && x.size(1) % num_groups == 0, "num_groups must divide the ", x.size(1),
      " channels of x, got ", num_groups);
  for (const Tensor* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(
        parameter->dim() == 1 && parameter->size(0) == x.size(1), "weight and bias must have shape (C,)");
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == x.scalar_type(), name, " must be like x");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == x.size(dim), name, " must have the shape of x");
  }
}

void check_same_layout(const char* name, const Tensor& tensor, const Tensor& x) {
  check_like(name, tensor, x);
  STD_TORCH_CHECK(
      (x.is_contiguous() && tensor.is_contiguous()) || (is_channels_last(x) && is_channels_last(tensor)), "x and ",
      name, " must both be contiguous or both channels_last");
}

template <typename T>
const T* data_of(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Normalizes x, or x + residual, which goes to `total`. All are dense, in the layout of x; the result may be x.
void normalize(
    const Tensor& x,
    const std::optional<Tensor>& residual,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation,
    void* total,
    void* result,
    float* mean,
    float* rstd,
    const std::optional<Tensor>& moments = std::nullopt,
    const std::optional<Tensor>& shortcut = std::nullopt) {
  const FloatData scale(weight), shift(bias);
  const double* known = nullptr;
  if (moments.has_value()) {
    STD_TORCH_CHECK(
        moments->scalar_type() == ScalarType::Double && moments->is_contiguous() && moments->dim() == 3 &&
            moments->size(0) == 2 && moments->size(1) == x.size(0) && moments->size(2) == x.size(1),
        "moments must be float64, contiguous, of shape (2, N, C)");
    known = static_cast<const double*>(moments->const_data_ptr());
  }
  dispatch_kernel_dtype("group_norm_act", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Division division = divide(x, num_groups, sizeof(T));
    PartialStorage storage(division);
    const double* known_variances = known == nullptr ? nullptr : known + division.images * division.channels;
    const Forward<T> work{
        division,
        activation_named(activation),
        eps,
        static_cast<const T*>(x.const_data_ptr()),
        data_of<T>(residual),
        static_cast<T*>(total),
        static_cast<T*>(result),
        scale.data(),
        shift.data(),
        mean,
        rstd,
        storage.partial,
        data_of<T>(shortcut),
        known,
        known_variances};
    if (known != nullptr) {
      return run_all(work, choose(BITFAST_EACH(forward_normalize<T>)));
    }
    run(work, choose(BITFAST_EACH(forward<T>)), choose(BITFAST_EACH(forward_moments<T>)),
        choose(BITFAST_EACH(forward_normalize<T>)));
  });
}

// Total (x itself without a residual), result, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x,
    std::optional<Tensor> residual,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation) {
  check(x, weight, bias, num_groups);
  const auto memory_format = memory_format_of(x);
  x = torch::stable::contiguous(x, memory_format);
  if (residual.has_value()) {
    check_like("residual", *residual, x);
    residual = torch::stable::contiguous(*residual, memory_format);
  }
  Tensor total = residual.has_value() ? empty_spatial(x, x.size(2), x.size(3), x.scalar_type()) : x;
  Tensor result = empty_spatial(x, x.size(2), x.size(3), x.scalar_type());
  Tensor mean = torch::stable::new_empty(x, {x.size(0), num_groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {x.size(0), num_groups}, ScalarType::Float);
  normalize(
      x, residual, weight, bias, num_groups, eps, activation,
      residual.has_value() ? total.mutable_data_ptr() : nullptr, result.mutable_data_ptr(),
      static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()));
  return {total, result, mean, rstd};
}

// The result alone, in memory of the caller's, which may be that of x; with the moments of x, if they are
// known, and a shortcut added before the activation.
void group_norm_act_into(
    const Tensor& x,
    const std::optional<Tensor>& moments,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation,
    const std::optional<Tensor>& shortcut,
    Tensor result) {
  check(x, weight, bias, num_groups);
  check_same_layout("result", result, x);
  if (shortcut.has_value()) {
    check_same_layout("shortcut", *shortcut, x);
  }
  normalize(
      x, std::nullopt, weight, bias, num_groups, eps, activation, nullptr, result.mutable_data_ptr(), nullptr, nullptr,
      moments, shortcut);
}

void group_norm_act_in_place(
    Tensor x,
    const std::optional<Tensor>& moments,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation,
    const std::optional<Tensor>& shortcut) {
  group_norm_act_into(x, moments, weight, bias, num_groups, eps, activation, shortcut, x);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation) {
  auto [total, result, mean, rstd] = forward(x, std::nullopt, weight, bias, num_groups, eps, activation);
  return {result, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_act(
    const Tensor& x,
    const Tensor& residual,
    const Tensor& weight,
    const Tensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation) {
  return forward(x, residual, weight, bias, num_groups, eps, activation);
}

// Adds up what each image and piece contributes to the gradient of each channel's parameter.
Tensor total_of(const double* parts, const Division& division, const Tensor& like) {
  Tensor result = torch::stable::new_empty(like, {division.channels}, ScalarType::Float);
  float* target = static_cast<float*>(result.mutable_data_ptr());
  std::vector<double> sums(division.channels);
  for (int64_t row = 0; row < division.images * division.pieces; ++row) {
    for (int64_t c = 0; c < division.channels; ++c) {
      sums[c] += parts[row * division.channels + c];
    }
  }
  std::copy(sums.begin(), sums.end(), target);
  return like.scalar_type() == ScalarType::Float ? result : torch::stable::to(result, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& grad,
    const std::optional<Tensor>& grad_total,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    const std::string& activation) {
  check(x, weight, bias, num_groups);
  check_like("grad", grad, x);
  for (const Tensor* statistic : {&mean, &rstd}) {
    STD_TORCH_CHECK(
        statistic->scalar_type() == ScalarType::Float && statistic->is_contiguous() &&
            statistic->numel() == x.size(0) * num_groups,
        "mean and rstd must be float32, contiguous, of shape (N, num_groups)");
  }
  const auto memory_format = memory_format_of(x);
  const Tensor source = torch::stable::contiguous(x, memory_format);
  const Tensor gradient = torch::stable::contiguous(grad, memory_format);
  std::optional<Tensor> other;
  if (grad_total.has_value()) {
    check_like("grad_total", *grad_total, x);
    other = torch::stable::contiguous(*grad_total, memory_format);
  }
  Tensor grad_x = empty_spatial(source, x.size(2), x.size(3), x.scalar_type());
  Tensor grad_weight, grad_bias;
  const FloatData scale(weight), shift(bias);
  dispatch_kernel_dtype("group_norm_act", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Division division = divide(source, num_groups, sizeof(T));
    PartialStorage storage(division);
    const Backward<T> work{
        division,
        activation_named(activation),
        static_cast<const T*>(gradient.const_data_ptr()),
        data_of<T>(other),
        static_cast<const T*>(source.const_data_ptr()),
        static_cast<T*>(grad_x.mutable_data_ptr()),
        scale.data(),
        shift.data(),
        static_cast<const float*>(mean.const_data_ptr()),
        static_cast<const float*>(rstd.const_data_ptr()),
        storage.partial};
    run(work, choose(BITFAST_EACH(backward<T>)), choose(BITFAST_EACH(backward_sums<T>)),
        choose(BITFAST_EACH(backward_grad<T>)));
    grad_weight = total_of(storage.partial.second, division, weight);
    grad_bias = total_of(storage.partial.first, division, bias);
  });
  return {grad_x, grad_weight, grad_bias};
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
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("group_norm_act.native", TORCH_BOX(&group_norm_act));
  m.impl("group_norm_act_.native", TORCH_BOX(&group_norm_act_in_place));
  m.impl("group_norm_act_into.native", TORCH_BOX(&group_norm_act_into));
  m.impl("add_group_norm_act.native", TORCH_BOX(&add_group_norm_act));
  m.impl("group_norm_act_backward.native", TORCH_BOX(&group_norm_act_backward));
}

}  // namespace bitfast::group_norm_act
