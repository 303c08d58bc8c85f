// stem: images on their way from global to shared memory.
//
// Shared memory holds rows of pixels of four channels, the last of them zero. Two pixels, a pair, are 16 bytes: what a
// row of a matrix is to the tensor cores. Output column c of a tile reads the eight pixels of the pairs c to c + 3, so
// the matrix whose rows are these windows lies in memory without being made: its rows overlap. Seven pixels count; of
// the eighth the filters' weight is zero. Pairs begin at even pixels of the image, which can be read as whole words.
#pragma once

#include "gpu.h"
#include "stem_cuda.h"

namespace bitfast::stem {

using namespace bitfast::gpu;

constexpr int image_channels = 3, filter_size = 7, window_pairs = 4, pair_bytes = 16;
constexpr int ring_rows = 16;  // a power of two, at least 9 rows for one step and 4 for the next

// How two pixels next to each other are read.
enum class Reading : int {
  interleaved,  // red, green, blue, red, ...: three (float32: six) words
  planar,       // a word (float32: two) of each channel
  by_number,    // whatever the strides are
};

// The images as a kernel sees them; steps are in bytes.
struct Images {
  const unsigned char* data;
  int height, width;
  int64_t image_step, channel_step, row_step, pixel_step;
  int64_t part_step;  // from one third of a pair that is read as words to the next
  Reading reading;
};

// Two pixels as they were read: by channels or by pixels, as the reading says.
template <typename Number>
struct RawPair {
  static constexpr int words = image_channels * static_cast<int>(sizeof(Number)) / 2;
  uint32_t word[words];
};

// The last reading that these images allow: the first that is fast.
inline Reading reading_of(const Call& call, const void* images) {
  const int64_t alignment = call.image_dtype == static_cast<int32_t>(Dtype::float32) ? 8 : 4;
  if (call.width % 2 != 0 || reinterpret_cast<uintptr_t>(images) % alignment != 0) return Reading::by_number;
  if (call.row_stride % 2 != 0 || call.image_stride % 2 != 0) return Reading::by_number;
  if (call.channel_stride == 1 && call.pixel_stride == image_channels) return Reading::interleaved;
  const bool is_planar = call.pixel_stride == 1 && call.channel_stride % 2 == 0;
  return is_planar ? Reading::planar : Reading::by_number;
}

inline Images images_of(const Call& call, const void* data) {
  const bool is_float32 = call.image_dtype == static_cast<int32_t>(Dtype::float32);
  const int64_t bytes = is_float32 ? 4 : 2;
  const Reading reading = reading_of(call, data);
  return {static_cast<const unsigned char*>(data), call.height, call.width, bytes * call.image_stride,
          bytes * call.channel_stride, bytes * call.row_stride, bytes * call.pixel_stride,
          reading == Reading::planar ? bytes * call.channel_stride : 2 * bytes, reading};
}

// Two numbers next to each other.
template <typename Number>
BITFAST_GPU void read_two(const unsigned char* p, uint32_t* word) {
  if constexpr (sizeof(Number) == 4) {
    const uint2 two = load_8(p);
    word[0] = two.x;
    word[1] = two.y;
  } else {
    word[0] = load_4(p);
  }
}

// Numbers apart from each other; zero stands for a second that is not there.
template <typename Number>
BITFAST_GPU void read_apart(const unsigned char* first, bool has_second, int64_t step, uint32_t* word) {
  if constexpr (sizeof(Number) == 4) {
    word[0] = load_4(first);
    word[1] = has_second ? load_4(first + step) : 0;
  } else {
    word[0] = load_2(first) | (has_second ? load_2(first + step) << 16 : 0);
  }
}

// Pixels 2 * pair and 2 * pair + 1 of a row of the image; the row may lie outside, the pair may not.
template <typename Number>
BITFAST_GPU RawPair<Number> read_pair(const Images& images, const unsigned char* image, int row, int pair) {
  constexpr int words_of_part = RawPair<Number>::words / image_channels;
  RawPair<Number> raw;
#pragma unroll
  for (int i = 0; i < RawPair<Number>::words; ++i) raw.word[i] = 0;
  if (row < 0 || row >= images.height) return raw;
  const unsigned char* at = image + row * images.row_step + 2 * pair * images.pixel_step;
  if (images.reading != Reading::by_number) {
#pragma unroll
    for (int c = 0; c < image_channels; ++c, at += images.part_step) {
      read_two<Number>(at, raw.word + c * words_of_part);
    }
  } else {
    const bool has_second = 2 * pair + 1 < images.width;
#pragma unroll
    for (int c = 0; c < image_channels; ++c, at += images.channel_step) {
      read_apart<Number>(at, has_second, images.pixel_step, raw.word + c * words_of_part);
    }
  }
  return raw;
}

// Two pixels of four channels each, rounded to T.
template <typename T, typename Number>
BITFAST_GPU uint4 pixels_of(const RawPair<Number>& raw, Reading reading) {
  const uint32_t* v = raw.word;
  if constexpr (sizeof(Number) == 4) {
    auto two = [](uint32_t a, uint32_t b) { return pack_two<T>(float_from_bits(a), float_from_bits(b)); };
    return reading == Reading::interleaved ? make_uint4(two(v[0], v[1]), two(v[2], 0), two(v[3], v[4]), two(v[5], 0))
                                           : make_uint4(two(v[0], v[2]), two(v[4], 0), two(v[1], v[3]), two(v[5], 0));
  } else {
    constexpr uint32_t low = 0xffffu, high = 0xffff0000u;
    return reading == Reading::interleaved
               ? make_uint4(v[0], v[1] & low, v[1] >> 16 | v[2] << 16, v[2] >> 16)
               : make_uint4((v[0] & low) | v[1] << 16, v[2] & low, v[0] >> 16 | (v[1] & high), v[2] >> 16);
  }
}

// Whether no number is infinite or NaN.
template <typename T>
BITFAST_GPU bool are_finite(const uint4& pixels) {
  constexpr uint32_t exponent = std::is_same_v<T, BFloat16> ? 0x7f80u : 0x7c00u, both = exponent << 16 | exponent;
  bool result = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = word_of(pixels, i) & both;
    result &= (bits & 0xffffu) != exponent && bits >> 16 != exponent;
  }
  return result;
}

}  // namespace bitfast::stem
