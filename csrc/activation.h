// The activations by the names that bitfast/activations.py gives them; activation_vectors.h computes them.
#pragma once

#include "activation_kinds.h"
#include "errors.h"

#include <torch/csrc/stable/c/shim.h>

#include <string>
#include <string_view>

namespace bitfast {

inline Activation activation_named(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new") return Activation::gelu_new;
  if (name == "selu") return Activation::selu;
  STD_TORCH_CHECK(false, "activation must be none, relu, gelu, gelu_new or selu, got ", name);
}

// The activation that an operator's argument names; the string, which is the operator's, is deleted. (An argument of
// type std::string would never be freed: the headers of torch 2.13 and before copy it to another string on the heap
// and forget that one, https://github.com/pytorch/pytorch/pull/190493.)
inline Activation take_activation(StringHandle argument) {
  size_t length = 0;
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &text));
  const std::string name(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
  return activation_named(name);
}

}  // namespace bitfast
