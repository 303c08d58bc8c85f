// weight_standardization: the operators on CUDA tensors, which call the kernels of weight_standardization.cu.
#include "errors.h"

#include "weight_standardization_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda_tensors.h"
#include "weight_standardization_operators.h"

namespace bitfast::weight_standardization {
namespace {

void check_device(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.device() == weight.device(), "all tensors must be on the device of the first weight");
}

std::vector<Weight> described(const std::vector<Tensor>& weights, bool channels_last) {
  std::vector<Weight> result;
  Place place;
  for (const Tensor& weight : weights) {
    check_device(weight, weights[0]);
    const int64_t taps = is_turned(weight, channels_last) ? weight.size(2) * weight.size(3) : 1;
    result.push_back({weight.size(0), weight.numel() / weight.size(0) / taps, taps, place.values});
    place = place.after(weight);
  }
  return result;
}

std::vector<const void*> addresses_of(const std::vector<Tensor>& weights) {
  std::vector<const void*> addresses;
  for (const Tensor& weight : weights) {
    addresses.push_back(weight.const_data_ptr());
  }
  return addresses;
}

Call call_of(const std::vector<Weight>& weights, const Tensor& weight, const Tensor& result, double eps) {
  return {
      weights.data(), static_cast<int32_t>(weights.size()), number_of(weight.scalar_type()),
      number_of(result.scalar_type()), static_cast<float>(eps)};
}

struct CudaKernels {
  struct DeviceGuard {
    explicit DeviceGuard(const Tensor& x) : guard(x.get_device_index()) {}
    const torch::stable::accelerator::DeviceGuard guard;
  };

  static void forward(
      const std::vector<Tensor>& weights, double eps, bool channels_last, const Tensor& result, const Tensor& mean,
      const Tensor& rstd) {
    const std::vector<Weight> shapes = described(weights, channels_last);
    const Call call = call_of(shapes, weights[0], result, eps);
    check_launch(bitfast_weight_standardization_forward(
        &call, current_stream(weights[0]), addresses_of(weights).data(), result.mutable_data_ptr(),
        static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr())));
  }

  static void backward(
      const Tensor& grad, const std::vector<Tensor>& weights, const Tensor& mean, const Tensor& rstd,
      bool channels_last, const Tensor& result) {
    for (const Tensor* x : {&grad, &mean, &rstd}) {
      check_device(*x, weights[0]);
    }
    const std::vector<Weight> shapes = described(weights, channels_last);
    const Call call = call_of(shapes, weights[0], grad, 0.0);
    std::vector<const void*> gradients;
    for (const Weight& weight : shapes) {
      gradients.push_back(
          static_cast<const char*>(grad.const_data_ptr()) + weight.start * static_cast<int64_t>(grad.element_size()));
    }
    check_launch(bitfast_weight_standardization_backward(
        &call, current_stream(weights[0]), addresses_of(weights).data(), gradients.data(),
        static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
        result.mutable_data_ptr()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitfast, CUDA, m) {
  m.impl("weight_standardization.native", TORCH_BOX(&weight_standardization<CudaKernels>));
  m.impl("weight_standardization_backward.native", TORCH_BOX(&weight_standardization_backward<CudaKernels>));
  m.impl("weight_standardization_all.native", TORCH_BOX(&weight_standardization_all<CudaKernels>));
  m.impl("weight_standardization_all_backward.native", TORCH_BOX(&weight_standardization_all_backward<CudaKernels>));
}

}  // namespace bitfast::weight_standardization
