// Layouts: the C++ side of bitfast/memory_format.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

namespace bitfast {

using torch::stable::Tensor;
using torch::headeronly::MemoryFormat;

// Whether a 4-D tensor is dense with channels innermost. One that is dense both ways (one channel, or
// 1x1 spatially) counts as contiguous. The stable ABI's is_contiguous() knows no memory format.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) {
    return false;
  }
  int64_t expected = 1;
  for (const int64_t dim : std::array<int64_t, 4>{1, 3, 2, 0}) {
    if (x.size(dim) != 1) {
      if (x.stride(dim) != expected) {
        return false;
      }
      expected *= x.size(dim);
    }
  }
  return true;
}

inline MemoryFormat memory_format_of(const Tensor& x) {
  return is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// An uninitialised (N, C, height, width) tensor with the device and layout of the 4-D tensor `like`.
inline Tensor empty_spatial(
    const Tensor& like,
    int64_t height,
    int64_t width,
    torch::headeronly::ScalarType dtype) {
  const std::array<int64_t, 4> size{like.size(0), like.size(1), height, width};
  return torch::stable::empty(
      {size.data(), size.size()},
      dtype,
      std::nullopt,
      like.device(),
      std::nullopt,
      memory_format_of(like));
}

}  // namespace bitfast
