// group_statistics: what the backward pass of a norm needs, where only the moments of each channel were kept.
// bitfast/ops/norm_convolution.py says what it takes and returns.
#include "errors.h"

#include "group_statistics.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "memory_format.h"

namespace bitfast {
namespace {

std::tuple<Tensor, Tensor> group_statistics(const Tensor& moments, int64_t num_groups, double eps) {
  STD_TORCH_CHECK(
      moments.scalar_type() == ScalarType::Double && moments.is_contiguous() && moments.dim() == 3 &&
          moments.size(0) == 2,
      "moments must be float64, contiguous, of shape (2, N, C)");
  const int64_t images = moments.size(1), channels = moments.size(2);
  STD_TORCH_CHECK(
      num_groups >= 1 && channels % num_groups == 0, "num_groups must divide the ", channels,
      " channels of the moments, got ", num_groups);
  const Tensor mean = torch::stable::new_empty(moments, {images, num_groups}, ScalarType::Float);
  const Tensor rstd = torch::stable::new_empty(moments, {images, num_groups}, ScalarType::Float);
  const double* means = static_cast<const double*>(moments.const_data_ptr());
  const double* variances = means + images * channels;
  float* to_mean = static_cast<float*>(mean.mutable_data_ptr());
  float* to_rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const int64_t size = channels / num_groups;
  for (int64_t group = 0; group < images * num_groups; ++group) {
    const GroupStatistics statistics = statistics_of_group(means + group * size, variances + group * size, size, eps);
    to_mean[group] = static_cast<float>(statistics.mean);
    to_rstd[group] = statistics.rstd;
  }
  return {mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("group_statistics.native(Tensor moments, int num_groups, float eps) -> (Tensor mean, Tensor rstd)");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("group_statistics.native", TORCH_BOX(&group_statistics));
}

}  // namespace bitfast
