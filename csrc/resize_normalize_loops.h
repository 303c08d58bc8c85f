// The loops of resize_normalize: resampling along rows and columns, and what becomes of bytes.
// Included once per instruction set, inside its namespace.
//
// A row is worked on as `channels_at_once` channels per pixel, one pixel after the other, however it lies in memory.
// One axis is resampled after the other; of what comes out of the first, only the rows that the second reads at
// a time are kept.

#include "vectors.h"

constexpr int64_t pixels_per_vector = lanes / channels_at_once;
static_assert(pixels_per_vector <= 4, "weights are padded to a multiple of 4");

// Vectors reach this many pixels past the end of a row, which therefore has room there.
constexpr int64_t slack = 16;

typedef int32_t Quad __attribute__((vector_size(16)));
typedef uint8_t QuadBytes __attribute__((vector_size(4)));
typedef uint8_t VectorBytes __attribute__((vector_size(lanes)));
typedef uint8_t SixteenBytes __attribute__((vector_size(16)));

// ---- vectors of bytes ------------------------------------------------------------------------------
// (Templates, so that only the branch for the vectors at hand is compiled.)

template <typename Wide>
BITFAST_INLINE Wide load_bytes(const uint8_t* source) {
#if BITFAST_X86
  if constexpr (sizeof(Wide) == 64) {
    return reinterpret_cast<Wide>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
  } else if constexpr (sizeof(Wide) == 32) {
    return reinterpret_cast<Wide>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
  }
#endif
  VectorBytes bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  return __builtin_convertvector(bytes, Wide);
}

// Weights of as many pixels as a vector has, each for all channels of its pixel.
template <typename Wide>
BITFAST_INLINE Wide load_weights(const int32_t* source) {
#if BITFAST_X86
  if constexpr (sizeof(Wide) == 64) {
    const __m512i pixel = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m128i weights = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return reinterpret_cast<Wide>(_mm512_permutexvar_epi32(pixel, _mm512_castsi128_si512(weights)));
  } else if constexpr (sizeof(Wide) == 32) {
    return reinterpret_cast<Wide>(_mm256_set_m128i(_mm_set1_epi32(source[1]), _mm_set1_epi32(source[0])));
  }
#endif
  return source[0] - Wide{};
}

template <typename Wide>
BITFAST_INLINE Quad sum_of_pixels(Wide sums) {
#if BITFAST_X86
  if constexpr (sizeof(Wide) == 64) {
    const __m512i all = reinterpret_cast<__m512i>(sums);
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return reinterpret_cast<Quad>(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  } else if constexpr (sizeof(Wide) == 32) {
    const __m256i half = reinterpret_cast<__m256i>(sums);
    return reinterpret_cast<Quad>(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  } else
#endif
  {
    return reinterpret_cast<Quad>(sums);
  }
}

// Rounds sums of weighted pixels, and stores them as bytes.
template <typename Wide>
BITFAST_INLINE void store_bytes(uint8_t* target, Wide sums) {
  Wide pixels = (sums + (1 << (precision_bits - 1))) >> precision_bits;
  pixels = pixels < 0 ? Wide{} : pixels;
  pixels = pixels > 255 ? Wide{} + 255 : pixels;
#if BITFAST_X86
  if constexpr (sizeof(Wide) == 64) {
    const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(pixels));
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
  } else if constexpr (sizeof(Wide) == 32) {
    const __m256i wide = reinterpret_cast<__m256i>(pixels);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(words, words));
  } else {
    const __m128i quad = reinterpret_cast<__m128i>(pixels);
    const __m128i words = _mm_packs_epi32(quad, quad);
    const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(target, &bytes, sizeof bytes);
  }
#else
  const VectorBytes bytes = __builtin_convertvector(pixels, VectorBytes);
  std::memcpy(target, &bytes, sizeof bytes);
#endif
}

// ---- resampling along rows --------------------------------------------------------------------------
// `begin` is the index of the pixel that the rows begin with.

template <int Rows>
BITFAST_INLINE void resample_width(
    const Axis<int32_t>& axis, int64_t begin, const uint8_t* const* rows, uint8_t* const* results) {
  for (int64_t i = 0; i < axis.count; ++i) {
    const int32_t* weights = axis.weights.data() + i * axis.stride;
    const int64_t first = (axis.starts[i] - begin) * channels_at_once;
    Integers sums[Rows] = {};
    for (int64_t t = 0; t < axis.taps; t += pixels_per_vector) {
      const Integers weight = load_weights<Integers>(weights + t);
      for (int r = 0; r < Rows; ++r) {
        sums[r] += load_bytes<Integers>(rows[r] + first + t * channels_at_once) * weight;
      }
    }
    for (int r = 0; r < Rows; ++r) {
      store_bytes(results[r] + i * channels_at_once, sum_of_pixels(sums[r]));
    }
  }
}

template <int Rows>
BITFAST_INLINE void resample_width(
    const Axis<double>& axis, int64_t begin, const float* const* rows, float* const* results) {
  for (int64_t i = 0; i < axis.count; ++i) {
    const double* weights = axis.weights.data() + i * axis.stride;
    const int64_t first = (axis.starts[i] - begin) * channels_at_once;
    for (int r = 0; r < Rows; ++r) {
      double sums[channels_at_once] = {};
      for (int64_t t = 0; t < axis.taps; ++t) {
        for (int64_t c = 0; c < channels_at_once; ++c) {
          sums[c] += rows[r][first + t * channels_at_once + c] * weights[t];
        }
      }
      std::copy_n(sums, channels_at_once, results[r] + i * channels_at_once);
    }
  }
}

template <typename Weights, typename Pixel>
BITFAST_INLINE void resample_width(
    const Weights& axis, int64_t begin, const Pixel* const* rows, int64_t count, Pixel* const* results) {
  if (axis.copies) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < axis.count; ++i) {
        std::memcpy(
            results[r] + i * channels_at_once, rows[r] + (axis.starts[i] - begin) * channels_at_once,
            channels_at_once * sizeof(Pixel));
      }
    }
  } else if (count == rows_at_once) {
    resample_width<rows_at_once>(axis, begin, rows, results);
  } else {
    for (int64_t r = 0; r < count; ++r) {
      resample_width<1>(axis, begin, rows + r, results + r);
    }
  }
}

// ---- resampling along columns -----------------------------------------------------------------------
// Makes `length` numbers of one row of as many rows as there are taps.

BITFAST_INLINE void resample_height(
    const uint8_t* const* rows, const int32_t* weights, int64_t taps, int64_t length, uint8_t* result) {
  constexpr int vectors = 4;
  for (int64_t i = 0; i < length; i += vectors * lanes) {
    Integers sums[vectors] = {};
    for (int64_t t = 0; t < taps; ++t) {
      for (int v = 0; v < vectors; ++v) {
        sums[v] += load_bytes<Integers>(rows[t] + i + v * lanes) * weights[t];
      }
    }
    for (int v = 0; v < vectors; ++v) {
      store_bytes(result + i + v * lanes, sums[v]);
    }
  }
}
static_assert(4 * lanes <= slack * channels_at_once, "a step must not reach past the room behind a row");

BITFAST_INLINE void resample_height(
    const float* const* rows, const double* weights, int64_t taps, int64_t length, float* result) {
  for (int64_t i = 0; i < length; i += lanes) {
    double sums[lanes] = {};
    for (int64_t t = 0; t < taps; ++t) {
      for (int v = 0; v < lanes; ++v) {
        sums[v] += rows[t][i + v] * weights[t];
      }
    }
    std::copy_n(sums, lanes, result + i);
  }
}

// ---- rows of an image -------------------------------------------------------------------------------

// Some rows, of which the latest are kept.
template <typename Pixel>
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : count_(count), stride_((width + slack) * channels_at_once), memory_(count * stride_) {}

  Pixel* operator[](int64_t i) { return memory_.data() + i % count_ * stride_; }

 private:
  int64_t count_, stride_;
  std::vector<Pixel> memory_;
};

// Four of an image's channels, and the columns of it that are read.
template <typename Pixel>
struct Source {
  Image<Pixel> image;  // with the four channels, or fewer, that are meant
  int64_t begin, end;

  const Pixel* at(int64_t row) const { return image.data + row * image.row_stride + begin * image.pixel_stride; }

  // Whether a row's pixels lie in memory as they are worked on, with room behind them.
  bool is_ready(int64_t row) const {
    const int64_t past = (image.height - 1 - row) * image.row_stride + (image.width - end) * channels_at_once;
    return image.pixel_stride == channels_at_once && (image.channel_stride == 1 || image.channels == 1) &&
        past >= (slack + 1) * channels_at_once;
  }
};

BITFAST_INLINE void spread_three(const uint8_t* source, int64_t count, uint8_t* target) {
  int64_t i = 0;
  for (; i + 6 <= count; i += 4) {  // of 16 bytes, 12 are used
    SixteenBytes bytes;
    std::memcpy(&bytes, source + 3 * i, sizeof bytes);
    bytes = __builtin_shuffle(bytes, SixteenBytes{0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11});
    std::memcpy(target + channels_at_once * i, &bytes, sizeof bytes);
  }
  for (; i < count; ++i) {
    std::copy_n(source + 3 * i, 3, target + channels_at_once * i);
  }
}

// Writes the pixels of a row as they are worked on.
template <typename Pixel>
BITFAST_INLINE void unpack(const Source<Pixel>& source, int64_t row, Pixel* target) {
  const Image<Pixel>& image = source.image;
  const Pixel* pixels = source.at(row);
  const int64_t count = source.end - source.begin;
  if constexpr (sizeof(Pixel) == 1) {
    if (image.channels == 3 && image.pixel_stride == 3 && image.channel_stride == 1) {
      return spread_three(pixels, count, target);
    }
  }
  if (image.channels == 3 && image.pixel_stride == 1) {  // planes
    const int64_t plane = image.channel_stride;
    for (int64_t i = 0; i < count; ++i) {
      const Pixel last = pixels[i + 2 * plane];
      target[channels_at_once * i] = pixels[i];
      target[channels_at_once * i + 1] = pixels[i + plane];
      target[channels_at_once * i + 2] = last;
      target[channels_at_once * i + 3] = last;  // unused, but it makes wide stores possible
    }
    return;
  }
  for (int64_t c = 0; c < image.channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      target[channels_at_once * i + c] = pixels[i * image.pixel_stride + c * image.channel_stride];
    }
  }
}

// ---- the result -------------------------------------------------------------------------------------

// Writes one row of a channel: zeros, `count` pixels from `left` on, zeros.
template <typename Pixel, typename Element>
BITFAST_INLINE void write_channel(
    const Window<Element>& window, const Pixel* pixels, int64_t left, int64_t count, int64_t channel, Element* row) {
  const auto value = [&](Pixel pixel) -> Element {
    if constexpr (sizeof(Pixel) == 1) {
      return window.values[channel * 256 + pixel];
    } else {
      return pixel;
    }
  };
  const Element zero = value(Pixel{});
  const auto write = [&](int64_t stride) {
    for (int64_t x = 0; x < left; ++x) {
      row[x * stride] = zero;
    }
    for (int64_t x = 0; x < count; ++x) {
      row[(left + x) * stride] = value(pixels[x * channels_at_once]);
    }
    for (int64_t x = left + count; x < window.width; ++x) {
      row[x * stride] = zero;
    }
  };
  if (window.pixel_stride == 1) {
    write(1);
  } else {
    write(window.pixel_stride);
  }
}

template <typename Pixel, typename Element>
BITFAST_INLINE void write_row(
    const Window<Element>& window, int64_t y, const Pixel* pixels, int64_t left, int64_t count, int64_t first_channel,
    int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    Element* row = window.data + y * window.row_stride + (first_channel + c) * window.channel_stride;
    write_channel(window, pixels + c, left, count, first_channel + c, row);
  }
}

// ---- windows ----------------------------------------------------------------------------------------

// Calls write(i, row) for rows `first` to `last` of what is resampled along the width, then the height.
template <typename Pixel, typename Function>
BITFAST_INLINE void resample_width_first(
    const Plan<Pixel>& plan, const Source<Pixel>& source, int64_t first, int64_t last, const Function& write) {
  const auto& height = *plan.rows;
  const auto& width = *plan.columns;
  Rows<Pixel> unpacked(rows_at_once, source.end - source.begin);
  Rows<Pixel> narrow(height.taps + rows_at_once, width.count);
  Rows<Pixel> result(1, width.count);
  std::vector<const Pixel*> taps(height.taps);
  const int64_t end = height.starts[last - 1] + height.taps;
  int64_t done = height.starts[first];
  for (int64_t i = first; i < last; ++i) {
    const int64_t start = height.starts[i];
    done = std::max(done, start);
    while (done < start + height.taps) {
      const int64_t count = std::min(rows_at_once, end - done);
      const Pixel* rows[rows_at_once];
      Pixel* results[rows_at_once];
      for (int64_t r = 0; r < count; ++r) {
        rows[r] = source.at(done + r);
        if (!source.is_ready(done + r)) {
          unpack(source, done + r, unpacked[r]);
          rows[r] = unpacked[r];
        }
        results[r] = narrow[done + r];
      }
      resample_width(width, source.begin, rows, count, results);
      done += count;
    }
    if (height.copies) {
      write(i, narrow[start]);
      continue;
    }
    for (int64_t t = 0; t < height.taps; ++t) {
      taps[t] = narrow[start + t];
    }
    resample_height(
        taps.data(), height.weights.data() + i * height.stride, height.taps, width.count * channels_at_once, result[0]);
    write(i, result[0]);
  }
}

// Calls write(i, row) for rows `first` to `last` of what is resampled along the height, then the width.
template <typename Pixel, typename Function>
BITFAST_INLINE void resample_height_first(
    const Plan<Pixel>& plan, const Source<Pixel>& source, int64_t first, int64_t last, const Function& write) {
  const auto& height = *plan.rows;
  const auto& width = *plan.columns;
  const int64_t span = source.end - source.begin;
  Rows<Pixel> unpacked(height.taps, span);
  Rows<Pixel> low(1, span);
  Rows<Pixel> result(1, width.count);
  std::vector<const Pixel*> taps(height.taps);
  int64_t done = height.starts[first];
  for (int64_t i = first; i < last; ++i) {
    const int64_t start = height.starts[i];
    for (done = std::max(done, start); done < start + height.taps; ++done) {
      if (!source.is_ready(done)) {
        unpack(source, done, unpacked[done]);
      }
    }
    for (int64_t t = 0; t < height.taps; ++t) {
      taps[t] = source.is_ready(start + t) ? source.at(start + t) : unpacked[start + t];
    }
    const Pixel* row = taps[0];
    if (!height.copies) {
      resample_height(
          taps.data(), height.weights.data() + i * height.stride, height.taps, span * channels_at_once, low[0]);
      row = low[0];
    }
    Pixel* target = result[0];
    resample_width(width, source.begin, &row, 1, &target);
    write(i, target);
  }
}

// Fills rows `first` to `last` of a window.
template <typename Pixel, typename Element>
void resize_rows(const Plan<Pixel>& plan, const Window<Element>& window, int64_t first, int64_t last) {
  const int64_t inside = plan.rows == nullptr ? 0 : plan.rows->count;
  const int64_t top = std::clamp(plan.top, first, last);
  const int64_t bottom = std::clamp(plan.top + inside, top, last);
  const Image<Pixel>& image = plan.image;
  for (int64_t c = 0; c < image.channels; c += channels_at_once) {
    const int64_t channels = std::min(channels_at_once, image.channels - c);
    for (int64_t y = first; y < last; ++y) {
      if (y < top || y >= bottom) {
        write_row<Pixel>(window, y, nullptr, window.width, 0, c, channels);
      }
    }
    if (top == bottom) {
      continue;
    }
    Source<Pixel> source{image, plan.columns->first_input(), plan.columns->end_of_inputs()};
    source.image.data += c * image.channel_stride;
    source.image.channels = channels;
    const auto write = [&](int64_t i, const Pixel* row) {
      write_row(window, plan.top + i, row, plan.left, plan.columns->count, c, channels);
    };
    if (plan.height_first) {
      resample_height_first(plan, source, top - plan.top, bottom - plan.top, write);
    } else {
      resample_width_first(plan, source, top - plan.top, bottom - plan.top, write);
    }
  }
}
