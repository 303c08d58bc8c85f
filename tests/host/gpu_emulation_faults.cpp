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
  different_matrices_of_warps,
  one_warp_does_not_multiply,
  sums_read_too_early,
  product_before_its_matrices,
  moved_too_far,
  moved_by_half_a_row,
  registers_of_three_warps,
  different_registers,
  matrices_of_the_wrong_lane,
  too_many_registers,
  copy_to_the_other_block_only,
  the_other_block_is_not_told,
  no_wait_for_launch_before,
  load_that_need_not_wait,
  no_fence_of_new_barriers,
  no_barrier_at_the_end,
  no_fence_after_barrier,
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
  const void* a;  // 64 rows of 64 numbers of 16 bits
  const void* b;  // 8 * parts rows
  float* c;       // 64 rows of 8 * parts
  int adds;       // to numbers that c holds
  Fault fault;
};

// c = a * b (transposed), or c += a * b, by a group of warps that multiply in shared memory, in two groups of products.
template <typename T, int parts>
struct Multiply {
  using Arguments = MatrixArguments;
  static constexpr int threads = 128, min_blocks = 1, capability = 90;
  static constexpr int columns = 8 * parts, left_step = 64 * 16, right_step = columns * 16;
  static constexpr int shared_bytes = 8 * (left_step + right_step);

  // The number of c that is number i of part j of a thread's sums.
  static BITFAST_GPU int place_of(int j, int i) {
    const int at = static_cast<int>(threadIdx.x), lane = at % 32;
    return (at / 32 * 16 + lane / 4 + i / 2 * 8) * columns + 8 * j + lane % 4 * 2 + i % 2;
  }

  static BITFAST_GPU void copy_matrix(unsigned char* to, const void* from, int rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * 8; i += threads) {  // 8 numbers of a row
      store_shared_16(to + (i % 8 * rows + i / 8) * 16, load_16(static_cast<const unsigned char*>(from) + 16 * i));
    }
  }

  static BITFAST_GPU void run(const Arguments& args) {
    unsigned char* a = shared_memory();
    unsigned char* b = a + 8 * left_step;
    const int at = static_cast<int>(threadIdx.x);
    const Fault fault = args.fault;
    copy_matrix(a, args.a, 64);
    copy_matrix(b, args.b, columns);
    if (fault != Fault::no_fence_before_product) fence_async_proxy();
    sync_block();
    float sums[1][parts][4];
    for (int j = 0; j < parts; ++j) {
      for (int i = 0; i < 4; ++i) sums[0][j][i] = args.c[place_of(j, i)];
    }
    if (fault != Fault::product_not_begun) begin_products(sums);
    const int row_step = fault == Fault::wrong_row_step ? 256 : 128;
    const int skew = fault == Fault::misaligned_matrix ? 8 : fault == Fault::matrix_past_the_end ? 3 * right_step : 0;
    const bool differs = fault == Fault::different_matrices ? at == 7 : at / 32 == 2;
    const bool is_own = fault == Fault::different_matrices || fault == Fault::different_matrices_of_warps;
    const MatrixPlace left = matrix_at(a, left_step, row_step);
    const MatrixPlace right = matrix_at(b + skew + (is_own && differs ? 16 : 0), right_step, 128);
    for (int k = 0; k < 4; ++k) {
      if (fault == Fault::one_warp_does_not_multiply && k == 3 && at / 32 == 1) continue;
      multiply_add_64xNx16<T>(
          sums[0], moved(left, 2 * k * left_step), moved(right, 2 * k * right_step), k > 0 || args.adds);
      if (k == 1) commit_products();
    }
    commit_products();
    if (fault == Fault::moved_too_far) moved(right, 8 * right_step);
    if (fault == Fault::moved_by_half_a_row) moved(right, 8);
    wait_product_groups<1>();
    sync_block();
    if (fault == Fault::matrix_overwritten_too_early) {
      store_shared_16(a + 4 * left_step + at * 16, make_uint4(0, 0, 0, 0));
    }
    const bool reads_early = fault == Fault::sums_read_too_early;
    if (!reads_early && fault != Fault::no_wait_for_product) wait_products(sums);
    for (int j = 0; j < parts; ++j) {
      for (int i = 0; i < 4; ++i) args.c[place_of(j, i)] = sums[0][j][i];
    }
    if (reads_early) wait_products(sums);
  }
};

// The same of a product whose right matrix a bulk copy brings.
struct MultiplyCopied {
  using Arguments = MatrixArguments;
  using Numbers = Multiply<BFloat16, 8>;
  static constexpr int threads = 128, min_blocks = 1, capability = 90, matrix_bytes = 2 * Numbers::right_step;
  static BITFAST_GPU void run(const Arguments& args) {
    unsigned char* b = shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(b + matrix_bytes);
    if (threadIdx.x == 0) {
      init_barrier(barrier, 1);
      fence_barrier_init();
    }
    sync_block();
    if (threadIdx.x == 0) {
      arrive_and_expect(barrier, matrix_bytes);
      bulk_load(b, args.b, matrix_bytes, barrier);
    }
    if (args.fault != Fault::product_before_its_matrices) wait_for(barrier, 0);
    float sums[1][8][4];
    begin_products(sums);
    const MatrixPlace place = matrix_at(b, Numbers::right_step, 128);
    multiply_add_64xNx16<BFloat16>(sums[0], place, place, false);
    commit_products();
    wait_for(barrier, 0);
    wait_products(sums);
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) args.c[Numbers::place_of(j, i)] = sums[0][j][i];
    }
  }
};

// The same of a matrix that other threads store and hand over by a barrier; those who multiply fence it.
struct MultiplyHandedOver {
  using Arguments = MatrixArguments;
  using Numbers = Multiply<BFloat16, 8>;
  static constexpr int threads = 256, min_blocks = 1, capability = 90, matrix_bytes = 2 * Numbers::right_step;
  static BITFAST_GPU void run(const Arguments& args) {
    const int at = static_cast<int>(threadIdx.x);
    unsigned char* b = shared_memory();
    auto* barrier = reinterpret_cast<Barrier*>(b + matrix_bytes);
    if (at == 0) {
      init_barrier(barrier, 4);
      fence_barrier_init();
    }
    sync_block();
    if (at >= 128) {
      for (int i = at - 128; i < matrix_bytes / 16; i += 128) {
        store_shared_16(b + 16 * i, load_16(static_cast<const unsigned char*>(args.b) + 16 * i));
      }
      sync_warp();
      if (at % 32 == 0) arrive(barrier);
      return;
    }
    wait_for(barrier, 0);
    if (args.fault != Fault::no_fence_after_barrier) fence_async_proxy();
    float sums[1][8][4];
    begin_products(sums);
    const MatrixPlace place = matrix_at(b, Numbers::right_step, 128);
    multiply_add_64xNx16<BFloat16>(sums[0], place, place, false);
    commit_products();
    wait_products(sums);
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) args.c[Numbers::place_of(j, i)] = sums[0][j][i];
    }
  }
};

// Doubles 64 numbers a block, through a ring of one place: half of what a block reads at a time is brought by the other
// block of the cluster, which must be told when the place is free. Two groups of warps take registers of a third.
struct Share {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 384, min_blocks = 1, capability = 90;
  static constexpr int rounds = 4, shared_bytes = 32 * 4 + 16;  // two rows of 16 numbers at a time
  static BITFAST_GPU void run(const Arguments& args) {
    auto* place = reinterpret_cast<float*>(shared_memory());
    auto* full = reinterpret_cast<Barrier*>(shared_memory() + 32 * 4);
    Barrier* empty = full + 1;
    const int at = static_cast<int>(threadIdx.x), rank = cluster_rank();
    const int first_block = static_cast<int>(blockIdx.x) - rank;
    if (at == 0) {
      init_barrier(full, 1);
      init_barrier(empty, 2);
      if (args.fault != Fault::no_fence_of_new_barriers) fence_barrier_init();
    }
    sync_cluster();
    if (at < 128) {
      leave_registers<80>();
      for (int round = 0; at == 0 && round < rounds; ++round) {
        wait_for_remote(empty, (round & 1) ^ 1);
        arrive_and_expect(full, 32 * 4);
        const auto blocks = static_cast<uint16_t>(args.fault == Fault::copy_to_the_other_block_only ? 2 >> rank : 3);
        // Row `round` of this block, for both.
        bulk_load_to(blocks, place + rank * 16, args.x + (first_block + rank) * 64 + round * 16, 16 * 4, full);
      }
    } else {
      if (args.fault == Fault::too_many_registers) {
        take_registers<216>();
      } else {
        take_registers<208>();
      }
      for (int round = 0; at / 32 == 4 && round < rounds; ++round) {
        wait_for(full, round & 1);
        const int lane = at % 32;
        if (lane < 16) args.y[blockIdx.x * 64 + round * 16 + lane] = 2 * place[rank * 16 + lane];
        const float other = place[(rank ^ 1) * 16 + lane % 16];
        if (other != args.x[(first_block + (rank ^ 1)) * 64 + round * 16 + lane % 16]) args.y[blockIdx.x * 64] = 0;
        sync_warp();
        if (lane != 0) continue;
        arrive(empty);
        if (args.fault != Fault::the_other_block_is_not_told) arrive_remote(empty, rank ^ 1);
      }
    }
    if (args.fault != Fault::no_barrier_at_the_end) sync_cluster();
  }
};

// Takes 16 rows of 16 numbers of 16 bits through registers, for each of eight warps; the warps change their registers, and
// the launch before may still be at work.
struct Transport {
  using Arguments = gpu::Arguments;
  static constexpr int threads = 256, min_blocks = 1, capability = 90;
  static constexpr int matrix_bytes = 16 * 32;
  static BITFAST_GPU void run(const Arguments& args) {
    const int at = static_cast<int>(threadIdx.x), lane = at % 32, warp = at / 32;
    if (args.fault == Fault::different_registers && warp == 5) {
      leave_registers<40>();
    } else if (args.fault != Fault::registers_of_three_warps || warp != 3) {
      leave_registers<24>();
    }
    take_registers<232>();
    unsigned char* from = shared_memory() + warp * matrix_bytes;
    unsigned char* to = from + 8 * matrix_bytes;
    if (args.fault != Fault::no_wait_for_launch_before) wait_for_launch_before();
    const float* x = args.x + (32 * warp + lane) * 4;
    store_shared_16(from + 16 * lane, args.fault == Fault::load_that_need_not_wait ? load_16(x) : load_written_16(x));
    sync_warp();
    const int place = lane % 16 * 32 + lane / 16 * 16;  // of a row: of the upper left matrix first, then the lower left
    uint32_t fragment[4];
    load_matrices(fragment, from + place);
    store_matrices(to + (args.fault == Fault::matrices_of_the_wrong_lane ? 16 * lane : place), fragment);
    if (args.fault != Fault::no_fence_before_bulk_store) fence_async_proxy();
    sync_block();
    if (at > 0) return;
    bulk_store(args.y, shared_memory() + 8 * matrix_bytes, 8 * matrix_bytes);
    commit_bulk_stores();
    wait_bulk_stores<0>();
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
BITFAST_ENTRY const char* share(const float* x, float* y, int fault) {
  return launch<Share>({4, 2, Share::shared_bytes}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* transport(const float* x, float* y, int fault) {
  return launch<Transport>(
      {1, 1, 16 * Transport::matrix_bytes, 0, true}, {x, y, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* multiply(
    const void* a, const void* b, float* c, int dtype, int columns, int adds, int fault) {
  return dispatch(static_cast<Dtype>(dtype), [&](auto number) -> const char* {
    using T = decltype(number);
    const MatrixArguments arguments{a, b, c, adds, static_cast<Fault>(fault)};
    if constexpr (sizeof(T) == 4) {
      return "only numbers of 16 bits";
    } else {
      const auto launch_for = [&](auto kernel) {
        using Kernel = decltype(kernel);
        return launch<Kernel>({1, 1, Kernel::shared_bytes}, arguments, nullptr);
      };
      if (columns == 64) return launch_for(Multiply<T, 8>{});
      if (columns == 128) return launch_for(Multiply<T, 16>{});
      return launch_for(Multiply<T, 32>{});
    }
  });
}
BITFAST_ENTRY const char* multiply_handed_over(const void* b, float* c, int fault) {
  return launch<MultiplyHandedOver>(
      {1, 1, MultiplyHandedOver::matrix_bytes + 8}, {nullptr, b, c, 0, static_cast<Fault>(fault)}, nullptr);
}
BITFAST_ENTRY const char* multiply_copied(const void* b, float* c, int fault) {
  return launch<MultiplyCopied>(
      {1, 1, MultiplyCopied::matrix_bytes + 8}, {nullptr, b, c, 0, static_cast<Fault>(fault)}, nullptr);
}
