// Division of numbers from 0 to 2^31 - 1 by a number that stays the same for a launch, without dividing.
// Granlund & Montgomery, "Division by Invariant Integers using Multiplication", 1994.
#pragma once

#include "gpu.h"

namespace bitfast::gpu {

struct Divisor {
  uint32_t value, multiplier;
  int shift;

  Divisor() = default;
  explicit Divisor(int divisor) : value(static_cast<uint32_t>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }

  BITFAST_GPU int quotient(int n) const {
    const auto m = static_cast<uint32_t>(n);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(m) * multiplier >> 32);
    return static_cast<int>((high + m) >> shift);
  }
  // Returns n / value, and sets n to the remainder.
  BITFAST_GPU int divide(int& n) const {
    const int q = quotient(n);
    n -= q * static_cast<int>(value);
    return q;
  }
};

}  // namespace bitfast::gpu
