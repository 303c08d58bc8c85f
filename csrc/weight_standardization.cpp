// weight_standardization: the schemas, and the kernels on the CPU, which divide the work and call the loops.
#include "errors.h"

#include "weight_standardization.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "weight_standardization_operators.h"

#define BITFAST_LOOPS "weight_standardization_loops.h"
#define BITFAST_OP weight_standardization
#include "each_instruction_set.h"

namespace bitfast::weight_standardization {
namespace {

// Enough to be worth another thread, and few enough for threads to get equal shares.
constexpr int64_t elements_per_task = 16384;

Filters filters_of(const Tensor& weight, bool channels_last) {
  return {weight.size(0), weight.size(1), weight.size(2) * weight.size(3), is_turned(weight, channels_last)};
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

struct CpuKernels {
  struct DeviceGuard {
    explicit DeviceGuard(const Tensor&) {}
  };

  static void forward(
      const std::vector<Tensor>& weights, double eps, bool channels_last, const Tensor& result, const Tensor& mean,
      const Tensor& rstd) {
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
  }

  static void backward(
      const Tensor& grad, const std::vector<Tensor>& weights, const Tensor& mean, const Tensor& rstd,
      bool channels_last, const Tensor& result) {
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
};

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
  m.impl("weight_standardization.native", TORCH_BOX(&weight_standardization<CpuKernels>));
  m.impl("weight_standardization_backward.native", TORCH_BOX(&weight_standardization_backward<CpuKernels>));
  m.impl("weight_standardization_all.native", TORCH_BOX(&weight_standardization_all<CpuKernels>));
  m.impl("weight_standardization_all_backward.native", TORCH_BOX(&weight_standardization_all_backward<CpuKernels>));
}

}  // namespace bitfast::weight_standardization
