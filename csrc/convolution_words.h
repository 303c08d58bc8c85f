// The units in which convolutions on CPUs with AVX-512 compute.
#pragma once

#include <cstdint>

#include "ceil_div.h"

namespace bitfast {

// A word has 4 bytes: one float32, or two bfloat16 that are multiplied and added together. A chunk is one vector of
// words, a panel two vectors of columns.
constexpr int64_t chunk_words = 16, panel_columns = 32;

// Words per row of the packed input and per column of the packed weight: whole chunks.
inline int64_t words_of(int64_t channels, int64_t element_bytes) {
  return ceil_div(channels * element_bytes, 4 * chunk_words) * chunk_words;
}

// Winograd's 3x3 convolution takes 16 products for each square of 2x2 outputs, instead of 36.
constexpr int64_t positions = 16;

inline int64_t squares_in_row(int64_t width) {
  return ceil_div(width, 2);
}

}  // namespace bitfast
