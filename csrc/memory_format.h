// Memory formats of 4-D tensors, contiguous or channels_last, which the stable ABI does not tell apart:
// the C++ side of bitfast/memory_format.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>

namespace bitfast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a 4-D tensor is dense with channels innermost. One that is dense both ways (one channel, or
// 1x1 spatially) counts as contiguous.
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

// An uninitialised 4-D tensor.
inline Tensor empty_4d(
    const std::array<int64_t, 4>& size, ScalarType dtype, const torch::stable::Device& device, MemoryFormat format) {
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, device, std::nullopt, format);
}

// An uninitialised (N, C, height, width) tensor with the device and layout of the 4-D tensor `like`.
inline Tensor empty_spatial(const Tensor& like, int64_t height, int64_t width, ScalarType dtype) {
  return empty_4d({like.size(0), like.size(1), height, width}, dtype, like.device(), memory_format_of(like));
}

}  // namespace bitfast
