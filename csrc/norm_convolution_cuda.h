// What prepared calls and tests hand to the entries of norm_convolution.cu and norm_convolution_statistics.cu.
// bitfast/ops/norm_convolution_cuda.py repeats the structures for ctypes.
//
// A convolution reads feature maps before their norm. It is given factors, by which it normalizes what it reads, and
// leaves partial statistics of what it writes, of which a second, small launch makes the factors of the next norm:
//
//   factors   float32 (images, 2, channels): scale and shift; the norm of x is x * scale + shift.
//   partials  float32 (images, strips, 1 + cells, 2): of a strip, some pixels of an image, first (pixels, 0), then of
//             each cell of `cell_channels` channels the mean and the sum of squared deviations from it. A strip may
//             have no pixels: all of its numbers are zero then. How an image is cut into strips is up to who writes.
//
// Feature maps are dense and channels_last, of bfloat16 or float16. Their channels are a multiple of 8, and so are all
// addresses of 16.
#pragma once

#include <cstdint>

namespace bitfast::norm_convolution {

// How a convolution is cut into tiles.
struct Tiling {
  int32_t columns;        // result channels of a tile: 64, 128 or 256
  int32_t takes_turns;    // whether each group of warps has tiles of its own, or both share each tile
  int32_t keeps_weights;  // whether a block loads its weights once, or for each tile
  int32_t cluster;        // blocks that bring weights for each other: 1 or 2
  int32_t units;          // of 64 pixels, that a group multiplies at a time: 1 or 2 of 64 columns, 2 of 128, 1 of 256
};

// Result = convolution of activation(norm(x)), with a residual added to it. Where two convolutions of the same kernel
// size and stride read the same x, one launch may do both: the second has a result, and nothing else.
struct Call {
  int32_t dtype;       // gpu::Dtype of all feature maps and weights: bfloat16 or float16
  int32_t has_norm;    // else x is convolved as it is
  int32_t activation;  // bitfast::Activation, of the norm: none or relu
  int64_t images;
  int32_t height, width, channels;  // of x
  int32_t kernel_size, stride;      // 1 or 3; 1 or 2
  int32_t top, left;                // zeros before what is convolved: none for 1x1, 0 to 2 for 3x3
  int32_t result_height, result_width, result_channels;  // as many zeros follow as that takes
  int32_t second_channels;          // of the second result, or 0
  int32_t has_residual;
  int32_t cell_channels;  // of the partials of the (first) result: 2, 4 or 8; 0 if there are to be none
  Tiling tiling;          // with 0 columns, chosen for the shape; else, to compare, this one
};

// A call, ready to be launched; and how it will be, for reports.
struct Prepared {
  Tiling tiling;
  int32_t stages;  // of the ring of x
  int32_t strips;  // of the partials, in each image
  int32_t shared_bytes;
  int64_t blocks, tiles;
  double cost;  // predicted, in cycles of a multiprocessor: what ways to cut are compared by
  int32_t dtype;
  alignas(8) unsigned char arguments[488];  // the kernel's
};

// Partials of a feature map: (images, pixels, channels).
struct PartialsCall {
  int32_t dtype;  // gpu::Dtype: bfloat16 or float16
  int32_t channels, cell_channels;
  int32_t strips;  // what bitfast_norm_convolution_strips returned for this call, in which it is not read
  int64_t images, pixels;
};

// Factors from partials, and from the parameters of a norm.
struct FactorsCall {
  int64_t images;
  int32_t strips, channels, cell_channels, groups;  // cell_channels divides channels / groups
  int32_t weight_dtype, bias_dtype;                 // gpu::Dtype
  float eps;
};

}  // namespace bitfast::norm_convolution

extern "C" {

// Decides how the call is launched on devices like the current one; null, or why it cannot be.
const char* bitfast_norm_convolution_prepare(
    const bitfast::norm_convolution::Call* call, bitfast::norm_convolution::Prepared* prepared);

// packed: (chunks, kernel_size^2, 8, result_channels, 8): of 64 input channels of each place in the filter, taken by
//   8s, of each result channel the 8 weights; zeros where the input has less than a multiple of 64 channels.
// residual: of the shape of the (first) result, and may be the same memory; null if there is none.
// factors: null without a norm. partials: null if there are to be none. second_packed, second_result: null if there is
//   none.
const char* bitfast_norm_convolution(
    const bitfast::norm_convolution::Prepared* prepared, void* stream, const void* x, const float* factors,
    const void* packed, const void* residual, void* result, float* partials, const void* second_packed,
    void* second_result);

// As many strips as suit the current device.
const char* bitfast_norm_convolution_strips(const bitfast::norm_convolution::PartialsCall* call, int32_t* strips);

const char* bitfast_norm_convolution_partials(
    const bitfast::norm_convolution::PartialsCall* call, void* stream, const void* x, float* partials);

// weight, bias: `channels` numbers each.
const char* bitfast_norm_convolution_factors(
    const bitfast::norm_convolution::FactorsCall* call, void* stream, const float* partials, const void* weight,
    const void* bias, float* factors);
}
