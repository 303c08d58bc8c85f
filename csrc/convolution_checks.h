// What the convolutions on CPUs check: that their kernels can run here, and the layout of what they are given.
#pragma once

#include <string>

#include "instruction_sets.h"
#include "memory_format.h"

#if BITFAST_X86
#include <cpuid.h>
#endif

namespace bitfast {

// Why the kernels of a dtype cannot, or should not, run on this CPU; empty if they should.
inline std::string convolution_problem(bool bfloat16) {
#if BITFAST_X86
  if (instruction_set() != InstructionSet::avx512) {
    return "the CPU lacks AVX-512, or ATEN_CPU_CAPABILITY forbids it";
  }
  if (!bfloat16) {
    return "";
  }
  if (!__builtin_cpu_supports("avx512bf16")) {
    return "the CPU lacks AVX512_BF16";
  }
  static const bool has_amx = [] {  // asked once: virtual machines make this instruction slow
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1u) != 0;
  }();
  return has_amx ? "the CPU has AMX, with which oneDNN is faster" : "";
#else
  return "it is written for x86 CPUs and compiled by GCC";
#endif
}

inline bool is_dense_channels_last(const Tensor& x) {
  return x.numel() == 0 || is_channels_last(x) || (x.is_contiguous() && (x.size(1) == 1 || x.size(2) * x.size(3) == 1));
}

}  // namespace bitfast
