// Vectors of float32, and how they are read from and written to memory. Included once per instruction set,
// inside its namespace, which says how many bytes a vector has; hence no include guard.
//
// These are the compiler's own vectors (GCC's vector extensions): arithmetic and comparisons go lane by
// lane, and the same source serves every width.

constexpr int lanes = vector_bytes / 4;

typedef float Vector __attribute__((vector_size(vector_bytes)));
typedef int32_t Integers __attribute__((vector_size(vector_bytes)));
typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));

#define BITFAST_INLINE inline __attribute__((always_inline))

BITFAST_INLINE Vector all(float value) {
  return value - Vector{};
}

BITFAST_INLINE Vector choose(Integers condition, Vector yes, Vector no) {
  return condition ? yes : no;
}

BITFAST_INLINE Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

BITFAST_INLINE Vector smaller(Vector a, Vector b) {
  return a < b ? a : b;
}

BITFAST_INLINE Vector absolute(Vector x) {
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(x) & 0x7fffffffu);
}

BITFAST_INLINE double sum_of(Vector x) {
  double total = 0;
  for (int i = 0; i < lanes; ++i) {
    total += x[i];
  }
  return total;
}

// ---- float32 ---------------------------------------------------------------------------------------

BITFAST_INLINE Vector load(const float* source) {
  Vector x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

BITFAST_INLINE void store(float* target, Vector x) {
  std::memcpy(target, &x, sizeof x);
}

// What store() leaves in memory.
BITFAST_INLINE Vector rounded_to(const float*, Vector x) {
  return x;
}

// ---- bfloat16 --------------------------------------------------------------------------------------

// GCC 12 makes several instructions of a plain conversion between widths, where AVX has one. (These are
// templates so that only the branch for the vectors at hand is compiled.)
template <typename Half>
BITFAST_INLINE Vector widened(Half bits) {
#if BITFAST_X86
  if constexpr (sizeof(Half) == 32) {
    return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)), 16));
  } else if constexpr (sizeof(Half) == 16) {
    return reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)), 16));
  }
#endif
  return reinterpret_cast<Vector>(__builtin_convertvector(bits, Bits) << 16);
}

// The lower halves of numbers below 2^16.
template <typename Wide>
BITFAST_INLINE HalfBits lower_halves(Wide bits) {
#if BITFAST_X86
  if constexpr (sizeof(Wide) == 64) {
    return reinterpret_cast<HalfBits>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
  } else if constexpr (sizeof(Wide) == 32) {
    const __m256i wide = reinterpret_cast<__m256i>(bits);
    return reinterpret_cast<HalfBits>(
        _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
#endif
  return __builtin_convertvector(bits, HalfBits);
}

// Rounds to nearest, ties to even; NaN stays NaN.
BITFAST_INLINE HalfBits narrowed(Vector x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Integers is_number = x == x;
  return lower_halves(is_number ? rounded : quiet);
}

BITFAST_INLINE Vector load(const BFloat16* source) {
  HalfBits bits;
  std::memcpy(&bits, source, sizeof bits);
  return widened(bits);
}

BITFAST_INLINE void store(BFloat16* target, Vector x) {
  const HalfBits bits = narrowed(x);
  std::memcpy(target, &bits, sizeof bits);
}

BITFAST_INLINE Vector rounded_to(const BFloat16*, Vector x) {
  return widened(narrowed(x));
}

// ---- the last few of a row -------------------------------------------------------------------------

// Reads `count` < lanes values; the other lanes are zero.
template <typename T>
BITFAST_INLINE Vector load_some(const T* source, int64_t count) {
#if BITFAST_X86
  if constexpr (lanes == 16 && sizeof(T) == 4) {
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps((1u << count) - 1, source));
  }
  if constexpr (lanes == 16 && sizeof(T) == 2) {
    return widened(reinterpret_cast<HalfBits>(_mm256_maskz_loadu_epi16((1u << count) - 1, source)));
  }
#endif
  T buffer[lanes] = {};
  std::copy_n(source, count, buffer);
  return load(buffer);
}

template <typename T>
BITFAST_INLINE void store_some(T* target, Vector x, int64_t count) {
#if BITFAST_X86
  if constexpr (lanes == 16 && sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(target, (1u << count) - 1, reinterpret_cast<__m512>(x));
  }
  if constexpr (lanes == 16 && sizeof(T) == 2) {
    return _mm256_mask_storeu_epi16(target, (1u << count) - 1, reinterpret_cast<__m256i>(narrowed(x)));
  }
#endif
  T buffer[lanes];
  store(buffer, x);
  std::copy_n(buffer, count, target);
}

// How many values of a vector count: all, known when this is compiled, or some.
using All = std::integral_constant<int64_t, lanes>;

template <typename T>
BITFAST_INLINE Vector load_up_to(const T* source, All) {
  return load(source);
}

template <typename T>
BITFAST_INLINE Vector load_up_to(const T* source, int64_t count) {
  return count >= lanes ? load(source) : load_some(source, count);
}

template <typename T>
BITFAST_INLINE void store_up_to(T* target, Vector x, All) {
  store(target, x);
}

template <typename T>
BITFAST_INLINE void store_up_to(T* target, Vector x, int64_t count) {
  if (count >= lanes) {
    store(target, x);
  } else {
    store_some(target, x, count);
  }
}

// Calls function(i, count) for each vector of a row: with All, and at last with what is left over.
template <typename Function>
BITFAST_INLINE void for_each_vector(int64_t length, const Function& function) {
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    function(i, All{});
  }
  if (i < length) {
    function(i, length - i);
  }
}
