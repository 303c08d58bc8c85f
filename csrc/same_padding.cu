// same_padding on CUDA GPUs: which kernel a call gets.
#include "same_padding_elements.h"
#include "same_padding_strips.h"

#include <initializer_list>

namespace bitfast::same_padding {
namespace {

bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// How many numbers a thread of the strips takes at once.
int64_t vector_of(const SamePaddingCall& call) { return 16 / bytes_of(static_cast<Dtype>(call.dtype)); }

// The strips of maps of `rows` rows of `across` vectors. The taller they are, the less is read twice, but a small batch
// needs short ones to keep all multiprocessors at work.
const char* make_strips(int64_t images, int64_t rows, int64_t across, int tallest, Strips& strips) {
  gpu::Device device;
  if (const char* error = gpu::current_device(device)) return error;
  int tall = tallest;
  const int64_t enough = 2 * threads_per_block * static_cast<int64_t>(device.multiprocessors);
  while (tall > 1 && images * ceil_div(rows, tall) * across < enough) tall /= 2;
  const int64_t per_image = ceil_div(rows, tall);
  strips = {
      static_cast<uint32_t>(images * per_image * across), static_cast<uint32_t>(across),
      static_cast<uint32_t>(per_image), tall};
  return nullptr;
}

gpu::LaunchShape shape_of(const Strips& strips) {
  return {ceil_div(static_cast<int64_t>(strips.threads), threads_per_block)};
}

// Whether strips can serve: the pixels of all maps are whole vectors, side by side in memory, and 32 bits hold the
// number of each thread, and places within a row.
bool has_vectors(const SamePaddingCall& call, std::initializer_list<const void*> maps) {
  constexpr int64_t most = INT32_MAX / 2;
  for (const void* map : maps) {
    if (!is_aligned(map, 16)) return false;
  }
  const int64_t vectors = call.channels / vector_of(call);
  const int64_t height = call.height > call.result_height ? call.height : call.result_height;
  const int64_t width = call.width > call.result_width ? call.width : call.result_width;
  return call.channels_last && call.channels % vector_of(call) == 0 && height <= most / 4 &&
         call.top <= most / 4 && (width + 1) * call.channels <= most && call.left <= most / call.channels &&
         call.images <= most && call.images * (height + 1) <= most / ((width + 1) * vectors + 1);
}

bool is_3x3_with_stride_2(const SamePaddingCall& call) {
  return call.kernel_height == 3 && call.kernel_width == 3 && call.stride_height == 2 && call.stride_width == 2 &&
         call.dilation_height == 1 && call.dilation_width == 1;
}

bool has_pool_strips(const SamePaddingCall& call, std::initializer_list<const void*> maps, const void* taps) {
  return is_3x3_with_stride_2(call) && has_vectors(call, maps) && is_aligned(taps, vector_of(call));
}

int narrow(int64_t n) { return static_cast<int>(n); }

// ---- launches -------------------------------------------------------------------------------------------------------

const char* pad_strips(const SamePaddingCall& call, void* stream, const void* x, void* result) {
  const int64_t vectors = call.channels / vector_of(call);
  PadStrips::Arguments arguments = {
      {}, static_cast<const uint4*>(x), static_cast<uint4*>(result), narrow(call.height),
      narrow(call.width * vectors), narrow(call.result_height), narrow(call.result_width * vectors), narrow(call.top),
      narrow(call.left * vectors), call.value, static_cast<Dtype>(call.dtype)};
  arguments.strips.rows_per_strip = PadStrips::rows_at_once;
  const int64_t per_image = ceil_div(call.result_height, PadStrips::rows_at_once);
  arguments.strips.across = static_cast<uint32_t>(arguments.across);
  arguments.strips.per_image = static_cast<uint32_t>(per_image);
  arguments.strips.threads = static_cast<uint32_t>(call.images * per_image * arguments.across);
  return gpu::launch<PadStrips>(shape_of(arguments.strips), arguments, stream);
}

template <typename T, bool with_taps>
const char* pool_strips(const SamePaddingCall& call, void* stream, const void* x, void* result, void* taps) {
  constexpr int tallest = 4;  // the fastest that was measured on an H100
  typename PoolStrips<T, with_taps>::Arguments arguments = {
      {}, static_cast<const T*>(x), static_cast<T*>(result), static_cast<uint8_t*>(taps), narrow(call.channels),
      narrow(call.height), narrow(call.width), narrow(call.result_height), narrow(call.result_width), narrow(call.top),
      narrow(call.left), call.value};
  const int64_t across = call.result_width * (call.channels / gpu::vector_size<T>);
  if (const char* error = make_strips(call.images, call.result_height, across, tallest, arguments.strips)) return error;
  return gpu::launch<PoolStrips<T, with_taps>>(shape_of(arguments.strips), arguments, stream);
}

// The lowest q of the pairs 2q + 1 and 2q + 2 of rows or columns of which `before` are padding.
int64_t first_pair(int64_t before) { return before == 0 ? -1 : (before - 1) / 2; }

// How many pairs hold the `size` rows or columns that follow.
int64_t count_pairs(int64_t before, int64_t size) { return first_pair(before + size - 1) - first_pair(before) + 1; }

template <typename T>
const char* gather_strips(
    const SamePaddingCall& call, void* stream, const void* grad, const void* taps, void* result) {
  constexpr int tallest = 4;
  typename GatherStrips<T>::Arguments arguments = {
      {}, static_cast<const T*>(grad), static_cast<const uint8_t*>(taps), static_cast<T*>(result),
      narrow(call.channels), narrow(call.height), narrow(call.width), narrow(call.result_height),
      narrow(call.result_width), narrow(call.top), narrow(call.left), narrow(first_pair(call.top)),
      narrow(first_pair(call.left))};
  const int64_t rows = count_pairs(call.top, call.height);
  const int64_t across = count_pairs(call.left, call.width) * (call.channels / gpu::vector_size<T>);
  if (const char* error = make_strips(call.images, rows, across, tallest, arguments.strips)) return error;
  return gpu::launch<GatherStrips<T>>(shape_of(arguments.strips), arguments, stream);
}

}  // namespace
}  // namespace bitfast::same_padding

using namespace bitfast::same_padding;
using bitfast::gpu::dispatch;

BITFAST_ENTRY const char* bitfast_same_pad(const SamePaddingCall* call, void* stream, const void* x, void* result) {
  if (call->images * call->channels * call->result_height * call->result_width == 0) return nullptr;
  if (has_vectors(*call, {x, result})) return pad_strips(*call, stream, x, result);
  const auto dtype = static_cast<Dtype>(call->dtype);
  auto launch = [&](auto bits) {
    using Bits = decltype(bits);
    return launch_elements<PadElements, Bits>(
        *call, false, stream, static_cast<const Bits*>(x), static_cast<Bits*>(result), call->value, dtype);
  };
  return dtype == Dtype::float32 ? launch(uint32_t{}) : launch(uint16_t{});
}

BITFAST_ENTRY const char* bitfast_same_max_pool(
    const SamePaddingCall* call, void* stream, const void* x, void* result, void* taps) {
  if (call->images * call->channels == 0) return nullptr;
  const bool has_strips = has_pool_strips(*call, {x, result}, taps);
  return dispatch(static_cast<Dtype>(call->dtype), [&](auto zero) {
    using T = decltype(zero);
    if (has_strips && taps == nullptr) return pool_strips<T, false>(*call, stream, x, result, taps);
    if (has_strips) return pool_strips<T, true>(*call, stream, x, result, taps);
    return launch_elements<PoolElements, T>(
        *call, false, stream, static_cast<const T*>(x), static_cast<T*>(result), taps, call->value);
  });
}

BITFAST_ENTRY const char* bitfast_same_max_pool_backward(
    const SamePaddingCall* call, void* stream, const void* grad, const void* taps, void* result) {
  if (call->images * call->channels == 0) return nullptr;
  const bool has_strips = has_pool_strips(*call, {grad, result}, taps);
  return dispatch(static_cast<Dtype>(call->dtype), [&](auto zero) {
    using T = decltype(zero);
    if (has_strips) return gather_strips<T>(*call, stream, grad, taps, result);
    return launch_elements<GatherElements, T>(
        *call, true, stream, static_cast<const T*>(grad), taps, static_cast<T*>(result));
  });
}
