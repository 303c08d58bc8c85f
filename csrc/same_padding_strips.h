// same_padding on GPUs for channels_last maps whose pixels are whole vectors of 16 bytes: padding, and the stem's
// pool, 3x3 with stride 2. A thread takes one vector of one column and goes down a strip of rows, so that it divides
// once, and reads each row once although windows share rows. Neighbouring threads touch neighbouring vectors.
#pragma once

#include "gpu.h"
#include "same_padding_elements.h"

namespace bitfast::same_padding {

// How the threads of a launch share a map.
struct Strips {
  uint32_t threads;        // of all images
  uint32_t across;         // threads side by side: the vectors of a row
  uint32_t per_image;      // strips on top of each other
  int rows_per_strip;
};

struct Strip {
  int64_t image;
  int across;  // the number of the vector
  int first;   // row
};

BITFAST_GPU bool has_strip(const Strips& strips) {
  return blockIdx.x * threads_per_block + threadIdx.x < strips.threads;
}

BITFAST_GPU Strip own_strip(const Strips& strips) {
  const uint32_t thread = blockIdx.x * threads_per_block + threadIdx.x;
  const uint32_t strip = thread / strips.across, image = strip / strips.per_image;
  return {
      static_cast<int64_t>(image), static_cast<int>(thread - strip * strips.across),
      static_cast<int>(strip - image * strips.per_image) * strips.rows_per_strip};
}

// ---- pad ------------------------------------------------------------------------------------------------------------

// Of any dtype.
struct PadStrips {
  static constexpr int rows_at_once = 4;  // all are on their way before the first is waited for

  struct Arguments {
    Strips strips;
    const uint4* x;
    uint4* result;
    int source_height, source_across;  // of x, in rows and vectors
    int height, across;                // of the result
    int top, left;                     // in rows and vectors; negative: cropped
    float value;
    Dtype dtype;
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    if (!has_strip(a.strips)) return;
    const Strip strip = own_strip(a.strips);
    const int from = strip.across - a.left;
    const bool is_column = inside(from, a.source_across);
    const uint4* source = a.x + strip.image * a.source_height * a.source_across + from;
    uint4* target = a.result + strip.image * a.height * a.across + strip.across;
    const uint32_t word = word_of_number(a.value, a.dtype);
    uint4 v[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int row = strip.first + i - a.top;
      v[i] = is_column && inside(row, a.source_height)
                 ? gpu::load_streaming(source + static_cast<int64_t>(row) * a.source_across)
                 : make_uint4(word, word, word, word);
    }
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int row = strip.first + i;
      if (row < a.height) gpu::store_16(target + static_cast<int64_t>(row) * a.across, v[i]);
    }
  }
};

// ---- max-pool 3x3, stride 2 -----------------------------------------------------------------------------------------

// Three neighbouring pixels of a row: those of a window.
struct Pixels {
  uint4 v[3];
};

// The larger of the numbers of each lane; a NaN wins.
template <typename T>
BITFAST_GPU uint4 maximum(const uint4& a, const uint4& b) {
  if constexpr (sizeof(T) == 4) {
    auto larger = [](uint32_t x, uint32_t y) {
      return beats(gpu::float_from_bits(x), gpu::float_from_bits(y)) ? x : y;
    };
    return make_uint4(larger(a.x, b.x), larger(a.y, b.y), larger(a.z, b.z), larger(a.w, b.w));
  } else {
    return make_uint4(
        gpu::maximum_of_two<T>(a.x, b.x), gpu::maximum_of_two<T>(a.y, b.y), gpu::maximum_of_two<T>(a.z, b.z),
        gpu::maximum_of_two<T>(a.w, b.w));
  }
}

template <typename T>
BITFAST_GPU uint4 maximum_of(const Pixels& pixels) {
  return maximum<T>(maximum<T>(pixels.v[0], pixels.v[1]), pixels.v[2]);
}

// The largest numbers so far and where they came from.
template <typename T>
struct Best {
  float value[gpu::vector_size<T>];
  int tap[gpu::vector_size<T>];
};

// Of the three pixels of a row.
template <typename T>
BITFAST_GPU Best<T> best_of(const Pixels& pixels) {
  Best<T> best;
  gpu::unpack<T>(pixels.v[0], best.value);
#pragma unroll
  for (int i = 0; i < gpu::vector_size<T>; ++i) best.tap[i] = 0;
#pragma unroll
  for (int j = 1; j < 3; ++j) {
    float value[gpu::vector_size<T>];
    gpu::unpack<T>(pixels.v[j], value);
#pragma unroll
    for (int i = 0; i < gpu::vector_size<T>; ++i) {
      if (beats(value[i], best.value[i])) {
        best.value[i] = value[i];
        best.tap[i] = j;
      }
    }
  }
  return best;
}

// Lets the best of row number `row` of the window replace what it beats.
template <typename T>
BITFAST_GPU void update(Best<T>& best, const Best<T>& other, int row) {
#pragma unroll
  for (int i = 0; i < gpu::vector_size<T>; ++i) {
    if (beats(other.value[i], best.value[i])) {
      best.value[i] = other.value[i];
      best.tap[i] = 3 * row + other.tap[i];
    }
  }
}

// The taps of a vector, a byte each.
template <typename T>
struct Taps {
  uint32_t word[gpu::vector_size<T> / 4];
};

template <typename T>
BITFAST_GPU Taps<T> load_taps(const uint8_t* p) {
  if constexpr (sizeof(T) == 4) {
    return {{gpu::load_4(p)}};
  } else {
    const uint2 v = gpu::load_8(p);
    return {{v.x, v.y}};
  }
}

template <typename T>
BITFAST_GPU void store_taps(uint8_t* p, const Best<T>& best) {
  uint32_t word[gpu::vector_size<T> / 4] = {};
#pragma unroll
  for (int i = 0; i < gpu::vector_size<T>; ++i) word[i / 4] |= static_cast<uint32_t>(best.tap[i]) << (i % 4 * 8);
  if constexpr (sizeof(T) == 4) {
    gpu::store_4(p, word[0]);
  } else {
    gpu::store_8(p, make_uint2(word[0], word[1]));
  }
}

template <typename T, bool with_taps>
struct PoolStrips {
  struct Arguments {
    Strips strips;
    const T* x;
    T* result;
    uint8_t* taps;
    int channels, height, width, pooled_height, pooled_width;
    int top, left;
    float value;
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = with_taps ? 3 : 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    if (!has_strip(a.strips)) return;
    const Strip strip = own_strip(a.strips);
    const int vectors = a.channels / gpu::vector_size<T>;
    const int column = strip.across / vectors, channel = strip.across % vectors * gpu::vector_size<T>;
    const int left = 2 * column - a.left;
    const int row_size = a.width * a.channels, pooled_row_size = a.pooled_width * a.channels;
    const T* source = a.x + strip.image * a.height * row_size + static_cast<int64_t>(left) * a.channels + channel;
    const int64_t target = strip.image * a.pooled_height * pooled_row_size + column * a.channels + channel;
    float values[gpu::vector_size<T>];
#pragma unroll
    for (float& value : values) value = a.value;
    const uint4 pad = gpu::pack<T>(values);
    const bool is_column[3] = {inside(left, a.width), inside(left + 1, a.width), inside(left + 2, a.width)};
    auto load = [&](int row) {
      const bool is_row = inside(row, a.height);
      const T* p = source + static_cast<int64_t>(row) * row_size;
      Pixels pixels;
#pragma unroll
      for (int j = 0; j < 3; ++j) pixels.v[j] = is_row && is_column[j] ? gpu::load_16(p + j * a.channels) : pad;
      return pixels;
    };
    const int end = min(strip.first + a.strips.rows_per_strip, a.pooled_height);
    int row = 2 * strip.first - a.top;  // the first of the window
    if constexpr (!with_taps) {
      uint4 first = maximum_of<T>(load(row));
#pragma unroll 1
      for (int pooled = strip.first; pooled < end; ++pooled, row += 2) {
        const Pixels second = load(row + 1), third = load(row + 2);
        const uint4 last = maximum_of<T>(third);
        gpu::store_16(
            a.result + target + static_cast<int64_t>(pooled) * pooled_row_size,
            maximum<T>(maximum<T>(first, maximum_of<T>(second)), last));
        first = last;
      }
    } else {
      Best<T> first = best_of<T>(load(row));
      for (int pooled = strip.first; pooled < end; ++pooled, row += 2) {
        const Pixels second = load(row + 1), third = load(row + 2);
        const Best<T> last = best_of<T>(third);
        update(first, best_of<T>(second), 1);
        update(first, last, 2);
        const int64_t offset = target + static_cast<int64_t>(pooled) * pooled_row_size;
        gpu::store_16(a.result + offset, gpu::pack<T>(first.value));
        store_taps<T>(a.taps + offset, first);
        first = last;
      }
    }
  }
};

// ---- max-pool 3x3, stride 2, backward -------------------------------------------------------------------------------

// Number k of a word of four bytes.
template <typename T>
BITFAST_GPU float number_of(uint32_t word, int k) {
  if constexpr (sizeof(T) == 4) {
    return gpu::float_from_bits(word);
  } else {
    return k == 0 ? gpu::low_number<T>(word) : gpu::high_number<T>(word);
  }
}

// The numbers, rounded to T, as a word of four bytes.
template <typename T>
BITFAST_GPU uint32_t word_of_numbers(const float (&numbers)[gpu::vector_size<T> / 4]) {
  if constexpr (sizeof(T) == 4) {
    return gpu::bits_of(numbers[0]);
  } else {
    return gpu::pack_two<T>(numbers[0], numbers[1]);
  }
}

// Two neighbouring windows of a row: gradients and taps, channel by channel.
template <typename T>
struct Windows {
  uint4 grad[2];
  Taps<T> taps[2];
};

// The rows 2q + 1 and 2q + 2 of the padded map lie in the windows of the pooled rows q and q + 1, and in no others.
// Columns are paired likewise. A thread makes the four pixels where such a pair of rows meets one of columns, from four
// windows, two of which serve the next pair of rows too. Sums are taken in the order of the taps.
template <typename T>
struct GatherStrips {
  struct Arguments {
    Strips strips;  // of pairs of rows and pairs of columns
    const T* grad;
    const uint8_t* taps;
    T* result;
    int channels, height, width, pooled_height, pooled_width;
    int top, left;
    int first_row, first_column;  // the lowest q of rows and of columns: -1 or more
  };
  static constexpr int threads = threads_per_block;
  static constexpr int min_blocks = 3;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    if (!has_strip(a.strips)) return;
    const Strip strip = own_strip(a.strips);
    const int vectors = a.channels / gpu::vector_size<T>;
    const int window = a.first_column + strip.across / vectors, channel = strip.across % vectors * gpu::vector_size<T>;
    const int row_size = a.width * a.channels, pooled_row_size = a.pooled_width * a.channels;
    const int64_t source = strip.image * a.pooled_height * pooled_row_size +
                           static_cast<int64_t>(window) * a.channels + channel;
    const int column = 2 * window + 1 - a.left;
    T* target = a.result + strip.image * a.height * row_size + static_cast<int64_t>(column) * a.channels + channel;
    const bool is_window[2] = {inside(window, a.pooled_width), inside(window + 1, a.pooled_width)};
    const bool is_column[2] = {inside(column, a.width), inside(column + 1, a.width)};
    auto load = [&](int row) {
      Windows<T> windows;
      const bool is_row = inside(row, a.pooled_height);
      const int64_t first = source + static_cast<int64_t>(row) * pooled_row_size;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        windows.grad[j] = make_uint4(0, 0, 0, 0);
        for (uint32_t& word : windows.taps[j].word) word = 0xffffffffu;  // of no pixel
        if (is_row && is_window[j]) {
          windows.grad[j] = gpu::load_16(a.grad + first + j * a.channels);
          windows.taps[j] = load_taps<T>(a.taps + first + j * a.channels);
        }
      }
      return windows;
    };
    const int row_after_last = a.height + a.top;  // of the padded map
    int q = a.first_row + strip.first;
    Windows<T> above = load(q);
#pragma unroll 1
    for (int i = 0; i < a.strips.rows_per_strip && 2 * q + 1 < row_after_last; ++i, ++q) {
      const Windows<T> below = load(q + 1);
      uint4 sums[2][2];
      add_up(above, below, sums);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * q + 1 + r - a.top;
        T* p = target + static_cast<int64_t>(row) * row_size;
        if (inside(row, a.height) && is_column[0]) gpu::store_16(p, sums[r][0]);
        if (inside(row, a.height) && is_column[1]) gpu::store_16(p + a.channels, sums[r][1]);
      }
      above = below;
    }
  }

 private:
  // The gradients of the four pixels.
  static BITFAST_GPU void add_up(const Windows<T>& above, const Windows<T>& below, uint4 (&sums)[2][2]) {
    constexpr int per_word = gpu::vector_size<T> / 4;
    uint32_t words[4][4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float sum[4][per_word];
#pragma unroll
      for (int k = 0; k < per_word; ++k) {
        const int i = w * per_word + k;
        auto from = [&](const Windows<T>& windows, int j, uint32_t tap) {
          const bool is_maximum = (windows.taps[j].word[i / 4] >> (i % 4 * 8) & 0xffu) == tap;
          return is_maximum ? number_of<T>(gpu::word_of(windows.grad[j], w), k) : 0.0f;
        };
        sum[0][k] = from(above, 0, 4);
        sum[1][k] = from(above, 1, 3) + from(above, 0, 5);
        sum[2][k] = from(below, 0, 1) + from(above, 0, 7);
        sum[3][k] = from(below, 1, 0) + from(below, 0, 2) + from(above, 1, 6) + from(above, 0, 8);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) words[p][w] = word_of_numbers<T>(sum[p]);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      sums[p / 2][p % 2] = make_uint4(words[p][0], words[p][1], words[p][2], words[p][3]);
    }
  }
};

}  // namespace bitfast::same_padding
