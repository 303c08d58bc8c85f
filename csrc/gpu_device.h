// The primitives of gpu.h on a GPU. Names of instructions and their rules: NVIDIA's "PTX ISA".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BITFAST_GPU __device__ __forceinline__

namespace bitfast::gpu {

// ---- threads ---------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory.
BITFAST_GPU unsigned char* shared_memory() { return dynamic_shared_memory; }

BITFAST_GPU uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

BITFAST_GPU void sync_block() { __syncthreads(); }

// The same; returns whether the condition holds for any thread of the block.
BITFAST_GPU bool sync_block_or(bool condition) { return __syncthreads_or(condition) != 0; }

BITFAST_GPU void sync_warp() { __syncwarp(); }

// Synchronizes `threads` threads of the block that name the same barrier, 1 to 15.
BITFAST_GPU void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Synchronizes all threads of the cluster; what they wrote to shared memory is seen by all.
BITFAST_GPU void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same, without order among accesses of memory, for which the whole GPU would be waited for; barriers that have been
// initialised and fenced are there.
BITFAST_GPU void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
}

// The number of the block in its cluster.
BITFAST_GPU int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Lets blocks of the next launch begin, if it may overlap with this one, as soon as all blocks have called this and there
// is room for them.
BITFAST_GPU void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the launch before this one, with which it overlaps, has ended; the thread sees all that it has written, but
// not through load_16 and its like.
BITFAST_GPU void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of the warp call it.
BITFAST_GPU float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// The same number, which all lanes of the warp have: the compiler may keep it for all of them together.
BITFAST_GPU int same_in_warp(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// ---- global and shared memory ----------------------------------------------------------------------------------------

// Memory that is read once: it is not to displace anything from the L1 cache.
BITFAST_GPU uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Memory that nobody writes during the launch, and that other threads of the block read too.
BITFAST_GPU uint4 load_16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
BITFAST_GPU uint2 load_8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
BITFAST_GPU uint32_t load_4(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }
BITFAST_GPU uint32_t load_2(const void* p) { return __ldg(static_cast<const uint16_t*>(p)); }

// Memory that this launch writes too, or one that it overlaps with.
BITFAST_GPU uint2 load_written_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
BITFAST_GPU uint4 load_written_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

BITFAST_GPU void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
BITFAST_GPU void store_8(void* p, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
BITFAST_GPU void store_4(void* p, uint32_t v) { asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }

BITFAST_GPU uint4 load_shared_16(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(p))
               : "memory");
  return v;
}
BITFAST_GPU uint2 load_shared_8(const void* p) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared_address(p)) : "memory");
  return v;
}
BITFAST_GPU void store_shared_16(void* p, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// The shared memory of another block of the cluster, at the address that it has in this one.
BITFAST_GPU uint32_t address_in_block(const void* p, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
BITFAST_GPU float2 load_remote(const float2* p, int rank) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address_in_block(p, rank))
               : "memory");
  return v;
}
BITFAST_GPU void store_remote(float* p, int rank, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_block(p, rank)), "f"(v) : "memory");
}

// ---- asynchronous copies, by the thread (cp.async) ---------------------------------------------------------------------

// Begins a copy of 16 bytes from global to shared memory. The thread itself sees them after wait_copies, others after
// a barrier that follows it.
BITFAST_GPU void copy_16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Ends a group of copies.
BITFAST_GPU void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of the groups that the thread committed are still on their way.
template <int groups>
BITFAST_GPU void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ---- asynchronous copies, in bulk, and their barriers (capability 90) --------------------------------------------------

using Barrier = uint64_t;  // in shared memory

BITFAST_GPU void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the thread has initialised its barriers, before a sync_block or sync_cluster.
BITFAST_GPU void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
BITFAST_GPU void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier of a block of the cluster, given by the address that it has in this one. It orders no memory, for which
// the whole GPU would be waited for.
BITFAST_GPU void arrive_remote(Barrier* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_block(barrier, rank)) : "memory");
}
// Arrives, and announces so many bytes of bulk copies, which the phase waits for too.
BITFAST_GPU void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first phase, 1 for the second, ...
BITFAST_GPU void wait_for(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again_%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again_%=;\n\t}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Sends a number to the shared memory of a block of the cluster, to whose barrier that is four bytes. Both are given by
// the addresses that they have in this block.
BITFAST_GPU void send_remote(float* p, int rank, float v, Barrier* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in_block(p, rank)),
               "r"(__float_as_uint(v)), "r"(address_in_block(barrier, rank))
               : "memory");
}
// As wait_for, where other blocks of the cluster send.
BITFAST_GPU void wait_for_remote(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again_%=:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again_%=;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Copies from global to shared memory; addresses and bytes are multiples of 16.
BITFAST_GPU void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The same, to all blocks of the cluster that `blocks` has a bit for, at the address that it has in this one; each of
// their barriers counts the bytes.
BITFAST_GPU void bulk_load_to(uint16_t blocks, void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}
// Copies from shared to global memory; the thread that began it waits for it.
BITFAST_GPU void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
BITFAST_GPU void commit_bulk_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most `groups` of the thread's groups of stores have yet to read shared memory.
template <int groups>
BITFAST_GPU void wait_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}
// The same, until they are done.
template <int groups>
BITFAST_GPU void wait_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(groups) : "memory");
}
// Fetches global memory into the L2 cache; address and bytes are multiples of 16.
BITFAST_GPU void prefetch_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// Between ordinary accesses of shared memory and those of bulk copies or of wgmma: by the threads that made the former,
// before the barrier that orders them, or by all that multiply, after it.
BITFAST_GPU void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- numbers ---------------------------------------------------------------------------------------------------------

BITFAST_GPU float float_from_bits(uint32_t v) { return __uint_as_float(v); }
BITFAST_GPU uint32_t bits_of(float v) { return __float_as_uint(v); }

BITFAST_GPU float to_float(float v) { return v; }
BITFAST_GPU float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
BITFAST_GPU float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }

// Rounded to the nearest number of T.
template <typename T>
BITFAST_GPU T rounded(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  } else {
    return {__half_as_ushort(__float2half_rn(v))};
  }
}

// The first and the second of two numbers of 16 bits in a word.
template <typename T>
BITFAST_GPU float low_number(uint32_t word) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(word << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  }
}
template <typename T>
BITFAST_GPU float high_number(uint32_t word) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(word & 0xffff0000u);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}
template <typename T>
BITFAST_GPU uint32_t pack_two(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
// The same, with 0 for what is less; a NaN stays one.
template <typename T>
BITFAST_GPU uint32_t pack_two_relu(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
// The larger of each of two pairs; a NaN wins.
template <typename T>
BITFAST_GPU uint32_t maximum_of_two(uint32_t a, uint32_t b) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  }
  return word;
}

BITFAST_GPU float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// 1 / sqrt(v), each step rounded to the nearest.
BITFAST_GPU float reciprocal_sqrt(float v) { return __frcp_rn(__fsqrt_rn(v)); }

// Keeps the compiler from recomputing a value instead of holding it in registers.
BITFAST_GPU void keep_packed(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
template <typename T>
BITFAST_GPU T* keep_address(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
// The same number, of which the compiler knows nothing: what follows from it is computed where it is needed, instead of
// once before a loop that has no registers to spare.
template <typename T>
BITFAST_GPU T not_before_here(T v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- matrices --------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
BITFAST_GPU void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The reverse: writes them to shared memory (capability 90).
BITFAST_GPU void store_matrices(void* row, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// c (16x8) += a (16x16) * b (16x8), by a warp.
template <typename T>
BITFAST_GPU void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define BITFAST_MMA(type)                                                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                 \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                           \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, BFloat16>) {
    BITFAST_MMA("bf16");
  } else {
    BITFAST_MMA("f16");
  }
#undef BITFAST_MMA
}

}  // namespace bitfast::gpu

#include "gpu_products.h"
