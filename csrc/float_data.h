// The values of a small tensor in float32, whatever its dtype and strides:
// weights and biases, which kernels read as plain arrays.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <vector>

namespace bitfast {

class FloatData {
 public:
  explicit FloatData(const torch::stable::Tensor& tensor) : tensor_(tensor) {
    using torch::headeronly::BFloat16;
    using torch::headeronly::ScalarType;
    if (!tensor_.is_contiguous()) {
      tensor_ = torch::stable::contiguous(tensor_);
    }
    if (tensor_.scalar_type() == ScalarType::Float) {
      data_ = static_cast<const float*>(tensor_.const_data_ptr());
      return;
    }
    if (tensor_.scalar_type() == ScalarType::BFloat16) {  // in place of an operator call, which costs more
      const BFloat16* values = static_cast<const BFloat16*>(tensor_.const_data_ptr());
      converted_.assign(values, values + tensor_.numel());
      data_ = converted_.data();
      return;
    }
    tensor_ = torch::stable::to(tensor_, ScalarType::Float);
    data_ = static_cast<const float*>(tensor_.const_data_ptr());
  }

  const float* data() const { return data_; }

 private:
  torch::stable::Tensor tensor_;
  std::vector<float> converted_;
  const float* data_;
};

}  // namespace bitfast
