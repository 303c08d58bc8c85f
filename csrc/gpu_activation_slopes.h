// The derivatives of the activations, in kernels.
#pragma once

#include <cmath>

#include "activation_kinds.h"
#include "gpu.h"

namespace bitfast::gpu {

BITFAST_GPU float gelu_slope(float z) {
  const float probability = 0.5f * erfcf(-0.707106781f * z);
  return probability + z * 0.398942280f * expf(-0.5f * z * z);
}

BITFAST_GPU float gelu_new_slope(float z) {
  if (z > 20.0f) return 1.0f;  // and no infinity times zero
  if (z < -20.0f) return 0.0f;
  constexpr float factor = 0.797884561f, cubic = 0.044715f;
  const float t = tanhf(factor * (z + cubic * z * z * z));
  return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * factor * (1.0f + 3.0f * cubic * z * z);
}

BITFAST_GPU float selu_slope(float z) {
  constexpr float scale = 1.0507009873554805f, alpha = 1.6732632423543772f;
  return z > 0.0f ? scale : scale * alpha * expf(z);  // NaN where z is NaN
}

// Turns gradients of results into gradients of what was activated, z. The gradient passes a ReLU where z is NaN.
template <int count>
BITFAST_GPU void times_slope(float (&gradients)[count], const float (&z)[count], Activation activation) {
#define BITFAST_FOR_EACH(expression) \
  for (int i = 0; i < count; ++i) gradients[i] = (expression);
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
#pragma unroll
      BITFAST_FOR_EACH(z[i] <= 0.0f ? 0.0f : gradients[i])
      return;
    case Activation::gelu:
#pragma unroll
      BITFAST_FOR_EACH(gradients[i] * gelu_slope(z[i]))
      return;
    case Activation::gelu_new:
#pragma unroll
      BITFAST_FOR_EACH(gradients[i] * gelu_new_slope(z[i]))
      return;
    case Activation::selu:
#pragma unroll
      BITFAST_FOR_EACH(gradients[i] * selu_slope(z[i]))
      return;
  }
#undef BITFAST_FOR_EACH
}

}  // namespace bitfast::gpu
