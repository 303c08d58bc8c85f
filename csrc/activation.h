// The activations by the names that bitfast/activations.py gives them; activation_vectors.h computes them.
#pragma once

#include <string>

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

}  // namespace bitfast
