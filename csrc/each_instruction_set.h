// Includes BITFAST_LOOPS once per instruction set, in bitfast::baseline, bitfast::avx2 and bitfast::avx512.
// BITFAST_NAMES is put before them, to name what they use of other namespaces. See instruction_sets.h. Whatever the loops need from outside must have been included before.

namespace bitfast::baseline {
constexpr int vector_bytes = 16;
BITFAST_NAMES
#include BITFAST_LOOPS
}  // namespace bitfast::baseline

#if BITFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
namespace bitfast::avx2 {
constexpr int vector_bytes = 32;
BITFAST_NAMES
#include BITFAST_LOOPS
}  // namespace bitfast::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace bitfast::avx512 {
constexpr int vector_bytes = 64;
BITFAST_NAMES
#include BITFAST_LOOPS
}  // namespace bitfast::avx512
#pragma GCC pop_options
#endif

#undef BITFAST_LOOPS
#undef BITFAST_NAMES
