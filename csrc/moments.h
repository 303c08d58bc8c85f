// Means and sums of squares that do not cancel. Included once per instruction set, after vectors.h.
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
    // What the rounding of the center was off by.
    const double shift = rest / n;
    join(seen, start, {center + shift, rest_squares - rest * shift}, n);
  }
  return seen;
}
