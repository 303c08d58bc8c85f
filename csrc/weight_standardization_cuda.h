// weight_standardization on CUDA GPUs: what callers of the kernels prepare once, for weights of the same shapes.
// bitfast/ops/weight_standardization_cuda.py has the same structures for ctypes.
#pragma once

#include <cstdint>

namespace bitfast::weight_standardization {

// What is known of a weight without its address. A filter is `channels * taps` adjacent numbers.
struct Weight {
  int64_t filters;
  int64_t channels;
  int64_t taps;   // 1 if the result has the order of the weight; else that has taps innermost, the result channels
  int64_t start;  // where its results begin in the buffer of all, in elements: a multiple of 64
};

// Several weights of one dtype. Dtypes are the numbers of gpu::Dtype.
struct Call {
  const Weight* weights;
  int32_t count;
  int32_t weight_dtype;
  int32_t result_dtype;  // in the backward that of the gradients of the results
  float eps;
};

}  // namespace bitfast::weight_standardization

// The entries. They launch on a stream of the current device and return null, or what went wrong.

// Writes the results into one buffer, where Weight::start says, and mean and 1/std of each filter.
//
// weights: call->count addresses. results: of the result's dtype. means, rstds: one per filter, in order.
extern "C" const char* bitfast_weight_standardization_forward(
    const bitfast::weight_standardization::Call* call, void* stream, const void* const* weights, void* results,
    float* means, float* rstds);

// Writes the gradients of the weights into one buffer, where Weight::start says, in the dtype and order of the weights.
//
// gradients: call->count addresses of the gradients of the results, each in its result's dtype and order; null stands
// for zeros, and gives zeros.
extern "C" const char* bitfast_weight_standardization_backward(
    const bitfast::weight_standardization::Call* call, void* stream, const void* const* weights,
    const void* const* gradients, const float* means, const float* rstds, void* weight_gradients);
