// weight_standardization: the schemas, and the CPU kernels. bitfast/ops/weight_standardization.py says what
// each takes and returns.
#include "errors.h"

#include "weight_standardization.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "weight_standardization_loops.h"
#define BITFAST_OP weight_standardization
#include "each_instruction_set.h"

namespace bitfast::weight_standardization {
namespace {

using torch::headeronly::ScalarType;

// Enough for a thread to start on, and small enough for equal shares.
constexpr int64_t elements_per_task = 16384;
// Where each weight begins in the buffer of several, in elements: ALIGNMENT in the Python file.
constexpr int64_t alignment = 64;

void check(const Tensor& weight) {
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
void run(const std::vector<Work>& works, void (*step)(const Work&, int64_t, int64_t)) {
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
    return {values + (weight.numel() + alignment - 1) / alignment * alignment, filters + weight.size(0)};
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
    check(weight);
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(), "weights must be of one dtype");
  }
}

// Standardizes weights into one result, each where its place says.
std::tuple<Tensor, Tensor> standardize_into(
    const std::vector<Tensor>& weights, double eps, bool channels_last, Tensor& result) {
  const int64_t filters = end_of(weights).filters;
  Tensor mean = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  dispatch_kernel_dtype("weight_standardization", weights[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dispatch_kernel_dtype("weight_standardization", result.scalar_type(), [&](auto result_zero) {
      using Result = decltype(result_zero);
      std::vector<Forward<T, Result>> works;
      Place place;
      for (const Tensor& weight : weights) {
        works.push_back(
            {filters_of(weight, channels_last), eps, static_cast<const T*>(weight.const_data_ptr()),
             static_cast<Result*>(result.mutable_data_ptr()) + place.values,
             static_cast<float*>(mean.mutable_data_ptr()) + place.filters,
             static_cast<float*>(rstd.mutable_data_ptr()) + place.filters});
        place = place.after(weight);
      }
      run(works, choose(BITFAST_EACH(standardize<T, Result>)));
    });
  });
  return {mean, rstd};
}

// Writes the gradients of weights into one result; `grad` and it hold each weight where its place says.
void backward_into(
    const Tensor& grad,
    const std::vector<Tensor>& weights,
    const Tensor& mean,
    const Tensor& rstd,
    bool channels_last,
    Tensor& result) {
  const int64_t filters = end_of(weights).filters;
  for (const Tensor* statistic : {&mean, &rstd}) {
    STD_TORCH_CHECK(
        statistic->scalar_type() == ScalarType::Float && statistic->is_contiguous() && statistic->numel() == filters,
        "mean and rstd must be float32, contiguous, with one value per filter");
  }
  dispatch_kernel_dtype("weight_standardization", weights[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dispatch_kernel_dtype("weight_standardization", grad.scalar_type(), [&](auto grad_zero) {
      using Grad = decltype(grad_zero);
      std::vector<Backward<T, Grad>> works;
      Place place;
      for (const Tensor& weight : weights) {
        works.push_back(
            {filters_of(weight, channels_last), static_cast<const Grad*>(grad.const_data_ptr()) + place.values,
             static_cast<const T*>(weight.const_data_ptr()),
             static_cast<const float*>(mean.const_data_ptr()) + place.filters,
             static_cast<const float*>(rstd.const_data_ptr()) + place.filters,
             static_cast<T*>(result.mutable_data_ptr()) + place.values});
        place = place.after(weight);
      }
      run(works, choose(BITFAST_EACH(standardize_backward<T, Grad>)));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> weight_standardization(
    const Tensor& weight, double eps, std::optional<ScalarType> dtype) {
  check(weight);
  const std::vector<Tensor> weights{dense(weight)};
  const std::array<int64_t, 4> size{weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  Tensor result = torch::stable::empty(
      {size.data(), size.size()}, dtype.value_or(weight.scalar_type()), std::nullopt, weight.device(), std::nullopt,
      memory_format_of(weight));
  auto [mean, rstd] = standardize_into(weights, eps, false, result);
  return {result, mean, rstd};
}

Tensor weight_standardization_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  check(weight);
  STD_TORCH_CHECK(grad.dim() == 4, "grad must have the shape of weight");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(grad.size(dim) == weight.size(dim), "grad must have the shape of weight");
  }
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
