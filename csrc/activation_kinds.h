// The activations, without anything of torch: kernels for GPUs know them too.
#pragma once

namespace bitfast {

enum class Activation { none, relu, gelu, gelu_new, selu };

}  // namespace bitfast
