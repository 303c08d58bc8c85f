// The loops of convolution_weight_gradient: packing, products, and what becomes of their sums.
// Included once per instruction set with 16 lanes, inside its namespace.
#include "vectors.h"
#include "activation_vectors.h"
#include "convolution_pieces.h"

static_assert(lanes == chunk_words && 2 * lanes == panel_columns);

// ---- products --------------------------------------------------------------------------------------

// Consecutive words of the packed input, in each panel from `offset` on.
struct Stretch {
  int64_t offset, words;
};

// A tile of a product: the packed gradient (a chunk of output channels for each word) times a panel of the input.
template <typename T>
BITFAST_INLINE void multiply_words(
    const float* grad, const float* x, const std::vector<Stretch>& stretches, float* sums, bool adds) {
  Vector total[tile_rows][2] = {};
  for (const Stretch& stretch : stretches) {
    const float* column = x + stretch.offset;
#pragma GCC unroll 2
    for (int64_t k = 0; k < stretch.words; ++k, grad += chunk_words, column += panel_columns) {
      const Vector first = load(column), second = load(column + lanes);
#pragma GCC unroll 8
      for (int r = 0; r < tile_rows; ++r) {
        const Vector word = reinterpret_cast<Vector>(_mm512_set1_ps(grad[r]));
        total[r][0] = multiply_add<T>(total[r][0], word, first);
        total[r][1] = multiply_add<T>(total[r][1], word, second);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* target = sums + r * panel_columns + v * lanes;
      store(target, adds ? load(target) + total[r][v] : total[r][v]);
    }
  }
}

// Rows of one image that are packed at once.
struct Segment {
  int64_t image, first_row, rows;
  int64_t word;        // of the packed gradient
  int64_t packed_row;  // of the packed input
};

template <typename T>
std::vector<Segment> segments_of(const Work<T>& work, int64_t first, int64_t last) {
  std::vector<Segment> segments;
  int64_t word = 0, packed_row = 0;
  while (first < last) {
    const int64_t image = first / work.rows_of_image(), row = first % work.rows_of_image();
    const int64_t rows = std::min(last - first, work.rows_of_image() - row);
    segments.push_back({image, row, rows, word, packed_row});
    first += rows;
    word += rows * work.words_of_row();
    packed_row += work.packed_rows(rows);
  }
  return segments;
}

// Words of which sums are taken at once.
struct Summed {
  int64_t first_word = 0, words = 0;
  std::vector<Stretch> stretches;
};

template <typename T>
std::vector<Summed> summed_of(const Work<T>& work, const std::vector<Segment>& segments) {
  std::vector<Summed> all(1);
  const int64_t words = work.words_of_row(), row_words = words * panel_columns;
  for (const Segment& segment : segments) {
    for (int64_t row = 0; row < segment.rows; ++row) {
      if (all.back().words > 0 && all.back().words + words > work.summed_words()) {
        all.push_back({all.back().first_word + all.back().words, 0, {}});
      }
      Summed& last = all.back();
      const int64_t offset = (segment.packed_row + row * work.row_step()) * row_words;
      const bool follows = !last.stretches.empty() &&
          last.stretches.back().offset + last.stretches.back().words * panel_columns == offset;
      if (follows) {
        last.stretches.back().words += words;
      } else {
        last.stretches.push_back({offset, words});
      }
      last.words += words;
    }
  }
  return all;
}

// ---- packing rows of pixels ------------------------------------------------------------------------

// Pixels from `begin` up to `end` of a row lie `step` apart, the first one would lie at `first`; the others are 0.
template <typename T>
struct Row {
  const T* first;
  int64_t step, begin, end;
};

template <typename T>
Row<T> row_of_grad(const Work<T>& work, int64_t image, int64_t row) {
  const int64_t pixel = image * (work.is_flat ? work.pixels : work.height * work.width) + row * work.width;
  const int64_t end = work.is_flat ? std::min(work.width, work.pixels - row * work.width) : work.width;
  return {work.grad + pixel * work.out_channels, work.out_channels, 0, end};
}

// What the taps of a column of the filter read for a row of the result, given as the row of the input.
template <typename T>
Row<T> row_of_x(const Work<T>& work, int64_t image, int64_t y, int64_t kernel_column) {
  if (work.is_flat) {
    const int64_t end = std::min(work.width, work.pixels - y * work.width);
    return {work.x + (image * work.pixels + y * work.width) * work.in_channels, work.in_channels, 0, end};
  }
  if (y < 0 || y >= work.in_height) {
    return {work.x, 0, 0, 0};
  }
  const int64_t left = kernel_column * work.dilation[1] - work.padding[1], stride = work.stride[1];
  const int64_t begin = left < 0 ? ceil_div(-left, stride) : 0;
  const int64_t end = std::clamp<int64_t>(ceil_div(work.in_width - left, stride), 0, work.width);
  return {
      work.x + ((image * work.in_height + y) * work.in_width + left) * work.in_channels, stride * work.in_channels,
      std::min(begin, end), end};
}

// Words that are packed of one panel before those of the next are, so that memory is read in order, more or less.
constexpr int64_t words_at_once = 8;

// What becomes of the input before it is packed.
template <Activation activation, bool normalizes>
struct InputNorm {
  Normalization norm;

  BITFAST_INLINE Vector operator()(Vector value) const {
    if constexpr (normalizes) {
      return norm.template apply<activation>(value);
    } else {
      return value;
    }
  }
};

using AsItIs = InputNorm<Activation::none, false>;

// One word of a vector of channels of float32.
template <typename Norm, typename Count>
BITFAST_INLINE Vector word_of(const float* pixel, int64_t, bool, bool, Count count, const Norm& norm) {
  return norm(load_up_to(pixel, count));
}

template <typename Norm, typename Count>
BITFAST_INLINE __m512i normalized_halves_of(const BFloat16* pixel, Count count, const Norm& norm) {
  if constexpr (std::is_same_v<Norm, AsItIs>) {
    return halves_of(pixel, count);
  } else {
    const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(norm(load_up_to(pixel, count))));
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(rounded));
  }
}

// One word of a vector of channels of bfloat16: two pixels `step` apart, of which one may not exist.
template <typename Norm, typename Count>
BITFAST_INLINE Vector word_of(
    const BFloat16* pixel, int64_t step, bool has_first, bool has_second, Count count, const Norm& norm) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low = has_first ? normalized_halves_of(pixel, count, norm) : zero;
  const __m512i high = has_second ? normalized_halves_of(pixel + step, count, norm) : zero;
  return pair_of_halves(low, high);
}

// Packs a row's vectors of channels: vector v goes to target(v), its words `apart`. prepare(channel, count) returns
// the norm of a vector.
template <typename T, typename Target, typename Prepare>
BITFAST_INLINE void pack_row(
    const Row<T>& row, int64_t words, int64_t first_channel, int64_t channels, int64_t apart, const Target& target,
    const Prepare& prepare) {
  constexpr int64_t pixels = 4 / sizeof(T);  // of a word
  // Words all of whose pixels exist, and the word or two that have only some.
  const int64_t first = ceil_div(row.begin, pixels), last = std::max(first, row.end / pixels);
  const int64_t first_some = row.begin / pixels, last_some = ceil_div(row.end, pixels);
  for (int64_t word = 0; word < words; word += words_at_once) {
    const int64_t end = std::min(words, word + words_at_once);
    for_each_vector(channels, [&](int64_t c, auto count) {
      float* to = target(c / lanes);
      const T* from = row.first + first_channel + c;
      const auto norm = prepare(first_channel + c, count);
      int64_t k = word;
      const auto pack_others = [&](int64_t until) {
        for (; k < until; ++k) {
          const int64_t p = k * pixels;
          const bool has_first = p >= row.begin && p < row.end, has_second = p + 1 >= row.begin && p + 1 < row.end;
          const bool has_any = k >= first_some && k < last_some && (has_first || (pixels == 2 && has_second));
          const T* pixel = from + p * row.step;
          store(to + k * apart, has_any ? word_of(pixel, row.step, has_first, has_second, count, norm) : Vector{});
        }
      };
      pack_others(std::min(first, end));
      for (; k < std::min(last, end); ++k) {
        const T* pixel = from + k * pixels * row.step;
        __builtin_prefetch(pixel + words_at_once * pixels * row.step);
        if constexpr (pixels == 2) {
          __builtin_prefetch(pixel + (words_at_once * pixels + 1) * row.step);
        }
        store(to + k * apart, word_of(pixel, row.step, true, true, count, norm));
      }
      pack_others(end);
    });
  }
}

// ---- packing for plain products -----------------------------------------------------------------------

// How a block is packed: x in versions of panels of words, the gradient in chunks of words.
struct Packed {
  float *x, *grad;
  int64_t x_version, x_panel, grad_version, grad_chunk;  // words from one to the next
};

template <typename T>
void pack_grad(const Work<T>& work, const Task& task, const std::vector<Segment>& segments, const Packed& packed) {
  const int64_t words = work.words_of_row(), first = task.chunks.first * chunk_words;
  const int64_t channels = std::min(task.chunks.last * chunk_words, work.out_channels) - first;
  for (const Segment& segment : segments) {
    for (int64_t y = 0; y < segment.rows; ++y) {
      float* target = packed.grad + (segment.word + y * words) * chunk_words;
      pack_row(
          row_of_grad(work, segment.image, segment.first_row + y), words, first, channels, chunk_words,
          [&](int64_t v) { return target + v * packed.grad_chunk; },
          [](int64_t, auto) { return AsItIs{}; });
    }
  }
}

template <typename T>
void pack_x(const Work<T>& work, const Task& task, const std::vector<Segment>& segments, const Packed& packed) {
  const int64_t words = work.words_of_row(), first = task.panels.first * panel_columns;
  const int64_t channels = std::min(task.panels.last * panel_columns, work.in_channels) - first;
  dispatch_normalization(work, [&](auto activation, auto normalizes) {
    for (const Segment& segment : segments) {
      const int64_t rows = work.packed_rows(segment.rows);
      for (int64_t r = 0; r < rows; ++r) {
        // Between rows of the result lie those of the input, unless only one of them is read.
        const int64_t y = work.is_flat ? segment.first_row + r
            : work.kernel_height == 1
            ? (segment.first_row + r) * work.stride[0] - work.padding[0]
            : segment.first_row * work.stride[0] - work.padding[0] + r;
        for (int64_t version = 0; version < work.versions(); ++version) {
          float* target = packed.x + version * packed.x_version + (segment.packed_row + r) * words * panel_columns;
          pack_row(
              row_of_x(work, segment.image, y, version), words, first, channels, panel_columns,
              [&](int64_t v) { return target + v / 2 * packed.x_panel + v % 2 * lanes; },
              [&](int64_t channel, auto count) {
                InputNorm<activation, normalizes> function{};
                if constexpr (normalizes) {
                  function.norm = normalization_from(work, segment.image, channel, count);
                }
                return function;
              });
        }
      }
    }
  });
}

// ---- packing for Winograd's products --------------------------------------------------------------------
//
// The transpose of Y = A' [(G w G') * (B' d B)] A (see norm_convolution_loops.h) in w: with the gradient g of each
// square, it is G' [sum of (A g A') * (B' d B)] G.

inline void pack_x_squares(
    const Work<float>& work, const Task& task, const std::vector<Segment>& segments, const Packed& packed,
    float* rows) {
  const int64_t across = work.words_of_row();
  dispatch_normalization(work, [&](auto activation, auto normalizes) {
    for (const Segment& segment : segments) {
      for (int64_t c = task.panels.first * panel_columns; c < task.panels.last * panel_columns; c += lanes) {
        const int64_t left = work.in_channels - c, v = c / lanes - 2 * task.panels.first;
        if (left <= 0) {
          break;
        }
        float* target = packed.x + v / 2 * packed.x_panel + v % 2 * lanes + (segment.word - 1) * panel_columns;
        for (int64_t row = 0; row < segment.rows; row += work.squares_at_once()) {
          const Segment part{
              segment.image, segment.first_row + row, std::min(work.squares_at_once(), segment.rows - row), 0, 0};
          if (left >= lanes) {
            fill_rows<activation, normalizes>(work, part, c, All{}, rows);
          } else {
            fill_rows<activation, normalizes>(work, part, c, left, rows);
          }
          transform_input(rows, part.rows, across, packed.x_version, [&] { return target += panel_columns; });
        }
      }
    }
  });
}

// A of two values.
BITFAST_INLINE void spread(Vector a, Vector b, Vector (&result)[4]) {
  result[0] = a;
  result[1] = a + b;
  result[2] = a - b;
  result[3] = -b;
}

// A g A' for each square in a row of squares, of a chunk of channels.
template <typename Count>
BITFAST_INLINE void transform_grad(
    const Work<float>& work, const float* row, bool has_below, Count count, int64_t position, float* target) {
  const int64_t right = work.out_channels, below = work.width * work.out_channels;
  for (int64_t x = 0; x < work.width; x += 2, row += 2 * right, target += chunk_words) {
    const bool has_right = x + 1 < work.width;
    Vector half[2][4];
    spread(load_up_to(row, count), has_below ? load_up_to(row + below, count) : Vector{}, half[0]);
    spread(
        has_right ? load_up_to(row + right, count) : Vector{},
        has_right && has_below ? load_up_to(row + right + below, count) : Vector{}, half[1]);
    for (int i = 0; i < 4; ++i) {
      Vector all[4];
      spread(half[0][i], half[1][i], all);
      for (int j = 0; j < 4; ++j) {
        store(target + (4 * i + j) * position, all[j]);
      }
    }
  }
}

inline void pack_grad_squares(
    const Work<float>& work, const Task& task, const std::vector<Segment>& segments, const Packed& packed) {
  const int64_t across = work.words_of_row(), first = task.chunks.first * chunk_words;
  const int64_t channels = std::min(task.chunks.last * chunk_words, work.out_channels) - first;
  for (const Segment& segment : segments) {
    for (int64_t y = 0; y < segment.rows; ++y) {
      const int64_t top = 2 * (segment.first_row + y);
      const float* row = work.grad + (segment.image * work.height + top) * work.width * work.out_channels + first;
      float* target = packed.grad + (segment.word + y * across) * chunk_words;
      for_each_vector(channels, [&](int64_t c, auto count) {
        transform_grad(
            work, row + c, top + 1 < work.height, count, packed.grad_version, target + c / lanes * packed.grad_chunk);
      });
    }
  }
}

// ---- the sums ------------------------------------------------------------------------------------------

template <typename T>
void multiply_block(
    const Work<T>& work, const Task& task, const std::vector<Summed>& all, const Packed& packed, float* sums,
    bool adds) {
  const int64_t row_words = work.words_of_row() * panel_columns;
  const int64_t last_tile = std::min(2 * task.chunks.last, work.tiles());
  for (int64_t panel = task.panels.first; panel < task.panels.last; ++panel) {
    for (const Summed& summed : all) {
      for (int64_t product = 0; product < work.products(); ++product) {
        const float *x = packed.x + (panel - task.panels.first) * packed.x_panel, *grad = packed.grad;
        if (work.is_winograd) {
          x += product * packed.x_version;
          grad += product * packed.grad_version;
        } else {
          x += product % work.kernel_width * packed.x_version;
          x += product / work.kernel_width * work.dilation[0] * row_words;
        }
        for (int64_t tile = 2 * task.chunks.first; tile < last_tile; ++tile) {
          const float* rows = grad + (tile / 2 - task.chunks.first) * packed.grad_chunk + tile % 2 * tile_rows;
          multiply_words<T>(
              rows + summed.first_word * chunk_words, x, summed.stretches,
              sums + tile_at(work, panel, product, tile), adds || &summed != &all.front());
        }
      }
    }
  }
}

template <typename T>
void sum_products(const Work<T>& work, const Task& task, float* scratch, float* sums) {
  const int64_t words = work.words_of_row(), at_once = work.rows_at_once();
  Packed packed;
  packed.x_panel = work.most_packed_rows() * words * panel_columns;
  packed.x_version = task.panels.size() * packed.x_panel + chunk_words;
  packed.grad_chunk = at_once * words * chunk_words;
  packed.grad_version = task.chunks.size() * packed.grad_chunk + chunk_words;
  packed.x = scratch;
  packed.grad = packed.x + work.versions() * packed.x_version;
  float* rows = packed.grad + (work.is_winograd ? positions : 1) * packed.grad_version;
  for (int64_t first = task.rows.first; first < task.rows.last; first += at_once) {
    const auto segments = segments_of(work, first, std::min(task.rows.last, first + at_once));
    if constexpr (sizeof(T) == 4) {
      if (work.is_winograd) {
        pack_x_squares(work, task, segments, packed, rows);
        pack_grad_squares(work, task, segments, packed);
        multiply_block(work, task, summed_of(work, segments), packed, sums, first != task.rows.first);
        continue;
      }
    }
    pack_x(work, task, segments, packed);
    pack_grad(work, task, segments, packed);
    multiply_block(work, task, summed_of(work, segments), packed, sums, first != task.rows.first);
  }
}

// ---- the result ----------------------------------------------------------------------------------------

// G' of a column of four values.
BITFAST_INLINE void gather(const Vector (&m)[4], Vector (&result)[3]) {
  const Vector sum = (m[1] + m[2]) * 0.5f;
  result[0] = m[0] + sum;
  result[1] = (m[1] - m[2]) * 0.5f;
  result[2] = sum + m[3];
}

BITFAST_INLINE void taps_from_positions(const Vector (&m)[positions], Vector (&taps)[9]) {
  Vector half[4][3];
  for (int j = 0; j < 4; ++j) {
    gather({m[j], m[4 + j], m[8 + j], m[12 + j]}, half[j]);
  }
  for (int i = 0; i < 3; ++i) {
    Vector row[3];
    gather({half[0][i], half[1][i], half[2][i], half[3][i]}, row);
    for (int j = 0; j < 3; ++j) {
      taps[3 * i + j] = row[j];
    }
  }
}

template <typename T>
BITFAST_INLINE void write_tap(
    const Work<T>& work, const Output<T>& output, int64_t row, int64_t column, int64_t tap, Vector value) {
  T* target = output.result + row * output.out_stride + column * output.in_stride + tap * output.tap_stride;
  const int64_t count = std::min<int64_t>(lanes, work.in_channels - column);
  if (output.in_stride == 1) {
    return store_up_to(target, value, count);
  }
  for (int64_t i = 0; i < count; ++i) {
    target[i * output.in_stride] = static_cast<T>(value[i]);
  }
}

// Adds up the sums of all splits for a panel of input channels, and writes what they come to.
template <typename T>
void write_panel(const Work<T>& work, const Output<T>& output, int64_t panel) {
  const int64_t split_words = sums_words(work), product_words = work.tiles() * tile_words;
  for (int64_t row = 0; row < work.out_channels; ++row) {
    for (int64_t column = panel * panel_columns; column < std::min(work.in_channels, (panel + 1) * panel_columns);
         column += lanes) {
      const float* sums = output.sums + tile_at(work, panel, 0, row / tile_rows) + row % tile_rows * panel_columns +
          column % panel_columns;
      const auto total = [&](int64_t product) {
        Vector value = load(sums + product * product_words);
        for (int64_t split = 1; split < work.splits; ++split) {
          value += load(sums + split * split_words + product * product_words);
        }
        return value;
      };
      if (!work.is_winograd) {
        for (int64_t tap = 0; tap < work.products(); ++tap) {
          write_tap(work, output, row, column, tap, total(tap));
        }
        continue;
      }
      Vector m[positions], taps[9];
      for (int64_t p = 0; p < positions; ++p) {
        m[p] = total(p);
      }
      taps_from_positions(m, taps);
      for (int64_t tap = 0; tap < 9; ++tap) {
        write_tap(work, output, row, column, tap, taps[tap]);
      }
    }
  }
}
