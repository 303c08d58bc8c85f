// What the loops of convolutions share: products of words, the norm of their input, Winograd's input.
// Included once per instruction set with 16 lanes, inside its namespace, after vectors.h and activation_vectors.h.
#include "convolution_words_loops.h"

// ---- products ----------------------------------------------------------------------------------------

// total + a b, in each word: of one float32, or of two bfloat16.
template <typename T>
BITFAST_INLINE Vector multiply_add(Vector total, Vector a, Vector b) {
  if constexpr (sizeof(T) == 4) {
    return total + a * b;
  } else {
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(total), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
}

// ---- the norm of the input -----------------------------------------------------------------------------

struct Normalization {
  Vector center, scale, shift;

  template <Activation activation>
  BITFAST_INLINE Vector apply(Vector x) const {
    return activated<activation>((x - center) * scale + shift);
  }
};

// From arrays with a number for each image and channel of the input.
template <typename Work, typename Count>
BITFAST_INLINE Normalization normalization_from(const Work& work, int64_t image, int64_t channel, Count count) {
  const int64_t at = image * work.in_channels + channel;
  return {load_up_to(work.center + at, count), load_up_to(work.scale + at, count), load_up_to(work.shift + at, count)};
}

// Calls function(activation, normalizes) with both as compile-time constants.
template <typename Work, typename Function>
void dispatch_normalization(const Work& work, const Function& function) {
  if (work.center == nullptr) {
    return function(std::integral_constant<Activation, Activation::none>{}, std::false_type{});
  }
  dispatch_activation(work.activation, [&](auto activation) { function(activation, std::true_type{}); });
}

// ---- Winograd's input ----------------------------------------------------------------------------------

// 3x3 filters that are padded with one zero on each side: squares of 2x2 pixels are computed from 4x4.
// The rows of the input that a task needs, one chunk of channels, normalized, with zeros around the image.
template <Activation activation, bool normalizes, typename Work, typename Task, typename Count>
void fill_rows(const Work& work, const Task& task, int64_t channel, Count count, float* target) {
  const int64_t across = 2 * squares_in_row(work.width) + 2;
  const int64_t first = 2 * task.first_row - 1, last = first + 2 * task.rows + 2;
  Normalization norm;
  if constexpr (normalizes) {
    norm = normalization_from(work, task.image, channel, count);
  }
  for (int64_t y = first; y < last; ++y, target += across * lanes) {
    const bool inside = y >= 0 && y < work.in_height;
    const float* row = work.x + ((task.image * work.in_height + y) * work.in_width - 1) * work.in_channels + channel;
    for (int64_t x = 0; x < across; ++x) {
      Vector value{};
      if (inside && x >= 1 && x <= work.in_width) {
        value = load_up_to(row + x * work.in_channels, count);
        if constexpr (normalizes) {
          value = norm.template apply<activation>(value);
        }
      }
      store(target + x * lanes, value);
    }
  }
}

// B' of a column of four values.
struct Column {
  Vector v[4];

  BITFAST_INLINE static Column of(const float* top, int64_t stride) {
    const Vector a = load(top), b = load(top + stride), c = load(top + 2 * stride), d = load(top + 3 * stride);
    return {{a - c, b + c, c - b, b - d}};
  }
};

// B' d B for the squares of some rows of a chunk of channels: for each, 16 vectors go to `position` words apart from
// place() on.
template <typename Place>
BITFAST_INLINE void transform_input(
    const float* rows, int64_t row_count, int64_t across, int64_t position, const Place& place) {
  const int64_t stride = (2 * across + 2) * lanes;
  for (int64_t y = 0; y < row_count; ++y) {
    const float* top = rows + 2 * y * stride;
    Column a = Column::of(top, stride), b = Column::of(top + lanes, stride);
    for (int64_t x = 0; x < across; ++x) {
      const Column c = Column::of(top + (2 * x + 2) * lanes, stride);
      const Column d = Column::of(top + (2 * x + 3) * lanes, stride);
      float* target = place();
      for (int i = 0; i < 4; ++i, target += 4 * position) {
        store(target, a.v[i] - c.v[i]);
        store(target + position, b.v[i] + c.v[i]);
        store(target + 2 * position, c.v[i] - b.v[i]);
        store(target + 3 * position, b.v[i] - d.v[i]);
      }
      a = c;
      b = d;
    }
  }
}
