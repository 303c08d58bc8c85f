// Products of matrices in shared memory, on a GPU of capability 90 exactly: wgmma.
//
// Four warps, the first of which is a multiple of four, multiply together, all with the same matrices. What ordinary
// stores have written there must have been fenced (fence_async_proxy). These instructions are only in
// the machine code for sm_90a.
#pragma once

#include "gpu_device.h"

namespace bitfast::gpu {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BITFAST_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define BITFAST_SM90A(...) __trap()
#endif

// ---- registers ------------------------------------------------------------------------------------------------------

// The warps that multiply take registers that the others leave. All four warps call it; a multiple of 8, 24 to 240.
template <int registers>
BITFAST_GPU void take_registers() {
  BITFAST_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
BITFAST_GPU void leave_registers() {
  BITFAST_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// Where a matrix of 16-bit numbers lies: in parts of 8 rows of 16 bytes, one after the other.
using MatrixPlace = uint64_t;

// `k_step`: bytes to the part with the next 8 numbers of each row, `row_step`: to that with the next 8 rows; the
// address and the steps are multiples of 16.
BITFAST_GPU MatrixPlace matrix_at(const void* shared, int k_step, int row_step) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | static_cast<uint64_t>(k_step >> 4) << 16 |
         static_cast<uint64_t>(row_step >> 4) << 32;
}

// The same matrix, so many bytes further: a multiple of 16.
BITFAST_GPU MatrixPlace moved(MatrixPlace place, int bytes) { return place + static_cast<uint64_t>(bytes >> 4); }

// ---- products -------------------------------------------------------------------------------------------------------

// Lets the compiler neither move sums over this place nor copy them.
template <int units, int parts>
BITFAST_GPU void keep_sums(float (&c)[units][parts][4]) {
#pragma unroll
  for (int i = 0; i < units * parts * 4; ++i) asm volatile("" : "+f"(c[i / (parts * 4)][i / 4 % parts][i % 4])::"memory");
}

// Before products, whose sums nothing else may touch from here until they have been waited for.
template <int units, int parts>
BITFAST_GPU void begin_products(float (&c)[units][parts][4]) {
  keep_sums(c);
  BITFAST_SM90A("wgmma.fence.sync.aligned;" ::: "memory");
}

// Before more products with the same sums, while earlier ones are under way.
BITFAST_GPU void continue_products() { BITFAST_SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }

// Operands of the instruction: the sums by their numbers, and as they are named in C++.
#define BITFAST_NUMBERS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BITFAST_NUMBERS_64 BITFAST_NUMBERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BITFAST_NUMBERS_128 BITFAST_NUMBERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define BITFAST_SUMS_4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define BITFAST_SUMS_16(j) BITFAST_SUMS_4(j), BITFAST_SUMS_4(j + 1), BITFAST_SUMS_4(j + 2), BITFAST_SUMS_4(j + 3)
#define BITFAST_SUMS_32 BITFAST_SUMS_16(0), BITFAST_SUMS_16(4)
#define BITFAST_SUMS_64 BITFAST_SUMS_32, BITFAST_SUMS_16(8), BITFAST_SUMS_16(12)
#define BITFAST_SUMS_128 BITFAST_SUMS_64, BITFAST_SUMS_16(16), BITFAST_SUMS_16(20), BITFAST_SUMS_16(24), BITFAST_SUMS_16(28)
#define BITFAST_PRODUCT(type, columns, count, left, right, adding)                                                     \
  BITFAST_SM90A("{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, %" #adding                                                 \
                ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {"                     \
                BITFAST_NUMBERS_##count "}, %" #left ", %" #right ", adds, 1, 1, 0, 0;\n\t}"                            \
                : BITFAST_SUMS_##count                                                                                 \
                : "l"(a), "l"(b), "r"(static_cast<int>(adds)))
#define BITFAST_PRODUCT_OF(columns, count, left, right, adding)   \
  if constexpr (std::is_same_v<T, BFloat16>) {                    \
    BITFAST_PRODUCT("bf16", columns, count, left, right, adding); \
  } else {                                                        \
    BITFAST_PRODUCT("f16", columns, count, left, right, adding);  \
  }

// Begins c (64xN) = a (64x16) * b (Nx16, transposed), or adds that to c. N is 8 * parts: 64, 128 or 256. c[j] is a
// warp's part of columns 8 * j to 8 * j + 7, as of multiply_add_16x8x16: of the first warp the first 16 rows, of the
// second the next.
template <typename T, int parts>
BITFAST_GPU void multiply_add_64xNx16(float (&c)[parts][4], MatrixPlace a, MatrixPlace b, bool adds) {
  static_assert(parts == 8 || parts == 16 || parts == 32);
  if constexpr (parts == 8) {
    BITFAST_PRODUCT_OF(64, 32, 32, 33, 34)
  } else if constexpr (parts == 16) {
    BITFAST_PRODUCT_OF(128, 64, 64, 65, 66)
  } else {
    BITFAST_PRODUCT_OF(256, 128, 128, 129, 130)
  }
}
#undef BITFAST_PRODUCT_OF
#undef BITFAST_PRODUCT
#undef BITFAST_SUMS_128
#undef BITFAST_SUMS_64
#undef BITFAST_SUMS_32
#undef BITFAST_SUMS_16
#undef BITFAST_SUMS_4
#undef BITFAST_NUMBERS_128
#undef BITFAST_NUMBERS_64
#undef BITFAST_NUMBERS_32

// Ends a group of products.
BITFAST_GPU void commit_products() { BITFAST_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `groups` groups of products are under way; what earlier ones read may be overwritten then.
template <int groups>
BITFAST_GPU void wait_product_groups() {
  BITFAST_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// Waits for all groups of products; c holds their sums from here on.
template <int units, int parts>
BITFAST_GPU void wait_products(float (&c)[units][parts][4]) {
  wait_product_groups<0>();
  keep_sums(c);
}
#undef BITFAST_SM90A

}  // namespace bitfast::gpu
