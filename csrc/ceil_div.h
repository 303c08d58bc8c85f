// Division of integers that rounds up, to count the pieces that something is cut into;
// no piece is lost where the last one is short.
#pragma once

#include <cstdint>

namespace bitfast {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace bitfast
