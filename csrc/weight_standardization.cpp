// weight_standardization: the schemas, and the operators on the CPU, which divide the work and call the loops.
// bitfast/ops/weight_standardization.py says what each takes and returns.
#include "errors.h"

#include "weight_standardization.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "ceil_div.h"
#include "checks.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "weight_standardization_loops.h"
#define BITFAST_OP weight_standardization
#include "each_instruction_set.h"

namespace bitfast::weight_standardization {
namespace {

// Enough to be worth another thread, and few enough for threads to get equal shares.
constexpr int64_t elements_per_task = 16384;
// Where each weight begins in the buffer of several, in elements: ALIGNMENT in the Python file.
constexpr int64_t alignment = 64;

void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.numel() > 0, "weight must have shape (out, in, height, width), none of them 0");
}

Tensor dense(const Tensor& weight) {
  return torch::stable::contiguous(weight, memory_format_of(weight));
}

Filters filters_of(const Tensor& weight, bool channels_last) {
  const bool transposes = channels_last && !is_channels_last(weight) && weight.size(1) > 1 &&
      weight.size(2) * weight.size(3) > 1;
  return {weight.size(0), weight.size(1), weight.size(2) * weight.size(3), transposes};
}

// Some of the filters of one of several weights.
struct Task {
  size_t weight;
  int64_t first, last;
};

// Cuts the filters of all weights into tasks of about the same size.
template <typename Work>
std::vector<Task> tasks_of(const std::vector<Work>& works) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < works.size(); ++i) {
    const Filters& filters = works[i].filters;
    const int64_t step = std::max<int64_t>(1, elements_per_task / filters.size());
    for (int64_t first = 0; first < filters.count; first += step) {
      tasks.push_back({i, first, std::min(first + step, filters.count)});
    }
  }
  return tasks;
}

template <typename Work>
void for_each_task(const std::vector<Work>& works, void (*step)(const Work&, int64_t, int64_t)) {
  const std::vector<Task> tasks = tasks_of(works);
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      step(works[tasks[i].weight], tasks[i].first, tasks[i].last);
    }
  });
}

// One weight's place among several: where its values and its filters begin.
struct Place {
  int64_t values = 0, filters = 0;

  Place after(const Tensor& weight) const {
    return {values + ceil_div(weight.numel(), alignment) * alignment, filters + weight.size(0)};
  }
};

Place end_of(const std::vector<Tensor>& weights) {
  Place place;
  for (const Tensor& weight : weights) {
    place = place.after(weight);
  }
  return place;
}

void check_alike(const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), "weights must hold at least one tensor");
  for (const Tensor& weight : weights) {
    check_weight(weight);
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(), "weights must be of one dtype");
  }
}

// Calls function(T{}, U{}) with the C++ types of two dtypes.
template <typename Function>
void dispatch_two_dtypes(ScalarType first, ScalarType second, const Function& function) {
  dispatch_kernel_dtype("weight_standardization", first, [&](auto zero) {
    dispatch_kernel_dtype("weight_standardization", second, [&](auto other_zero) { function(zero, other_zero); });
  });
}

// Calls work_of(weight, its place) for each weight.
template <typename Work, typename Function>
std::vector<Work> works_for(const std::vector<Tensor>& weights, const Function& work_of) {
  std::vector<Work> works;
  Place place;
  for (const Tensor& weight : weights) {
    works.push_back(work_of(weight, place));
    place = place.after(weight);
  }
  return works;
}

// Standardizes weights into one result, each where its place says.
std::tuple<Tensor, Tensor> standardize_into(
    const std::vector<Tensor>& weights, double eps, bool channels_last, const Tensor& result) {
  const int64_t filters = end_of(weights).filters;
  Tensor mean = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  dispatch_two_dtypes(weights[0].scalar_type(), result.scalar_type(), [&](auto zero, auto result_zero) {
    using T = decltype(zero);
    using Result = decltype(result_zero);
    using Work = Forward<T, Result>;
    const auto works = works_for<Work>(weights, [&](const Tensor& weight, const Place& place) {
      Work work{};
      work.filters = filters_of(weight, channels_last);
      work.eps = eps;
      work.weight = static_cast<const T*>(weight.const_data_ptr());
      work.result = static_cast<Result*>(result.mutable_data_ptr()) + place.values;
      work.mean = static_cast<float*>(mean.mutable_data_ptr()) + place.filters;
      work.rstd = static_cast<float*>(rstd.mutable_data_ptr()) + place.filters;
      return work;
    });
    for_each_task(works, choose(BITFAST_EACH(standardize<T, Result>)));
  });
  return {mean, rstd};
}

// Writes the gradients of weights into one result; `grad` and it hold each weight where its place says.
void backward_into(
    const Tensor& grad, const std::vector<Tensor>& weights, const Tensor& mean, const Tensor& rstd, bool channels_last,
    const Tensor& result) {
  check_statistics(mean, rstd, end_of(weights).filters, "with one value per filter");
  dispatch_two_dtypes(weights[0].scalar_type(), grad.scalar_type(), [&](auto zero, auto grad_zero) {
    using T = decltype(zero);
    using Grad = decltype(grad_zero);
    using Work = Backward<T, Grad>;
    const auto works = works_for<Work>(weights, [&](const Tensor& weight, const Place& place) {
      Work work{};
      work.filters = filters_of(weight, channels_last);
      work.grad = static_cast<const Grad*>(grad.const_data_ptr()) + place.values;
      work.weight = static_cast<const T*>(weight.const_data_ptr());
      work.mean = static_cast<const float*>(mean.const_data_ptr()) + place.filters;
      work.rstd = static_cast<const float*>(rstd.const_data_ptr()) + place.filters;
      work.grad_weight = static_cast<T*>(result.mutable_data_ptr()) + place.values;
      return work;
    });
    for_each_task(works, choose(BITFAST_EACH(standardize_backward<T, Grad>)));
  });
}

std::tuple<Tensor, Tensor, Tensor> weight_standardization(
    const Tensor& weight, double eps, std::optional<ScalarType> dtype) {
  check_weight(weight);
  const std::vector<Tensor> weights{dense(weight)};
  const Tensor result = empty_4d(
      {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, dtype.value_or(weight.scalar_type()),
      weight.device(), memory_format_of(weight));
  auto [mean, rstd] = standardize_into(weights, eps, false, result);
  return {result, mean, rstd};
}

Tensor weight_standardization_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  check_weight(weight);
  STD_TORCH_CHECK(have_same_shape(grad, weight), "grad must have the shape of weight");
  const std::vector<Tensor> weights{dense(weight)};
  Tensor result = torch::stable::empty_like(weights[0]);
  backward_into(torch::stable::contiguous(grad, memory_format_of(weight)), weights, mean, rstd, false, result);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> weight_standardization_all(
    std::vector<Tensor> weights, double eps, std::optional<ScalarType> dtype, bool channels_last) {
  check_alike(weights);
  std::transform(weights.begin(), weights.end(), weights.begin(), dense);
  Tensor result = torch::stable::new_empty(
      weights[0], {end_of(weights).values}, dtype.value_or(weights[0].scalar_type()));
  auto [mean, rstd] = standardize_into(weights, eps, channels_last, result);
  return {result, mean, rstd};
}

Tensor weight_standardization_all_backward(
    const Tensor& grad, std::vector<Tensor> weights, const Tensor& mean, const Tensor& rstd, bool channels_last) {
  check_alike(weights);
  std::transform(weights.begin(), weights.end(), weights.begin(), dense);
  const int64_t values = end_of(weights).values;
  STD_TORCH_CHECK(grad.numel() == values, "grad must have the size of the weights' buffer, ", values);
  Tensor result = torch::stable::new_empty(weights[0], {values}, weights[0].scalar_type());
  backward_into(torch::stable::contiguous(grad), weights, mean, rstd, channels_last, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("weight_standardization.native(Tensor weight, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)");
  m.def("weight_standardization_backward.native(Tensor grad, Tensor weight, Tensor mean, Tensor rstd) -> Tensor");
  m.def(
      "weight_standardization_all.native(Tensor[] weights, float eps, ScalarType? dtype, bool channels_last) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "weight_standardization_all_backward.native(Tensor grad, Tensor[] weights, Tensor mean, Tensor rstd, "
      "bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("weight_standardization.native", TORCH_BOX(&weight_standardization));
  m.impl("weight_standardization_backward.native", TORCH_BOX(&weight_standardization_backward));
  m.impl("weight_standardization_all.native", TORCH_BOX(&weight_standardization_all));
  m.impl("weight_standardization_all_backward.native", TORCH_BOX(&weight_standardization_all_backward));
}

}  // namespace bitfast::weight_standardization
