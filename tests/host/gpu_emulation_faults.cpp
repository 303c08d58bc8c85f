// Small kernels for tests/test_gpu_emulation.py: each is right, or wrong in the one way that its number names.
#include "gpu.h"

namespace bitfast::gpu {
namespace {

enum class Fault : int {
  none,
  no_barrier_before_read,
  no_barrier_before_overwrite,
  no_cluster_barrier,
  shared_past_the_end,
  global_past_the_end,
  misaligned_bulk_copy,
  odd_bulk_copy,
  uninitialised_barrier,
  barrier_without_arrival,
  too_many_arrivals,
  no_wait_for_copy,
  no_fence_before_bulk_store,
  store_left_behind,
  barrier_that_some_skip,
};

struct Arguments {
  const float* x;  // a number for each thread
  float* y;
  Fault fault;
};

// Each thread of a block takes the number of the thread opposite to it, twice over.
struct Reverse {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 64, min_blocks = 1, capability = 80;
  static BITFAST_GPU void run(const Arguments& a) {
    auto* numbers = reinterpret_cast<float*>(shared_memory());
    const int at = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * threads;
    const int beyond = a.fault == Fault::global_past_the_end && at == 5 ? 256 : 0;  // the guard page
    numbers[at] = a.x[first + at + beyond];
    if (a.fault == Fault::barrier_that_some_skip && at == 3) return;
    if (a.fault != Fault::no_barrier_before_read) sync_block();
    const float opposite = numbers[threads - 1 - at];
    if (a.fault != Fault::no_barrier_before_overwrite) sync_block();
    numbers[at] = 2 * opposite;
    sync_block();
    if (a.fault == Fault::shared_past_the_end) store_shared_16(numbers + threads + 4 * at, make_uint4(0, 0, 0, 0));
    a.y[first + at] = numbers[at];
  }
};

// The same in a cluster: blocks swap their numbers.
struct Swap {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 64, min_blocks = 1, capability = 90;
  static BITFAST_GPU void run(const Arguments& a) {
    auto* numbers = reinterpret_cast<float*>(shared_memory());
    const int at = static_cast<int>(threadIdx.x), rank = cluster_rank();
    store_remote(numbers + at, 1 - rank, 2 * a.x[blockIdx.x * threads + at]);
    if (a.fault != Fault::no_cluster_barrier) sync_cluster();
    a.y[blockIdx.x * threads + at] = numbers[at];
  }
};

// Doubles numbers that a bulk copy brings and a bulk copy takes away.
struct Double {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 64, min_blocks = 1, capability = 90;
  static BITFAST_GPU void run(const Arguments& a) {
    unsigned char* data = shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(data + 512);
    const int at = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * threads;
    const uint32_t bytes = 4 * threads;
    if (at == 0) {
      if (a.fault != Fault::uninitialised_barrier) init_barrier(barrier, 1);
      fence_barrier_init();
      if (a.fault != Fault::barrier_without_arrival) arrive_and_expect(barrier, bytes);
      if (a.fault == Fault::too_many_arrivals) arrive(barrier);
      const int skew = a.fault == Fault::misaligned_bulk_copy ? 4 : 0;
      bulk_load(data + skew, a.x + first, a.fault == Fault::odd_bulk_copy ? bytes - 4 : bytes, barrier);
    }
    sync_block();
    if (a.fault != Fault::no_wait_for_copy) wait_for(barrier, 0);
    if (at < threads / 4) {
      float numbers[4];
      unpack<float>(load_shared_16(data + 16 * at), numbers);
      for (float& number : numbers) number *= 2;
      store_shared_16(data + 16 * at, pack<float>(numbers));
    }
    if (a.fault != Fault::no_fence_before_bulk_store) fence_async_proxy();
    sync_block();
    if (at == 0) {
      bulk_store(a.y + first, data, bytes);
      if (a.fault == Fault::store_left_behind) return;
      commit_bulk_stores();
      wait_bulk_stores<0>();
    }
  }
};

// Doubles numbers that each thread copies for itself.
struct DoubleOwn {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 32, min_blocks = 1, capability = 80;
  static BITFAST_GPU void run(const Arguments& a) {
    unsigned char* mine = shared_memory() + 16 * threadIdx.x;
    const int64_t first = 4 * (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x);
    copy_16_async(mine, a.x + first);
    commit_copies();
    if (a.fault != Fault::no_wait_for_copy) wait_copies<0>();
    float numbers[4];
    unpack<float>(load_shared_16(mine), numbers);
    for (float& number : numbers) number *= 2;
    store_16(a.y + first, pack<float>(numbers));
  }
};

}  // namespace
}  // namespace bitfast::gpu

using namespace bitfast::gpu;

BITFAST_ENTRY const char* reverse(const float* x, float* y, int fault) {
  return launch<Reverse>({4, 1, 256}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* swap_blocks(const float* x, float* y, int fault) {
  return launch<Swap>({4, 2, 256}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* double_in_bulk(const float* x, float* y, int fault) {
  return launch<Double>({4, 1, 520}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* double_own(const float* x, float* y, int fault) {
  return launch<DoubleOwn>({2, 1, 512}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
