// What the loops that pack filters for norm_convolution work on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ceil_div.h"
#include "convolution_words.h"

namespace bitfast::convolution_filters {

// Filters of a dtype to be packed, dense, with input channels innermost.
template <typename T>
struct Filters {
  const T* source;
  int64_t out, in;  // channels
  bool turned;      // for the gradient of the convolution's input
  float* target;

  int64_t columns() const { return turned ? in : out; }
  int64_t panels() const { return ceil_div(columns(), panel_columns); }
  int64_t words() const { return words_of(turned ? out : in, sizeof(T)); }
  int64_t panel_words() const { return words() * panel_columns; }
};

}  // namespace bitfast::convolution_filters
