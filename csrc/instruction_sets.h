// One source, compiled for several instruction sets; the best that the machine has is chosen when it runs.
//
// A file of loops has no include guard and stands in no namespace of its own. What includes it does
//
//   #define BITFAST_LOOPS "my_op_loops.h"
//   #define BITFAST_OP my_op
//   #include "each_instruction_set.h"
//
// and calls `choose(BITFAST_EACH(my_function))(arguments)`. Before the last line it may define BITFAST_SETS, for
// loops that are written for some sets only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

// GCC alone lets a region of a file be compiled for another instruction set with all that is in it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BITFAST_X86 1
#include <immintrin.h>
#else
#define BITFAST_X86 0
#endif

// What BITFAST_SETS is a sum of.
#define BITFAST_BASELINE 1
#define BITFAST_AVX2 2
#define BITFAST_AVX512 4
#define BITFAST_AVX512_BF16 8

namespace bitfast {

enum class InstructionSet { baseline, avx2, avx512 };

// The best set that this CPU has. As in torch, ATEN_CPU_CAPABILITY=default|avx2|avx512 can lower the choice, but not
// raise it; it is read once.
inline InstructionSet instruction_set() {
#if BITFAST_X86
  static const InstructionSet chosen = [] {
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* demanded = std::getenv("ATEN_CPU_CAPABILITY");
    const auto demands = [&](const char* name) { return demanded != nullptr && std::strcmp(demanded, name) == 0; };
    if (!has_avx2 || demands("default")) {
      return InstructionSet::baseline;
    }
    return has_avx512 && !demands("avx2") ? InstructionSet::avx512 : InstructionSet::avx2;
  }();
  return chosen;
#else
  return InstructionSet::baseline;
#endif
}

#if BITFAST_X86
#define BITFAST_EACH(...) baseline::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__
#else
#define BITFAST_EACH(...) baseline::__VA_ARGS__
#endif

template <typename Function>
Function* choose(Function* baseline) {
  return baseline;
}

template <typename Function>
Function* choose(Function* baseline, Function* avx2, Function* avx512) {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return avx512;
    case InstructionSet::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace bitfast
