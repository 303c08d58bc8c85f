// Runs what each CUDA thread of same_padding does, one after the other, on the host;
// tests/test_same_padding_threads.py calls it.
#include <torch/headeronly/util/BFloat16.h>

#include "same_padding_elements.h"

using namespace bitfast::same_padding;

namespace {

template <typename T, typename Index>
void pad(const T* x, Size size, Strides strides, int64_t top, int64_t left, T value, T* result, Layout layout,
         int64_t count) {
  for (int64_t offset = 0; offset < count; ++offset) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    result[offset] = padded_element(x, size, strides, top, left, value, at);
  }
}

template <typename T, typename Index>
void pool(const T* x, Size size, Strides strides, Window window, T value, T* result, Tap* taps, Layout layout,
          int64_t count) {
  for (int64_t offset = 0; offset < count; ++offset) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    const Maximum<T> maximum = pooled_element(x, size, strides, window, value, at);
    result[offset] = maximum.value;
    taps[offset] = maximum.tap;
  }
}

template <typename T, typename Index>
void pool_backward(const T* grad, const Tap* taps, Size pooled, Strides strides, Window window, T* result,
                   Layout layout, int64_t count) {
  for (int64_t offset = 0; offset < count; ++offset) {
    const Position at = position_of(static_cast<Index>(offset), layout);
    result[offset] = gradient_element(grad, taps, pooled, strides, window, at);
  }
}

}  // namespace

#define EXPORT(T, Index, suffix)                                                                            \
  extern "C" void pad_##suffix(const T* x, Size size, Strides strides, int64_t top, int64_t left,           \
                               float value, T* result, Layout layout, int64_t count) {                      \
    pad<T, Index>(x, size, strides, top, left, T(value), result, layout, count);                            \
  }                                                                                                         \
  extern "C" void pool_##suffix(const T* x, Size size, Strides strides, Window window, float value,         \
                                T* result, Tap* taps, Layout layout, int64_t count) {                       \
    pool<T, Index>(x, size, strides, window, T(value), result, taps, layout, count);                        \
  }                                                                                                         \
  extern "C" void pool_backward_##suffix(const T* grad, const Tap* taps, Size pooled, Strides strides,      \
                                         Window window, T* result, Layout layout, int64_t count) {          \
    pool_backward<T, Index>(grad, taps, pooled, strides, window, result, layout, count);                    \
  }

EXPORT(float, uint32_t, float32_uint32)
EXPORT(float, int64_t, float32_int64)
EXPORT(torch::headeronly::BFloat16, uint32_t, bfloat16_uint32)
EXPORT(torch::headeronly::BFloat16, int64_t, bfloat16_int64)
