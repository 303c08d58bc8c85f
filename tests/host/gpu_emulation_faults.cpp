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
  wrong_row_step,
  misaligned_matrix,
  matrix_past_the_end,
  different_matrices,
  no_fence_before_product,
  product_not_begun,
  no_wait_for_product,
  matrix_overwritten_too_early,
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

// The same, where the blocks send each other their numbers.
struct Send {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 64, min_blocks = 1, capability = 90;
  static BITFAST_GPU void run(const Arguments& a) {
    auto* numbers = reinterpret_cast<float*>(shared_memory());
    auto* barrier = reinterpret_cast<Barrier*>(numbers + threads);
    const int at = static_cast<int>(threadIdx.x), rank = cluster_rank();
    if (at == 0) {
      init_barrier(barrier, 1);
      fence_barrier_init();
      if (a.fault != Fault::barrier_without_arrival) arrive_and_expect(barrier, 4 * threads);
    }
    if (a.fault != Fault::no_cluster_barrier) sync_cluster();
    send_remote(numbers + at, 1 - rank, 2 * a.x[blockIdx.x * threads + at], barrier);
    if (a.fault != Fault::no_wait_for_copy) wait_for_remote(barrier, 0);
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

struct MatrixArguments {
  const BFloat16 *a, *b;  // 64 rows of 32 numbers
  float* c;               // 64 rows of 64
  Fault fault;
};

// c = a * b (transposed), by a group of warps that multiply in shared memory.
struct Multiply {
  using Arguments = MatrixArguments;
  static constexpr int threads = 128, min_blocks = 1, capability = 90;
  static constexpr int k_step = 64 * 16, matrix_bytes = 4 * k_step;

  static BITFAST_GPU void run(const Arguments& args) {
    unsigned char* a = shared_memory();
    unsigned char* b = a + matrix_bytes;
    const int at = static_cast<int>(threadIdx.x), lane = at % 32;
    const Fault fault = args.fault;
    for (int i = at; i < 64 * 4; i += threads) {  // 8 numbers of a row
      const int64_t from = i / 4 * 32 + i % 4 * 8;
      store_shared_16(a + i % 4 * k_step + i / 4 * 16, load_16(args.a + from));
      store_shared_16(b + i % 4 * k_step + i / 4 * 16, load_16(args.b + from));
    }
    if (fault != Fault::no_fence_before_product) fence_async_proxy();
    sync_block();
    float sums[1][8][4] = {};
    if (fault != Fault::product_not_begun) begin_products(sums);
    const int row_step = fault == Fault::wrong_row_step ? 256 : 128;
    const int skew = fault == Fault::misaligned_matrix ? 8 : fault == Fault::matrix_past_the_end ? matrix_bytes : 0;
    const int own = fault == Fault::different_matrices && at == 7 ? 16 : 0;
    for (int k = 0; k < 2; ++k) {
      const MatrixPlace left = matrix_at(a + 2 * k * k_step, k_step, row_step);
      multiply_add_64x64x16<BFloat16>(sums[0], left, matrix_at(b + 2 * k * k_step + skew + own, k_step, 128));
    }
    commit_products();
    sync_block();
    if (fault == Fault::matrix_overwritten_too_early) store_shared_16(a + at * 16, make_uint4(0, 0, 0, 0));
    if (fault != Fault::no_wait_for_product) wait_products(sums);
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int row = at / 32 * 16 + lane / 4 + i / 2 * 8, column = 8 * j + lane % 4 * 2 + i % 2;
        args.c[row * 64 + column] = sums[0][j][i];
      }
    }
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
BITFAST_ENTRY const char* send_blocks(const float* x, float* y, int fault) {
  return launch<Send>({4, 2, 264}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* double_in_bulk(const float* x, float* y, int fault) {
  return launch<Double>({4, 1, 520}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* double_own(const float* x, float* y, int fault) {
  return launch<DoubleOwn>({2, 1, 512}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* multiply(const BFloat16* a, const BFloat16* b, float* c, int fault) {
  return launch<Multiply>({1, 1, 2 * Multiply::matrix_bytes}, {a, b, c, static_cast<Fault>(fault)}, nullptr);
}
