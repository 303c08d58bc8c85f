// The activations and their derivatives, on vectors.
// Included once per instruction set, after vectors.h.

// e^x = scale + scale * rest, with scale a power of two and rest = e^r - 1 for |r| <= ln(2)/2. Where e^x
// leaves the range of float32 the nearest value inside it is used.
struct Exponential {
  Vector scale, rest;
};

BITFAST_INLINE Exponential exponential(Vector x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23
  const Vector shifted = x * 1.44269504f + round_to_integer;
  const Vector n = shifted - round_to_integer;
  // ln(2) in two parts, so that n times the first is exact.
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Taylor's series; the first term that is left out is below 2^-25.
  Vector series = all(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  const Integers exponent = __builtin_convertvector(n, Integers) + 127;
  return {reinterpret_cast<Vector>(exponent << 23), series * (r * r) + r};
}

BITFAST_INLINE Vector exp(Vector x) {
  const Exponential e = exponential(x);
  return e.scale * e.rest + e.scale;
}

// e^x - 1, without the cancellation near 0.
BITFAST_INLINE Vector exp_minus_1(Vector x) {
  const Exponential e = exponential(x);
  return e.scale * e.rest + (e.scale - 1.0f);
}

// The standard normal distribution: P(X <= x), and its density.
struct Normal {
  Vector probability, density;
};

BITFAST_INLINE Normal normal(Vector x) {
  // P(X <= -z) = erfc(z / sqrt(2)) / 2, and erfc(y) exp(y^2) is a polynomial in t = 2.5 / (2.5 + y) to
  // within 1e-8 of itself for 0 <= y <= 6.5 (least squares of relative errors on Chebyshev points).
  const Vector y = absolute(x) * 0.707106781f;
  const Vector t = 2.5f / (2.5f + y);
  Vector p = all(0.010849093386f);
  p = p * t + 0.023874221955f;
  p = p * t - 0.300484190656f;
  p = p * t + 0.599596180248f;
  p = p * t - 0.346135619069f;
  p = p * t + 0.423143100649f;
  p = p * t + 0.121618404436f;
  p = p * t + 0.243954056543f;
  p = p * t + 0.223469044768f;
  p = p * t + 1.15717425e-4f;
  const Vector e = exp(x * x * -0.5f);
  const Vector tail = p * e * 0.5f;
  return {choose(x < 0.0f, tail, 1.0f - tail), e * 0.398942280f};
}

// gelu_new is x times the logistic function of this.
BITFAST_INLINE Vector gelu_new_argument(Vector x) {
  return x * (1.595769122f + 0.071354816f * x * x);
}

BITFAST_INLINE Vector logistic(Vector x) {
  return 1.0f / (1.0f + exp(-x));
}

// The derivative of the logistic function, without the cancellation where that is close to 1.
BITFAST_INLINE Vector logistic_slope(Vector x) {
  const Vector e = exp(-absolute(x));
  const Vector s = 1.0f / (1.0f + e);
  return e * s * s;
}

constexpr float selu_scale = 1.0507009873554805f;
constexpr float selu_alpha = 1.6732632423543772f;

template <Activation activation>
BITFAST_INLINE Vector activated(Vector x) {
  if constexpr (activation == Activation::relu) {
    return 0.0f > x ? Vector{} : x;  // NaN stays NaN
  } else if constexpr (activation == Activation::gelu) {
    return x * normal(x).probability;
  } else if constexpr (activation == Activation::gelu_new) {
    return x * logistic(gelu_new_argument(x));
  } else if constexpr (activation == Activation::selu) {
    return choose(x <= 0.0f, exp_minus_1(x) * selu_alpha, x) * selu_scale;  // NaN stays NaN
  } else {
    return x;
  }
}

template <Activation activation>
BITFAST_INLINE Vector derivative_at(Vector x) {
  if constexpr (activation == Activation::relu) {
    return choose(x > 0.0f, all(1.0f), Vector{});
  } else if constexpr (activation == Activation::gelu) {
    const Normal n = normal(x);
    return n.probability + x * n.density;
  } else if constexpr (activation == Activation::gelu_new) {
    const Vector u = gelu_new_argument(x);
    return logistic(u) + x * logistic_slope(u) * (1.595769122f + 0.214064448f * x * x);
  } else if constexpr (activation == Activation::selu) {
    return choose(x > 0.0f, all(selu_scale), exp(x) * (selu_scale * selu_alpha));
  } else {
    return all(1.0f);
  }
}
