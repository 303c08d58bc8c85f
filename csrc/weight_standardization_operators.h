// The operators of weight_standardization on any device: arguments are checked and results allocated here,
// and filled by the kernels of weight_standardization.cpp or weight_standardization_cuda.cpp.
// bitfast/ops/weight_standardization_contract.py says what each takes and returns.
#pragma once

#include "errors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ceil_div.h"
#include "checks.h"
#include "memory_format.h"

namespace bitfast::weight_standardization {

// Where each weight begins in the buffer of several, in elements: ALIGNMENT in bitfast/ops/weight_buffer.py.
constexpr int64_t alignment = 64;

// One weight's place among several: where its values and its filters begin.
struct Place {
  int64_t values = 0, filters = 0;

  Place after(const Tensor& weight) const {
    return {values + ceil_div(weight.numel(), alignment) * alignment, filters + weight.size(0)};
  }
};

inline Place end_of(const std::vector<Tensor>& weights) {
  Place place;
  for (const Tensor& weight : weights) {
    place = place.after(weight);
  }
  return place;
}

// Whether a result has channels innermost where the weight, which is dense, has not.
inline bool is_turned(const Tensor& weight, bool channels_last) {
  return channels_last && !is_channels_last(weight) && weight.size(1) > 1 && weight.size(2) * weight.size(3) > 1;
}

inline void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.numel() > 0, "weight must have shape (out, in, height, width), none of them 0");
}

inline void check_alike(const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), "weights must hold at least one tensor");
  for (const Tensor& weight : weights) {
    check_weight(weight);
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(), "weights must be of one dtype");
  }
}

inline Tensor dense(const Tensor& weight) {
  return torch::stable::contiguous(weight, memory_format_of(weight));
}

// Kernels has a DeviceGuard, which is made from a tensor, and
//   forward(weights, eps, channels_last, result, mean, rstd) and
//   backward(grad, weights, mean, rstd, channels_last, result)
// for dense weights; result and grad hold each weight's where its Place says.

template <typename Kernels>
std::tuple<Tensor, Tensor> statistics_for(
    const std::vector<Tensor>& weights, double eps, bool channels_last, const Tensor& result) {
  const int64_t filters = end_of(weights).filters;
  Tensor mean = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(weights[0], {filters}, ScalarType::Float);
  Kernels::forward(weights, eps, channels_last, result, mean, rstd);
  return {mean, rstd};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> weight_standardization(
    const Tensor& weight, double eps, std::optional<ScalarType> dtype) {
  check_weight(weight);
  const typename Kernels::DeviceGuard guard(weight);
  const std::vector<Tensor> weights{dense(weight)};
  const Tensor result = empty_4d(
      {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, dtype.value_or(weight.scalar_type()),
      weight.device(), memory_format_of(weight));
  auto [mean, rstd] = statistics_for<Kernels>(weights, eps, false, result);
  return {result, mean, rstd};
}

template <typename Kernels>
Tensor weight_standardization_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  check_weight(weight);
  STD_TORCH_CHECK(have_same_shape(grad, weight), "grad must have the shape of weight");
  const typename Kernels::DeviceGuard guard(weight);
  const std::vector<Tensor> weights{dense(weight)};
  check_statistics(mean, rstd, weight.size(0), "with one value per filter");
  Tensor result = torch::stable::empty_like(weights[0]);
  Kernels::backward(
      torch::stable::contiguous(grad, memory_format_of(weight)), weights, mean, rstd, false, result);
  return result;
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> weight_standardization_all(
    std::vector<Tensor> weights, double eps, std::optional<ScalarType> dtype, bool channels_last) {
  check_alike(weights);
  const typename Kernels::DeviceGuard guard(weights[0]);
  std::transform(weights.begin(), weights.end(), weights.begin(), dense);
  Tensor result = torch::stable::new_empty(
      weights[0], {end_of(weights).values}, dtype.value_or(weights[0].scalar_type()));
  auto [mean, rstd] = statistics_for<Kernels>(weights, eps, channels_last, result);
  return {result, mean, rstd};
}

template <typename Kernels>
Tensor weight_standardization_all_backward(
    const Tensor& grad, std::vector<Tensor> weights, const Tensor& mean, const Tensor& rstd, bool channels_last) {
  check_alike(weights);
  const typename Kernels::DeviceGuard guard(weights[0]);
  std::transform(weights.begin(), weights.end(), weights.begin(), dense);
  const Place end = end_of(weights);
  STD_TORCH_CHECK(grad.numel() == end.values, "grad must have the size of the weights' buffer, ", end.values);
  check_statistics(mean, rstd, end.filters, "with one value per filter");
  Tensor result = torch::stable::new_empty(weights[0], {end.values}, weights[0].scalar_type());
  Kernels::backward(torch::stable::contiguous(grad), weights, mean, rstd, channels_last, result);
  return result;
}

}  // namespace bitfast::weight_standardization
