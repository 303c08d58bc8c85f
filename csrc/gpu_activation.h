// The activations on a GPU, in float32, with the formulas of bitfast/reference.py. A NaN stays a NaN.
#pragma once

#include <cmath>

#include "activation_kinds.h"
#include "gpu.h"

namespace bitfast::gpu {

template <Activation activation>
BITFAST_GPU float activate(float v) {
  if constexpr (activation == Activation::relu) {
    return v < 0.0f ? 0.0f : v;
  } else if constexpr (activation == Activation::gelu) {
    return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  } else if constexpr (activation == Activation::gelu_new) {
    return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
  } else if constexpr (activation == Activation::selu) {
    return v > 0.0f ? 1.0507009873554805f * v : 1.0507009873554805f * 1.6732632423543772f * expm1f(v);
  } else {
    return v;
  }
}

// Numbers, activated and rounded to T, as sixteen bytes.
template <typename T, Activation activation>
BITFAST_GPU uint4 pack_activated(float (&numbers)[vector_size<T>]) {
  if constexpr (activation == Activation::relu && sizeof(T) == 2) {
    return make_uint4(
        pack_two_relu<T>(numbers[0], numbers[1]), pack_two_relu<T>(numbers[2], numbers[3]),
        pack_two_relu<T>(numbers[4], numbers[5]), pack_two_relu<T>(numbers[6], numbers[7]));
  } else {
#pragma unroll
    for (float& number : numbers) number = activate<activation>(number);
    return pack<T>(numbers);
  }
}

}  // namespace bitfast::gpu
