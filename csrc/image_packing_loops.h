// The loop of image_packing that runs over pixels as Pillow keeps them: red, green, blue and a byte that is unused.
// Included once per instruction set, inside its namespace.

// Copies `count` pixels of three bytes that begin four bytes apart. Nothing past the last one is read or written.
inline void drop_fourth_bytes(const char* source, int64_t count, char* target) {
  int64_t i = 0;
#if BITFAST_X86 && defined(__AVX2__)
  // Four pixels at a time. The four bytes that are stored behind them are those of the next ones, which follow.
  const __m128i kept = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  for (; i + 6 <= count; i += 4) {
    const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i * 3), _mm_shuffle_epi8(pixels, kept));
  }
#endif
  for (; i + 1 < count; ++i) {
    std::memcpy(target + i * 3, source + i * 4, 4);
  }
  for (; i < count; ++i) {
    std::memcpy(target + i * 3, source + i * 4, 3);
  }
}
