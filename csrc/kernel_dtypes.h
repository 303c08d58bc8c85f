// The dtypes that the CPU kernels of norms, convolutions and weights are written for:
// NATIVE_CPU_DTYPES in bitfast/ops/common.py.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include "errors.h"

namespace bitfast {

using torch::headeronly::BFloat16;

// Calls function(T{}) with the C++ type of a dtype.
template <typename Function>
void dispatch_kernel_dtype(const char* op, torch::headeronly::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return function(float{});
    case torch::headeronly::ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the native CPU kernels support float32 and bfloat16");
  }
}

}  // namespace bitfast
