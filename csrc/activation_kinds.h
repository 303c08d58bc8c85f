// The activations, without anything of torch: kernels for GPUs know them too.
// Kernels take an activation as a template argument: dispatch_activation chooses among the instances.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define BITFAST_IN_KERNELS __device__ __forceinline__
#else
#define BITFAST_IN_KERNELS inline
#endif

namespace bitfast {

enum class Activation { none, relu, gelu, gelu_new, selu };

// Calls function with the activation as a compile-time constant.
template <typename Function>
BITFAST_IN_KERNELS void dispatch_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::none:
      return function(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return function(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return function(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_new:
      return function(std::integral_constant<Activation, Activation::gelu_new>{});
    case Activation::selu:
      return function(std::integral_constant<Activation, Activation::selu>{});
  }
}

}  // namespace bitfast
