// Means and sums of squared differences, without cancellation.
// Included once per instruction set, after vectors.h.
//
// A short piece is read twice while it lies in the nearest cache: for its mean, then for the squares of what
// differs from it. Pieces are joined as Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm
// for Computing Sample Variances", 1979, say, in float64.

// Of a set of values: their mean, and the sum of the squares of their differences from it.
struct Moments {
  double mean, squares;
};

// Joins the moments of `count` values, seen so far, with those of `added` more.
BITFAST_INLINE void join(Moments& seen, double count, Moments more, double added) {
  const double part = added / (count + added);
  const double difference = more.mean - seen.mean;
  seen.mean += difference * part;
  seen.squares += more.squares + difference * difference * count * part;
}

// The moments of adjacent values.
template <typename T>
Moments moments_of(const T* values, int64_t count) {
  constexpr int64_t piece = 512;
  Moments seen{0, 0};
  for (int64_t start = 0; start < count; start += piece) {
    const T* x = values + start;
    const int64_t n = std::min(piece, count - start);
    const int64_t whole = n / lanes * lanes;
    const int64_t left_over = n - whole;
    Vector sum{};
    for (int64_t i = 0; i < whole; i += lanes) {
      sum += load(x + i);
    }
    double total = sum_of(sum);
    for (int64_t i = whole; i < n; ++i) {
      total += static_cast<float>(x[i]);
    }
    const float center = static_cast<float>(total / n);
    Vector differences{}, squares{};
    for (int64_t i = 0; i < whole; i += lanes) {
      const Vector d = load(x + i) - center;
      differences += d;
      squares += d * d;
    }
    double rest = sum_of(differences), rest_squares = sum_of(squares);
    for (int64_t i = n - left_over; i < n; ++i) {
      const float d = static_cast<float>(x[i]) - center;
      rest += d;
      rest_squares += d * d;
    }
    // The error of the rounded center.
    const double shift = rest / n;
    join(seen, start, {center + shift, rest_squares - rest * shift}, n);
  }
  return seen;
}

// Pixels that are read twice while they lie in the nearest cache.
constexpr int64_t few_pixels = 32;

// Adds the moments of at most few_pixels pixels of some vectors of channels to those of the `seen` pixels before:
// of x, or of x + residual, which goes to `total`.
template <typename T, bool adds, int vectors, typename Count>
void strip_moments(
    const T* x, const T* residual, T* total, int64_t stride, int64_t pixels, Count count, int64_t seen,
    double* means, double* all_squares) {
  Vector sum[vectors] = {};
  for (int64_t i = 0; i < pixels; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = i * stride + v * lanes;
      Vector value = load_up_to(x + at, count);
      if constexpr (adds) {
        value = rounded_to(total, value + load_up_to(residual + at, count));
        store_up_to(total + at, value, count);
      }
      sum[v] += value;
    }
  }
  const T* source = adds ? total : x;
  float centers[vectors * lanes], rests[vectors * lanes], squares[vectors * lanes];
  Vector center[vectors], rest[vectors] = {}, square[vectors] = {};
  for (int v = 0; v < vectors; ++v) {
    center[v] = sum[v] / static_cast<float>(pixels);
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const Vector d = load_up_to(source + i * stride + v * lanes, count) - center[v];
      rest[v] += d;
      square[v] += d * d;
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store(centers + v * lanes, center[v]);
    store(rests + v * lanes, rest[v]);
    store(squares + v * lanes, square[v]);
  }
  const double part = static_cast<double>(pixels) / (seen + pixels);
  const double weight = seen * part, inverse = 1.0 / pixels;
  const int64_t channels = (vectors - 1) * lanes + std::min<int64_t>(count, lanes);
  for (int64_t c = 0; c < channels; ++c) {
    // The error of the rounded center.
    const double shift = rests[c] * inverse;
    const double difference = centers[c] + shift - means[c];
    means[c] += difference * part;
    all_squares[c] += squares[c] - rests[c] * shift + difference * difference * weight;
  }
}
