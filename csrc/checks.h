// Checks of arguments that several operators share.
// Their messages begin with the check's own name and place, and end with the words in tests/native_errors.py.
#pragma once

#include <cstdint>

#include "errors.h"
#include "memory_format.h"

namespace bitfast {

inline void check_feature_maps(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (N, C, H, W), got ", x.dim(), " dimensions");
}

inline bool have_same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) {
    return false;
  }
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) {
      return false;
    }
  }
  return true;
}

inline void check_num_groups(const Tensor& x, int64_t num_groups) {
  STD_TORCH_CHECK(
      num_groups >= 1 && x.size(1) % num_groups == 0, "num_groups must divide the ", x.size(1),
      " channels of x, got ", num_groups);
}

// The means and the variances of each image's channels.
inline void check_moments(const Tensor& moments, const Tensor& x) {
  STD_TORCH_CHECK(
      moments.scalar_type() == ScalarType::Double && moments.is_contiguous() && moments.dim() == 3 &&
          moments.size(0) == 2 && moments.size(1) == x.size(0) && moments.size(2) == x.size(1),
      "moments must be float64, contiguous, of shape (2, N, C)");
}

// What a forward pass keeps for the backward pass: `count` values each, which `layout` describes.
inline void check_statistics(const Tensor& mean, const Tensor& rstd, int64_t count, const char* layout) {
  for (const Tensor* statistic : {&mean, &rstd}) {
    STD_TORCH_CHECK(
        statistic->scalar_type() == ScalarType::Float && statistic->is_contiguous() && statistic->numel() == count,
        "mean and rstd must be float32, contiguous, ", layout);
  }
}

}  // namespace bitfast
