// The activations, by the names that bitfast/activations.py gives them; activation_vectors.h computes them.
// Kernels take an activation as a template argument: dispatch_activation chooses among the instances.
#pragma once

#include <string>
#include <type_traits>

#include "activation_kinds.h"
#include "errors.h"

namespace bitfast {

inline Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new") return Activation::gelu_new;
  if (name == "selu") return Activation::selu;
  STD_TORCH_CHECK(false, "activation must be none, relu, gelu, gelu_new or selu, got ", name);
}

// Calls function with the activation as a compile-time constant.
template <typename Function>
void dispatch_activation(Activation activation, const Function& function) {
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
