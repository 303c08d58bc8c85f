// The tables of Pillow's filters, computed by the same operations in the same order as in src/libImaging/Resample.c
// and Geometry.c of https://python-pillow.org, so that all roundings are the same.
#include "resampling_weights.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ceil_div.h"
#include "no_fp_contraction.h"

namespace bitfast::resize_normalize {
namespace {

// Weights are padded to a multiple of this, so that loops may take several at once.
constexpr int64_t padding = 4;
constexpr double pi = 3.14159265358979323846;

double sinc(double x) {
  if (x == 0.0) {
    return 1.0;
  }
  x = x * pi;
  return std::sin(x) / x;
}

double lanczos(double x) {
  return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
}

double bilinear(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  }
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

double box(double x) {
  return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
}

double hamming(double x) {
  x = std::abs(x);
  if (x == 0.0) {
    return 1.0;
  }
  if (x >= 1.0) {
    return 0.0;
  }
  x = x * pi;
  return std::sin(x) / x * (0.54f + 0.46f * std::cos(x));  // Pillow's constants: single precision, and not 1 in sum
}

using Kernel = double (*)(double);

// A filter's kernel, and how far from its center it reaches.
std::pair<Kernel, double> kernel_of(Filter filter) {
  switch (filter) {
    case Filter::lanczos:
      return {lanczos, 3.0};
    case Filter::bilinear:
      return {bilinear, 1.0};
    case Filter::bicubic:
      return {bicubic, 2.0};
    case Filter::box:
      return {box, 0.5};
    default:
      return {hamming, 1.0};
  }
}

void quantize(double weight, double& result) {
  result = weight;
}

// Halves are rounded away from zero.
void quantize(double weight, int32_t& result) {
  const double scaled = weight * (1 << precision_bits);
  result = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

template <typename Weight>
void fill_copies(const Line& line, Axis<Weight>& axis) {
  axis.copies = true;
  quantize(1.0, axis.weights.emplace_back());
  axis.weights.resize(axis.count, axis.weights[0]);
  if (line.in_size == line.out_size) {
    for (int64_t i = 0; i < axis.count; ++i) {
      axis.starts[i] = static_cast<int32_t>(line.first + i);
    }
    return;
  }
  // Repeated addition, and not a product, since Pillow's positions round so.
  const double scale = static_cast<double>(line.in_size) / line.out_size;
  double position = scale * 0.5;
  for (int64_t i = 0; i < line.first + axis.count; ++i, position += scale) {
    if (i >= line.first) {
      axis.starts[i - line.first] = static_cast<int32_t>(std::min(static_cast<int64_t>(position), line.in_size - 1));
    }
  }
}

template <typename Weight>
void fill_sums(const Line& line, Filter filter, Axis<Weight>& axis) {
  const auto [kernel, reach] = kernel_of(filter);
  const double scale = static_cast<double>(line.in_size) / line.out_size;
  const double filter_scale = std::max(scale, 1.0);
  const double support = reach * filter_scale;
  const double per_input = 1.0 / filter_scale;
  const auto inputs = [&](int64_t i) {
    const double center = (line.first + i + 0.5) * scale;
    const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t end = std::min(static_cast<int64_t>(center + support + 0.5), line.in_size);
    return std::make_pair(begin, end);
  };
  for (int64_t i = 0; i < axis.count; ++i) {
    const auto [begin, end] = inputs(i);
    axis.taps = std::max(axis.taps, end - begin);
  }
  axis.stride = ceil_div(axis.taps, padding) * padding;
  axis.weights.resize(axis.count * axis.stride);
  std::vector<double> weights(axis.taps);
  for (int64_t i = 0; i < axis.count; ++i) {
    const auto [begin, end] = inputs(i);
    const double center = (line.first + i + 0.5) * scale;
    double total = 0;
    for (int64_t t = 0; t < end - begin; ++t) {
      weights[t] = kernel((t + begin - center + 0.5) * per_input);
      total += weights[t];
    }
    // Near the end of the line there are fewer taps; those in front get no weight, so that all exist.
    const int64_t start = std::min(begin, line.in_size - axis.taps);
    axis.starts[i] = static_cast<int32_t>(start);
    for (int64_t t = 0; t < end - begin; ++t) {
      quantize(total != 0.0 ? weights[t] / total : weights[t], axis.weights[i * axis.stride + begin - start + t]);
    }
  }
}

}  // namespace

template <typename Weight>
Axis<Weight> make_axis(const Line& line, Filter filter) {
  Axis<Weight> axis;
  axis.count = line.count;
  axis.starts.resize(line.count);
  if (line.in_size == line.out_size || filter == Filter::nearest) {
    fill_copies(line, axis);
  } else {
    fill_sums(line, filter, axis);
  }
  return axis;
}

template Axis<int32_t> make_axis(const Line&, Filter);
template Axis<double> make_axis(const Line&, Filter);

}  // namespace bitfast::resize_normalize
