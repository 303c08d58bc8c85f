// Includes BITFAST_LOOPS once per instruction set: in bitfast::baseline, bitfast::avx2 and bitfast::avx512, or in
// those that BITFAST_SETS names, a sum of the numbers in instruction_sets.h, which says how to use this.
//
// BITFAST_OP is the op's namespace, whose names the loops use. Whatever else they need from outside must have been
// included before.

#ifndef BITFAST_SETS
#define BITFAST_SETS BITFAST_BASELINE + BITFAST_AVX2 + BITFAST_AVX512
#endif

#if (BITFAST_SETS) & BITFAST_BASELINE
namespace bitfast::baseline {
constexpr int vector_bytes = 16;
using namespace bitfast::BITFAST_OP;
#include BITFAST_LOOPS
}  // namespace bitfast::baseline
#endif

#if BITFAST_X86 && (BITFAST_SETS) & BITFAST_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
namespace bitfast::avx2 {
constexpr int vector_bytes = 32;
using namespace bitfast::BITFAST_OP;
#include BITFAST_LOOPS
}  // namespace bitfast::avx2
#pragma GCC pop_options
#endif

#if BITFAST_X86 && (BITFAST_SETS) & BITFAST_AVX512
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace bitfast::avx512 {
constexpr int vector_bytes = 64;
using namespace bitfast::BITFAST_OP;
#include BITFAST_LOOPS
}  // namespace bitfast::avx512
#pragma GCC pop_options
#endif

#if BITFAST_X86 && (BITFAST_SETS) & BITFAST_AVX512_BF16
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace bitfast::avx512_bf16 {
constexpr int vector_bytes = 64;
using namespace bitfast::BITFAST_OP;
#include BITFAST_LOOPS
}  // namespace bitfast::avx512_bf16
#pragma GCC pop_options
#endif

#undef BITFAST_LOOPS
#undef BITFAST_OP
#undef BITFAST_SETS
