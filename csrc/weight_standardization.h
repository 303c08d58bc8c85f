// What the loops of weight_standardization work on.
#pragma once

#include <cstdint>

namespace bitfast::weight_standardization {

// The filters of one weight, each of `channels` times `taps` adjacent values; which of the two is innermost
// the weight and the result (or its gradient) need not agree on. If they do not, the weight has taps
// innermost, the result channels.
struct Filters {
  int64_t count, channels, taps;
  bool transposes;

  int64_t size() const { return channels * taps; }
};

template <typename T, typename Result>
struct Forward {
  Filters filters;
  double eps;
  const T* weight;
  Result* result;
  float *mean, *rstd;
};

template <typename T, typename Grad>
struct Backward {
  Filters filters;
  const Grad* grad;
  const T* weight;
  const float *mean, *rstd;
  T* grad_weight;
};

}  // namespace bitfast::weight_standardization
