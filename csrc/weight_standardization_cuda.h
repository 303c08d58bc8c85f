// weight_standardization on CUDA GPUs: what callers of the kernels prepare once, for weights of the same shapes.
// bitfast/ops/weight_standardization_cuda.py has the same structures for ctypes.
#pragma once

#include <cstdint>

namespace bitfast::weight_standardization {

// What is known of a weight without its address. A filter is `channels * taps` adjacent numbers.
struct Weight {
  int64_t filters;
  int64_t channels;
  int64_t taps;   // 1 if the result has the order of the weight; else the weight has taps innermost, the result channels
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
