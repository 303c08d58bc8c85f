// Words of two bfloat16.
// Included once per instruction set with 16 lanes, inside its namespace, after vectors.h.

// The bits of a vector of bfloat16, each in a word.
template <typename Count>
BITFAST_INLINE __m512i halves_of(const BFloat16* pixel, Count count) {
  __m256i bits;
  if constexpr (std::is_same_v<Count, All>) {
    bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixel));
  } else {
    bits = _mm256_maskz_loadu_epi16((1u << count) - 1, pixel);
  }
  return _mm512_cvtepu16_epi32(bits);
}

// Words of two bfloat16, of which each has one in its lower half.
BITFAST_INLINE Vector pair_of_halves(__m512i first, __m512i second) {
  return reinterpret_cast<Vector>(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
