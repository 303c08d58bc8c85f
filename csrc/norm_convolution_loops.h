// The loops of norm_convolution: packing, products, moments of the result.
// Included once per instruction set with 16 lanes, inside its namespace.
#include "vectors.h"
#include "activation_vectors.h"
#include "convolution_pieces.h"
#include "moments.h"

static_assert(lanes == chunk_words && 2 * lanes == panel_columns);

// ---- the product of a tile and a panel -------------------------------------------------------------

// Words that are multiplied and added one after the other.
constexpr int64_t summed_words = 128;

// The product of `rows` packed rows and a panel of two vectors of packed columns. (The sums are an array of this
// function's own: one that the caller goes on to use was kept in memory by GCC 12, not in registers.)
template <typename T, int rows, typename Write>
BITFAST_INLINE void multiply_chunks(const float* a, const float* panel, int64_t words, const Write& write) {
  Vector total[rows][2] = {};
  for (int64_t chunk = 0; chunk < words; chunk += chunk_words) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < chunk_words; ++k) {
      const Vector first = load(panel + k * panel_columns), second = load(panel + k * panel_columns + lanes);
#pragma GCC unroll 14
      for (int r = 0; r < rows; ++r) {
        const Vector word = reinterpret_cast<Vector>(_mm512_set1_ps(a[r * chunk_words + k]));
        total[r][0] = multiply_add<T>(total[r][0], word, first);
        total[r][1] = multiply_add<T>(total[r][1], word, second);
      }
    }
    a += rows * chunk_words;
    panel += chunk_words * panel_columns;
  }
#pragma GCC unroll 14
  for (int r = 0; r < rows; ++r) {
    write(r, 0, total[r][0]);
    write(r, 1, total[r][1]);
  }
}

// multiply_chunks, summed in pieces: the longer a sum, the more its rounding costs.
template <typename T, int rows>
BITFAST_INLINE void multiply(const float* a, const float* panel, int64_t words, Vector (&result)[rows][2]) {
  const int64_t first = std::min(words, summed_words);
  multiply_chunks<T, rows>(a, panel, first, [&](int r, int v, Vector total) { result[r][v] = total; });
  for (int64_t at = first; at < words; at += summed_words) {
    multiply_chunks<T, rows>(
        a + at * rows, panel + at * panel_columns, std::min(words - at, summed_words),
        [&](int r, int v, Vector total) { result[r][v] += total; });
  }
}

// Calls function with `rows` as a compile-time constant.
template <int most = tile_rows, typename Function>
BITFAST_INLINE void with_rows(int64_t rows, const Function& function) {
  if constexpr (most == 1) {
    function(std::integral_constant<int, 1>{});
  } else if (rows == most) {
    function(std::integral_constant<int, most>{});
  } else {
    with_rows<most - 1>(rows, function);
  }
}

// ---- moments of what is written already --------------------------------------------------------------

// Of `channels` adjacent channels, of which a pixel has `stride`.
template <typename T>
void moments_of_pixels(
    const T* x, int64_t pixels, int64_t stride, int64_t channels, double* means, double* squares) {
  std::fill_n(means, channels, 0.0);
  std::fill_n(squares, channels, 0.0);
  for (int64_t p = 0; p < pixels; p += few_pixels) {
    const T* from = x + p * stride;
    const int64_t n = std::min(few_pixels, pixels - p);
    int64_t c = 0;
    for (; c + 2 * lanes <= channels; c += 2 * lanes) {
      strip_moments<T, false, 2>(from + c, nullptr, nullptr, stride, n, All{}, p, means + c, squares + c);
    }
    for (; c < channels; c += lanes) {
      const int64_t count = std::min<int64_t>(lanes, channels - c);
      strip_moments<T, false, 1>(from + c, nullptr, nullptr, stride, n, count, p, means + c, squares + c);
    }
  }
}

// ---- the input: normalized, activated, packed ------------------------------------------------------

// A chunk of one vector of float32, or of two that are rounded to bfloat16. (A template, so that only the set of
// instructions that has them compiles those for bfloat16.)
template <int vectors>
BITFAST_INLINE void store_chunk(float* target, const Vector (&values)[vectors]) {
  if constexpr (vectors == 1) {
    store(target, values[0]);
  } else {
    const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(values[1]), reinterpret_cast<__m512>(values[0]));
    std::memcpy(target, &both, sizeof both);
  }
}

// How many channels of a chunk's vector `v` count: all, or what is left of `count`.
BITFAST_INLINE All part_of(All, int) {
  return {};
}

BITFAST_INLINE int64_t part_of(int64_t count, int v) {
  return std::clamp<int64_t>(count - v * lanes, 0, lanes);
}

// Packs one chunk of channels of the rows of a tile.
template <typename T, Activation activation, bool normalizes, typename Count>
BITFAST_INLINE void pack_chunk(
    const Work<T>& work, int64_t image, const T* const* sources, int64_t rows, int64_t channel, Count count,
    float* target, int64_t ahead) {
  constexpr int vectors = 4 / sizeof(T);
  Normalization norm[vectors];
  if constexpr (normalizes) {
    for (int v = 0; v < vectors; ++v) {
      norm[v] = normalization_from(work, image, channel + v * lanes, part_of(count, v));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_prefetch(sources[r] + channel + ahead);
    Vector values[vectors];
    for (int v = 0; v < vectors; ++v) {
      values[v] = load_up_to(sources[r] + channel + v * lanes, part_of(count, v));
      if constexpr (normalizes) {
        values[v] = norm[v].template apply<activation>(values[v]);
      }
    }
    store_chunk(target + r * chunk_words, values);
  }
}

template <typename T>
constexpr int64_t chunk_channels = chunk_words * 4 / static_cast<int64_t>(sizeof(T));

// ---- the output ------------------------------------------------------------------------------------

// Writes a vector, rounded, and returns what stands there now. (Not store() of vectors.h, since these instructions
// round to bfloat16 at once; they take numbers below 2^-126 for 0.)
template <typename T, typename Count>
BITFAST_INLINE Vector write(T* target, Vector value, Count count) {
  if constexpr (sizeof(T) == 4) {
    store_up_to(target, value, count);
    return value;
  } else {
    const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    const HalfBits bits = reinterpret_cast<HalfBits>(rounded);
    if constexpr (std::is_same_v<Count, All>) {
      std::memcpy(target, &bits, sizeof bits);
    } else {
      _mm256_mask_storeu_epi16(target, (1u << count) - 1, reinterpret_cast<__m256i>(bits));
    }
    return widened(bits);
  }
}

// Adds up the moments of the columns of a panel, tile by tile: of the differences from the mean of the tiles before (of
// itself, for the first). Where that is far from a tile's own mean, the distance between the two, which is part of
// the sum, makes up for the digits that cancel. Means are kept as distances from the first tile's.
struct PanelMoments {
  Vector origin[2], offset[2] = {}, square[2] = {};
  int seen = 0;

  template <int rows>
  BITFAST_INLINE void add(const Vector (&values)[rows][2]) {
    const float part = static_cast<float>(rows) / static_cast<float>(seen + rows);
    for (int v = 0; v < 2; ++v) {
      if (seen == 0) {
        Vector sum{};
        for (int r = 0; r < rows; ++r) {
          sum += values[r][v];
        }
        origin[v] = sum / static_cast<float>(rows);
      }
      const Vector center = origin[v] + offset[v];
      Vector rest{}, squares{};
      for (int r = 0; r < rows; ++r) {
        const Vector d = values[r][v] - center;
        rest += d;
        squares += d * d;
      }
      const Vector shift = rest * (1.0f / rows);
      const Vector difference = (center - origin[v]) + shift - offset[v];
      square[v] += squares - rest * shift + difference * difference * (seen * part);
      offset[v] += difference * part;
    }
    seen += rows;
  }

  void write_to(double* means, double* squares, int64_t columns) const {
    float origins[panel_columns], offsets[panel_columns], all_squares[panel_columns];
    for (int v = 0; v < 2; ++v) {
      store(origins + v * lanes, origin[v]);
      store(offsets + v * lanes, offset[v]);
      store(all_squares + v * lanes, square[v]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      means[c] = static_cast<double>(origins[c]) + offsets[c];
      squares[c] = all_squares[c];
    }
  }
};

// Calls function(first column, count) for each panel of a task: with All, or how many of its columns exist.
template <typename Function>
BITFAST_INLINE void for_each_panel(const Task& task, const Function& function) {
  for (int64_t column = task.first_column; column < task.last_column; column += panel_columns) {
    if (task.last_column - column >= panel_columns) {
      function(column, All{});
    } else {
      function(column, task.last_column - column);
    }
  }
}

// ---- 1x1 -------------------------------------------------------------------------------------------

template <typename T>
const T* source_of(const Work<T>& work, int64_t image, int64_t pixel) {
  const int64_t y = pixel / work.width * work.stride, x = pixel % work.width * work.stride;
  return work.x + ((image * work.in_height + y) * work.in_width + x) * work.in_channels;
}

template <typename T>
void pack_pixels(const Work<T>& work, const Task& task, const Tiles& tiles, float* packed) {
  constexpr int64_t channels = chunk_channels<T>;
  dispatch_normalization(work, [&](auto activation, auto normalizes) {
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.rows_of(t);
      const T* sources[tile_rows];
      for (int64_t r = 0; r < rows; ++r) {
        sources[r] = source_of(work, task.image, task.first_row + t * tiles.size + r);
      }
      float* target = packed + t * tiles.size * work.words();
      int64_t c = 0;
      for (; c + channels <= work.in_channels; c += channels, target += rows * chunk_words) {
        pack_chunk<T, activation, normalizes>(
            work, task.image, sources, rows, c, All{}, target, rows * work.in_channels);
      }
      if (c < work.in_channels) {
        pack_chunk<T, activation, normalizes>(work, task.image, sources, rows, c, work.in_channels - c, target, 0);
      }
    }
  });
}

template <typename T, int rows, typename Count>
void multiply_pixels(
    const Work<T>& work, const float* packed, const float* panel, T* target, Count count, PanelMoments& moments) {
  for (int r = 0; r < rows; ++r) {
    __builtin_prefetch(target + r * work.out_channels, 1);
    __builtin_prefetch(target + r * work.out_channels + panel_columns - 1, 1);
  }
  if (work.addend != nullptr && work.addend != work.result) {
    const T* addend = work.addend + (target - work.result);
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(addend + r * work.out_channels);
      __builtin_prefetch(addend + r * work.out_channels + panel_columns - 1);
    }
  }
  Vector total[rows][2];
  multiply<T>(packed, panel, work.words(), total);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < 2; ++v) {
      T* to = target + r * work.out_channels + v * lanes;
      const auto part = part_of(count, v);
      if (work.addend != nullptr) {
        total[r][v] += load_up_to(work.addend + (to - work.result), part);
      }
      total[r][v] = write(to, total[r][v], part);
    }
  }
  if (work.means != nullptr) {
    moments.add(total);
  }
}

template <typename T>
void pointwise(const Work<T>& work, const Task& task, float* scratch) {
  const Tiles tiles(task.rows);
  pack_pixels(work, task, tiles, scratch);
  T* result = work.result + (task.image * work.rows + task.first_row) * work.out_channels;
  for_each_panel(task, [&](int64_t column, auto count) {
    const float* panel = work.weight + column / panel_columns * work.panel_words();
    PanelMoments moments;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = t * tiles.size;
      with_rows(tiles.rows_of(t), [&](auto rows) {
        multiply_pixels<T, rows>(
            work, scratch + row * work.words(), panel, result + row * work.out_channels + column, count, moments);
      });
    }
    if (work.means != nullptr) {
      const int64_t at = (task.image * work.pieces + task.piece) * work.out_channels + column;
      moments.write_to(
          work.means + at, work.squares + at, std::min(panel_columns, work.out_channels - column));
    }
  });
}

// ---- 3x3, after Winograd ---------------------------------------------------------------------------
//
// Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2015 (https://arxiv.org/abs/1509.09308),
// F(2x2, 3x3): Y = A' [(G g G') * (B' d B)] A, with each 4x4 piece d of the input, overlapping by two.

inline void pack_squares(const Work<float>& work, const Task& task, const Tiles& tiles, float* packed, float* rows) {
  const int64_t across = squares_in_row(work.width), words = work.words();
  const int64_t position = position_words(tiles.rows, words);
  dispatch_normalization(work, [&](auto activation, auto normalizes) {
    for (int64_t chunk = 0; chunk * lanes < work.in_channels; ++chunk) {
      const int64_t channel = chunk * lanes, left = work.in_channels - channel;
      if (left >= lanes) {
        fill_rows<activation, normalizes>(work, task, channel, All{}, rows);
      } else {
        fill_rows<activation, normalizes>(work, task, channel, left, rows);
      }
      int64_t tile = 0, in_tile = 0;
      transform_input(rows, task.rows, across, position, [&] {
        const int64_t size = tiles.rows_of(tile);
        float* target = packed + tile * tiles.size * words + (chunk * size + in_tile) * chunk_words;
        if (++in_tile == size) {
          ++tile;
          in_tile = 0;
        }
        return target;
      });
    }
  });
}

template <int rows>
void multiply_squares(const float* packed, const float* panel, int64_t words, float* target) {
  Vector total[rows][2];
  multiply<float>(packed, panel, words, total);
  for (int r = 0; r < rows; ++r) {
    store(target + r * panel_columns, total[r][0]);
    store(target + r * panel_columns + lanes, total[r][1]);
  }
}

// A' m A: the 2x2 outputs of a square, in a vector of columns.
BITFAST_INLINE void transform_output(const float* products, int64_t position, Vector (&outputs)[2][2]) {
  Vector half[2][4];
  for (int j = 0; j < 4; ++j) {
    const float* m = products + j * position;
    const Vector a = load(m), b = load(m + 4 * position), c = load(m + 8 * position), d = load(m + 12 * position);
    half[0][j] = a + b + c;
    half[1][j] = b - c - d;
  }
  for (int i = 0; i < 2; ++i) {
    outputs[i][0] = half[i][0] + half[i][1] + half[i][2];
    outputs[i][1] = half[i][1] - half[i][2] - half[i][3];
  }
}

inline void write_squares(
    const Work<float>& work, const Task& task, const float* products, int64_t column, int64_t count) {
  const int64_t across = squares_in_row(work.width), position = task.rows * across * panel_columns;
  for (int64_t y = 0; y < task.rows; ++y) {
    const int64_t top = 2 * (task.first_row + y);
    float* row = work.result + (task.image * work.height + top) * work.width * work.out_channels + column;
    for (int64_t x = 0; x < across; ++x, products += panel_columns) {
      for (int64_t v = 0; v * lanes < count; ++v) {
        Vector outputs[2][2];
        transform_output(products + v * lanes, position, outputs);
        for (int i = 0; i < 2 && top + i < work.height; ++i) {
          for (int j = 0; j < 2 && 2 * x + j < work.width; ++j) {
            float* target = row + (i * work.width + 2 * x + j) * work.out_channels + v * lanes;
            const Vector before = work.addend == nullptr
                ? Vector{}
                : load_up_to(work.addend + (target - work.result), count - v * lanes);
            store_up_to(target, outputs[i][j] + before, count - v * lanes);
          }
        }
      }
    }
  }
}

inline void winograd(const Work<float>& work, const Task& task, float* scratch) {
  const int64_t across = squares_in_row(work.width), words = work.words();
  const Tiles tiles(task.rows * across);
  const int64_t position = position_words(tiles.rows, words);
  float* products = scratch + positions * position;
  float* rows = products + positions * tiles.rows * panel_columns;
  pack_squares(work, task, tiles, scratch, rows);
  const int64_t pixels = std::min(2 * task.rows, work.height - 2 * task.first_row) * work.width;
  const int64_t first_pixel = (task.image * work.height + 2 * task.first_row) * work.width;
  for (int64_t column = task.first_column; column < task.last_column; column += panel_columns) {
    const int64_t count = std::min(panel_columns, task.last_column - column);
    const float* panel = work.weight + column / panel_columns * positions * work.panel_words();
    for (int64_t p = 0; p < positions; ++p, panel += work.panel_words()) {
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t row = t * tiles.size;
        with_rows(tiles.rows_of(t), [&](auto size) {
          multiply_squares<size>(
              scratch + p * position + row * words, panel, words, products + (p * tiles.rows + row) * panel_columns);
        });
      }
    }
    write_squares(work, task, products, column, count);
    if (work.means != nullptr) {
      const int64_t at = (task.image * work.pieces + task.piece) * work.out_channels + column;
      moments_of_pixels(
          work.result + first_pixel * work.out_channels + column, pixels, work.out_channels, count,
          work.means + at, work.squares + at);
    }
  }
}

