// The statistics of a group of channels, joined from the moments of each channel.
#pragma once

#include <cmath>
#include <cstdint>

namespace bitfast {

struct GroupStatistics {
  double mean;
  float rstd;
};

// Of `channels` channels of one image, of as many pixels each, from their means and variances.
inline GroupStatistics statistics_of_group(
    const double* means, const double* variances, int64_t channels, double eps) {
  double mean = 0, variance = 0;
  for (int64_t c = 0; c < channels; ++c) {
    mean += means[c];
  }
  mean /= channels;
  for (int64_t c = 0; c < channels; ++c) {
    variance += variances[c] + (means[c] - mean) * (means[c] - mean);
  }
  return {mean, static_cast<float>(1.0 / std::sqrt(variance / channels + eps))};
}

}  // namespace bitfast
