// Division of integers that rounds up: the number of pieces that something is cut into,
// the last of which may be short.
#pragma once

#include <cstdint>

namespace bitfast {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace bitfast
