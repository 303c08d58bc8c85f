// What the loops of weight_standardization work on;
// shared by weight_standardization.cpp and the loops.
#pragma once

#include <cstdint>

namespace bitfast::weight_standardization {

// The filters of one weight, each of `channels` times `taps` adjacent values.
struct Filters {
  int64_t count, channels, taps;
  bool transposes;  // the weight has taps innermost, the result (or its gradient) channels

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
