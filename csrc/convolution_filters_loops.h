// The loops that pack filters for norm_convolution.
// Included once for an instruction set with 16 lanes, inside its namespace.
#include "vectors.h"
#include "convolution_words_loops.h"

static_assert(lanes == chunk_words && 2 * lanes == panel_columns);

// ---- transposes ------------------------------------------------------------------------------------

BITFAST_INLINE __m512 as_floats(Vector x) {
  return reinterpret_cast<__m512>(x);
}

// Of 16 vectors of words: first within quarters of vectors, then between them.
BITFAST_INLINE void transpose(Vector (&rows)[lanes]) {
  Vector pairs[lanes], fours[lanes];
  for (int i = 0; i < lanes; i += 2) {
    pairs[i] = reinterpret_cast<Vector>(_mm512_unpacklo_ps(as_floats(rows[i]), as_floats(rows[i + 1])));
    pairs[i + 1] = reinterpret_cast<Vector>(_mm512_unpackhi_ps(as_floats(rows[i]), as_floats(rows[i + 1])));
  }
  for (int i = 0; i < lanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512 a = as_floats(pairs[i + j]), b = as_floats(pairs[i + j + 2]);
      fours[i + 2 * j] = reinterpret_cast<Vector>(_mm512_shuffle_ps(a, b, 0x44));
      fours[i + 2 * j + 1] = reinterpret_cast<Vector>(_mm512_shuffle_ps(a, b, 0xee));
    }
  }
  // fours[4 i + j] holds in its quarter q the word 4 q + j of the rows from 4 i on.
  for (int j = 0; j < 4; ++j) {
    const __m512 a = as_floats(fours[j]), b = as_floats(fours[4 + j]), c = as_floats(fours[8 + j]),
                 d = as_floats(fours[12 + j]);
    const __m512 ab_low = _mm512_shuffle_f32x4(a, b, 0x44), ab_high = _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd_low = _mm512_shuffle_f32x4(c, d, 0x44), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
    rows[j] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(ab_low, cd_low, 0x88));
    rows[4 + j] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(ab_low, cd_low, 0xdd));
    rows[8 + j] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(ab_high, cd_high, 0x88));
    rows[12 + j] = reinterpret_cast<Vector>(_mm512_shuffle_f32x4(ab_high, cd_high, 0xdd));
  }
}

// ---- 1x1 -------------------------------------------------------------------------------------------

// `count` elements, at most a vector of words, as words; the others are 0.
template <typename T>
BITFAST_INLINE Vector words_from(const T* source, int64_t count) {
  constexpr int64_t all = lanes * 4 / sizeof(T);
  if (count >= all) {
    return load(reinterpret_cast<const float*>(source));
  }
  T elements[all] = {};
  std::copy_n(source, count, elements);
  return load(reinterpret_cast<const float*>(elements));
}

// A word of a vector of columns, which adjoin in memory: of one row of the matrix of filters, or of two.
template <typename Count>
BITFAST_INLINE Vector word_of_rows(const float* source, int64_t, int64_t, Count count) {
  return load_up_to(source, count);
}

template <typename Count>
BITFAST_INLINE Vector word_of_rows(const BFloat16* source, int64_t row, int64_t left, Count count) {
  return pair_of_halves(halves_of(source, count), left > 1 ? halves_of(source + row, count) : _mm512_setzero_si512());
}

template <typename T>
void pack_pointwise_panel(const Filters<T>& filters, int64_t panel) {
  constexpr int64_t per_word = 4 / sizeof(T);
  float* target = filters.target + panel * filters.panel_words();
  for (int64_t half = 0; half < 2; ++half, target += lanes) {
    const int64_t first = panel * panel_columns + half * lanes;
    const int64_t columns = std::clamp<int64_t>(filters.columns() - first, 0, lanes);
    if (filters.turned) {
      for (int64_t word = 0; word < filters.words(); ++word) {
        const int64_t row = word * per_word;
        const T* source = filters.source + row * filters.in + first;
        store(
            target + word * panel_columns,
            row >= filters.out || columns == 0 ? Vector{}
                : columns == lanes ? word_of_rows(source, filters.in, filters.out - row, All{})
                                   : word_of_rows(source, filters.in, filters.out - row, columns));
      }
      continue;
    }
    for (int64_t word = 0; word < filters.words(); word += lanes) {
      Vector rows[lanes] = {};
      for (int64_t i = 0; i < columns; ++i) {
        rows[i] = words_from(filters.source + (first + i) * filters.in + word * per_word, filters.in - word * per_word);
      }
      transpose(rows);
      for (int64_t i = 0; i < lanes; ++i) {
        store(target + (word + i) * panel_columns, rows[i]);
      }
    }
  }
}

// ---- 3x3, after Winograd ---------------------------------------------------------------------------

typedef double Doubles __attribute__((vector_size(2 * vector_bytes)));

// G of three values.
BITFAST_INLINE void expand(Doubles a, Doubles b, Doubles c, Doubles (&result)[4]) {
  result[0] = a;
  result[1] = (a + b + c) * 0.5;
  result[2] = (a - b + c) * 0.5;
  result[3] = c;
}

// G g G' of the filters of an output channel and `count` input channels.
template <typename Count>
BITFAST_INLINE void transform_filters(
    const Filters<float>& filters, int64_t out, int64_t in, Count count, Vector (&result)[positions]) {
  const auto tap = [&](int row, int column) {
    const int place = filters.turned ? 8 - (3 * row + column) : 3 * row + column;
    return __builtin_convertvector(load_up_to(filters.source + (out * 9 + place) * filters.in + in, count), Doubles);
  };
  Doubles half[3][4];
  for (int j = 0; j < 3; ++j) {
    expand(tap(0, j), tap(1, j), tap(2, j), half[j]);
  }
  for (int i = 0; i < 4; ++i) {
    Doubles row[4];
    expand(half[0][i], half[1][i], half[2][i], row);
    for (int j = 0; j < 4; ++j) {
      result[4 * i + j] = __builtin_convertvector(row[j], Vector);
    }
  }
}

// The 16 positions of a panel lie one after the other.
inline void pack_squares_panel(const Filters<float>& filters, int64_t panel) {
  float* target = filters.target + panel * positions * filters.panel_words();
  for (int64_t half = 0; half < 2; ++half, target += lanes) {
    const int64_t first = panel * panel_columns + half * lanes;
    const int64_t columns = std::clamp<int64_t>(filters.columns() - first, 0, lanes);
    if (filters.turned) {
      for (int64_t word = 0; word < filters.words(); ++word) {
        Vector all[positions] = {};
        if (word < filters.out && columns > 0) {
          transform_filters(filters, word, first, columns, all);
        }
        for (int64_t p = 0; p < positions; ++p) {
          store(target + p * filters.panel_words() + word * panel_columns, all[p]);
        }
      }
      continue;
    }
    for (int64_t word = 0; word < filters.words(); word += lanes) {
      Vector all[positions][lanes] = {};
      for (int64_t i = 0; i < columns; ++i) {
        Vector of_filter[positions];
        transform_filters(filters, first + i, word, filters.in - word, of_filter);
        for (int64_t p = 0; p < positions; ++p) {
          all[p][i] = of_filter[p];
        }
      }
      for (int64_t p = 0; p < positions; ++p) {
        transpose(all[p]);
        for (int64_t i = 0; i < lanes; ++i) {
          store(target + p * filters.panel_words() + (word + i) * panel_columns, all[p][i]);
        }
      }
    }
  }
}
