// What operators on CUDA tensors need to call the entries of csrc/*.cu.
#pragma once

#include "errors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "memory_format.h"

namespace bitfast {

// The number of gpu::Dtype.
inline int32_t number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "the native CUDA kernels support float32, bfloat16 and float16");
  }
}

inline int32_t number_of(const Tensor& x) { return number_of(x.scalar_type()); }

inline bool is_aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// The same numbers, dense with channels innermost, at an address that kernels can read vectors from.
inline Tensor readable(const Tensor& map) {
  const Tensor dense = torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
  return is_aligned(dense) ? dense : torch::stable::clone(dense);
}

// A parameter as the kernels read it: dense, and in float32 if they do not know its dtype.
inline Tensor readable_parameter(const Tensor& parameter) {
  const bool is_double = parameter.scalar_type() == ScalarType::Double;
  return torch::stable::contiguous(is_double ? torch::stable::to(parameter, ScalarType::Float) : parameter);
}

// A new tensor with channels innermost, for a result that will have the shape and the format of x.
inline Tensor empty_channels_last(const Tensor& x) {
  // With one channel or one pixel both formats are the same memory, and the result has the strides of x.
  const bool are_formats_alike = x.size(1) == 1 || x.size(2) * x.size(3) == 1;
  const MemoryFormat format = are_formats_alike ? memory_format_of(x) : MemoryFormat::ChannelsLast;
  return empty_4d({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x.device(), format);
}

// Fails if an entry has said what went wrong.
inline void check_launch(const char* problem) { STD_TORCH_CHECK(problem == nullptr, "launch failed: ", problem); }

inline void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

}  // namespace bitfast
