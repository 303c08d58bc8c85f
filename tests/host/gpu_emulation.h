// The primitives of csrc/gpu.h on a CPU, so that kernels can be run and proved where there is no GPU.
//
// Each thread of a cluster of blocks is a fiber; clusters run one after the other. Whatever a GPU leaves open is left to
// chance here (seeded): the order of warps and of lanes, warps that stand still for a while, how late asynchronous copies
// arrive (as late as the kernel's waits allow). So a kernel that lacks a barrier gives wrong results. These end a launch
// with a message: addresses that are not aligned as the hardware wants them, accesses outside of shared memory or of
// buffers that end at a guard page (tests/emulated.py makes such), a barrier that is not initialised or arrived at too
// often, a thread that waits for ever, shared memory that is given to the copy engine or to wgmma without a fence, and
// copies that nobody has waited for. tests/test_gpu_emulation.py holds it to that.
//
// Not modelled: time, bank conflicts, registers, memory order between blocks other than through barriers, and races whose
// two orders give the same result.
#pragma once

#include "gpu_machine.h"

namespace bitfast::gpu {

// ---- launches --------------------------------------------------------------------------------------------------------

inline const char* current_device(Device& device) {
  device = emulation::machine.device;
  return nullptr;
}

template <typename Kernel>
const char* resident_clusters(const LaunchShape& shape, int64_t& clusters) {
  const Device& device = emulation::machine.device;
  const int by_memory = device.shared_bytes_per_multiprocessor / (shape.shared_bytes + 1024);
  const int by_threads = 2048 / threads_of<Kernel>(shape);
  clusters = static_cast<int64_t>(device.multiprocessors) * std::min(by_memory, by_threads) / shape.cluster;
  return clusters > 0 ? nullptr : "the launch shape does not fit on the device";
}

template <typename Kernel>
const char* launch(const LaunchShape& shape, const typename Kernel::Arguments& arguments, void*) {
  if (shape.blocks == 0) return nullptr;
  if (emulation::machine.device.capability < Kernel::capability) return "the device is too old for the kernel";
  if (threads_of<Kernel>(shape) > Kernel::threads) return "more threads than the kernel is compiled for";
  return emulation::run_grid(shape, threads_of<Kernel>(shape), [&arguments] { Kernel::run(arguments); });
}

// ---- threads ---------------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return emulation::block().shared.begin; }
inline void sync_block() { emulation::meet(emulation::block().meeting, emulation::machine.threads); }
inline bool sync_block_or(bool condition) {
  auto& b = emulation::block();
  b.any_holds |= condition;
  bool result = false;
  b.or_results[threadIdx.x] = &result;
  emulation::meet_and(b.meeting, emulation::machine.threads, [&b] {
    for (int i = 0; i < emulation::machine.threads; ++i) *b.or_results[i] = b.any_holds;
    b.any_holds = false;
  });
  return result;
}
inline void sync_warp() { emulation::meet(emulation::warp().meeting, emulation::warp_size); }
inline void sync_some(int barrier, int threads) {
  if (barrier < 1 || barrier > 15) emulation::fault("barrier %d is not one of 1 to 15", barrier);
  emulation::meet(emulation::block().some[barrier], threads);
}
inline void sync_cluster() {
  auto& m = emulation::machine;
  emulation::meet(m.cluster_meeting, m.threads * static_cast<int>(m.blocks.size()));
}
inline int cluster_rank() { return emulation::block().rank; }

inline float shuffle_xor(float v, int mask) {
  auto& w = emulation::warp();
  const int lane = emulation::lane();
  memcpy(&w.slots[lane], &v, sizeof v);
  sync_warp();
  float other;
  memcpy(&other, &w.slots[lane ^ mask], sizeof other);
  sync_warp();
  return other;
}

// ---- global and shared memory ----------------------------------------------------------------------------------------

template <typename T>
T load_aligned(const void* p) {
  emulation::check_aligned(p, sizeof(T), "a load");
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
void store_aligned(void* p, T v) {
  emulation::check_aligned(p, sizeof(T), "a store");
  memcpy(p, &v, sizeof v);
}

inline uint4 load_streaming(const void* p) { return load_aligned<uint4>(p); }
inline uint4 load_16(const void* p) { return load_aligned<uint4>(p); }
inline uint2 load_8(const void* p) { return load_aligned<uint2>(p); }
inline uint32_t load_4(const void* p) { return load_aligned<uint32_t>(p); }
inline uint32_t load_2(const void* p) { return load_aligned<uint16_t>(p); }
inline uint4 load_written_16(const void* p) { return load_aligned<uint4>(p); }
inline void store_16(void* p, uint4 v) { store_aligned(p, v); }
inline void store_8(void* p, uint2 v) { store_aligned(p, v); }
inline void store_4(void* p, uint32_t v) { store_aligned(p, v); }

inline uint4 load_shared_16(const void* p) {
  emulation::check_shared(p, 16, "a load");
  return load_aligned<uint4>(p);
}
inline uint2 load_shared_8(const void* p) {
  emulation::check_shared(p, 8, "a load");
  return load_aligned<uint2>(p);
}
inline void store_shared_16(void* p, uint4 v) {
  emulation::check_shared(p, 16, "a store");
  store_aligned(p, v);
  emulation::remember_write(p, 16);
}
inline float2 load_remote(const float2* p, int rank) { return load_aligned<float2>(emulation::in_block(p, rank)); }
inline void store_remote(float* p, int rank, float v) { store_aligned(emulation::in_block(p, rank), v); }

// ---- asynchronous copies ---------------------------------------------------------------------------------------------

inline void copy_16_async(void* shared, const void* global) {
  emulation::check_shared(shared, 16, "a copy");
  emulation::check_aligned(shared, 16, "a copy");
  emulation::check_aligned(global, 16, "a copy");
  if (emulation::machine.toss()) {
    memcpy(shared, global, 16);
  } else {
    emulation::self().copies.open.push_back([=] { memcpy(shared, global, 16); });
  }
}
inline void commit_copies() { emulation::self().copies.commit(); }
template <int groups>
inline void wait_copies() {
  emulation::self().copies.wait(groups);
}

using Barrier = uint64_t;

inline void init_barrier(Barrier* barrier, int arrivals) {
  emulation::check_shared(barrier, 8, "a barrier");
  emulation::check_aligned(barrier, 8, "a barrier");
  if (arrivals < 1 || arrivals > 255) emulation::fault("a barrier of %d arrivals is not modelled", arrivals);
  const auto n = static_cast<uint8_t>(arrivals);
  *reinterpret_cast<emulation::BarrierState*>(barrier) = {0, n, n, 0, emulation::valid};
}
inline void fence_barrier_init() {}
inline void arrive(Barrier* barrier) { emulation::arrive_at(emulation::state_of(barrier)); }
inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  auto& state = emulation::state_of(barrier);
  state.pending += static_cast<int32_t>(bytes);
  emulation::arrive_at(state);
}
inline void wait_for(Barrier* barrier, uint32_t parity) {
  while (emulation::state_of(barrier).phase == parity) emulation::pause_thread();
}

inline void send_remote(float* p, int rank, float v, Barrier* barrier) {
  emulation::check_aligned(p, 4, "a number that is sent");
  uint64_t* theirs = emulation::in_block(barrier, rank);
  emulation::state_of(theirs);
  emulation::machine.bulk_copies.push_back({emulation::in_block(p, rank), nullptr, 4, theirs, v});
}
inline void wait_for_remote(Barrier* barrier, uint32_t parity) { wait_for(barrier, parity); }

inline void check_bulk(const void* shared, const void* global, uint32_t bytes) {
  emulation::check_shared(shared, bytes, "a bulk copy");
  emulation::check_aligned(shared, 16, "a bulk copy");
  emulation::check_aligned(global, 16, "a bulk copy");
  if (bytes % 16 != 0) emulation::fault("a bulk copy of %u bytes: not a multiple of 16", bytes);
  emulation::check_fenced(shared, bytes, "a bulk copy");
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  check_bulk(shared, global, bytes);
  emulation::state_of(barrier);
  emulation::machine.bulk_copies.push_back({shared, global, bytes, barrier});
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  check_bulk(shared, global, bytes);
  emulation::self().stores.open.push_back([=] { memcpy(global, shared, bytes); });
}
inline void commit_bulk_stores() { emulation::self().stores.commit(); }
template <int groups>
inline void wait_bulk_reads() {
  emulation::self().stores.wait(groups);
}
template <int groups>
inline void wait_bulk_stores() {
  emulation::self().stores.wait(groups);
}
inline void prefetch_l2(const void* global, uint32_t bytes) {
  emulation::check_aligned(global, 16, "a prefetch");
  if (bytes % 16 != 0) emulation::fault("a prefetch of %u bytes: not a multiple of 16", bytes);
  if (bytes > 0) static_cast<void>(static_cast<const volatile char*>(global)[bytes - 1]);
}
inline void fence_async_proxy() { emulation::self().written_first = emulation::self().written_last = nullptr; }

// ---- numbers ---------------------------------------------------------------------------------------------------------

inline float float_from_bits(uint32_t v) {
  float f;
  memcpy(&f, &v, sizeof f);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t v;
  memcpy(&v, &f, sizeof v);
  return v;
}

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) { return float_from_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(Half v) {
  return static_cast<float>(torch::headeronly::Half(v.bits, torch::headeronly::Half::from_bits()));
}

template <typename T>
T rounded(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bits_of(v);
    if (v != v) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return {torch::headeronly::Half(v).x};
  }
}
template <typename T>
float low_number(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <typename T>
float high_number(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <typename T>
uint32_t pack_two(float low, float high) {
  return rounded<T>(low).bits | static_cast<uint32_t>(rounded<T>(high).bits) << 16;
}
template <typename T>
uint32_t maximum_of_two(uint32_t a, uint32_t b) {
  auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  return pack_two<T>(
      larger(low_number<T>(a), low_number<T>(b)), larger(high_number<T>(a), high_number<T>(b)));
}
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float reciprocal_sqrt(float v) { return 1.0f / std::sqrt(v); }
inline void keep_packed(uint4&) {}
template <typename T>
T* keep_address(T* p) {
  return p;
}
inline int not_before_here(int v) { return v; }

inline int recompute_from(int v) { return v; }

// ---- matrices --------------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  emulation::check_shared(row, 16, "a matrix's row");
  emulation::check_aligned(row, 16, "a matrix's row");
  auto& w = emulation::warp();
  w.slots[emulation::lane()] = reinterpret_cast<uint64_t>(row);
  w.results[emulation::lane()] = fragment;
  emulation::meet_and(w.meeting, emulation::warp_size, [&w] {
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      auto* words = static_cast<uint32_t*>(w.results[lane]);
      for (int i = 0; i < 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(w.slots[i * 8 + lane / 4])[lane % 4];
    }
  });
}

template <typename T>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& w = emulation::warp();
  uint32_t* mine = w.fragments[emulation::lane()];
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  w.results[emulation::lane()] = c;
  emulation::meet_and(w.meeting, emulation::warp_size, [&w] {
    float left[16][16], right[16][8], sums[16][8];
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      const uint32_t* words = w.fragments[lane];
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        left[row][k] = low_number<T>(words[i]);
        left[row][k + 1] = high_number<T>(words[i]);
        sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = static_cast<float*>(w.results[lane])[i];
      }
      for (int i = 0; i < 2; ++i) {
        right[lane % 4 * 2 + i * 8][lane / 4] = low_number<T>(words[4 + i]);
        right[lane % 4 * 2 + i * 8 + 1][lane / 4] = high_number<T>(words[4 + i]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      for (int i = 0; i < 4; ++i) {
        static_cast<float*>(w.results[lane])[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
    }
  });
}

// ---- matrices in shared memory ---------------------------------------------------------------------------------------

using MatrixPlace = uint64_t;  // the fields of the hardware's descriptor; addresses count from the block's memory

inline MatrixPlace matrix_at(const void* shared, int k_step, int row_step) {
  emulation::check_shared(shared, 128, "a matrix");
  emulation::check_aligned(shared, 16, "a matrix");
  if ((k_step | row_step) % 16 != 0 || k_step < 0 || row_step < 0 || k_step >= 1 << 18 || row_step >= 1 << 18) {
    emulation::fault("steps of %d and %d bytes do not fit a matrix", k_step, row_step);
  }
  const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(shared) - shared_memory());
  return address >> 4 | static_cast<uint64_t>(k_step >> 4) << 16 | static_cast<uint64_t>(row_step >> 4) << 32;
}

namespace emulation {

// Row `row` of the part with numbers 8 * part to 8 * part + 7 of each row.
inline const unsigned char* matrix_row(MatrixPlace place, int row, int part) {
  const auto field = [place](int bit) { return static_cast<int>(place >> bit & 0x3fff) << 4; };
  const unsigned char* at = shared_memory() + field(0) + part * field(16) + row / 8 * field(32) + row % 8 * 16;
  check_shared(at, 16, "a matrix");
  return at;
}

template <typename T>
void read_matrix_row(MatrixPlace place, int row, float (&numbers)[16]) {
  for (int part = 0; part < 2; ++part) {
    const auto* words = reinterpret_cast<const uint32_t*>(matrix_row(place, row, part));
    for (int i = 0; i < 4; ++i) {
      numbers[8 * part + 2 * i] = low_number<T>(words[i]);
      numbers[8 * part + 2 * i + 1] = high_number<T>(words[i]);
    }
  }
}

inline void check_matrix(MatrixPlace place) {
  for (int part = 0; part < 2; ++part) {
    for (int row = 0; row < 64; row += 8) check_fenced(matrix_row(place, row, part), 128, "a product");
  }
}

// The lanes of a warp must name the same matrices.
inline void check_same_matrices(MatrixPlace a, MatrixPlace b) {
  auto& all = warp().products;
  const unsigned number = self().products_begun++;
  if (number == all.size()) all.emplace_back(a, b);
  if (all[number] != std::make_pair(a, b)) fault("the threads of a warp multiply different matrices");
}

}  // namespace emulation

template <int count>
void begin_products(float (&)[count][8][4]) {
  emulation::self().may_multiply = true;
}

template <typename T>
void multiply_add_64x64x16(float (&c)[8][4], MatrixPlace a, MatrixPlace b) {
  if (emulation::machine.device.capability != 90) emulation::fault("this GPU has no products of shared memory");
  if (!emulation::self().may_multiply) emulation::fault("a product without begin_products");
  emulation::check_same_matrices(a, b);
  if (emulation::lane() == 0) {
    emulation::check_matrix(a);
    emulation::check_matrix(b);
  }
  emulation::self().products.open.push_back([&c, a, b] {
    const int lane = emulation::lane(), first_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
    float left[2][16], right[16];
    for (int half = 0; half < 2; ++half) emulation::read_matrix_row<T>(a, first_row + 8 * half, left[half]);
    for (int i = 0; i < 16; ++i) {
      emulation::read_matrix_row<T>(b, i / 2 * 8 + lane % 4 * 2 + i % 2, right);
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < 16; ++k) c[i / 2][half * 2 + i % 2] += left[half][k] * right[k];
      }
    }
  });
}
inline void commit_products() { emulation::self().products.commit(); }
template <int count>
void wait_products(float (&)[count][8][4]) {
  emulation::self().products.wait(0);
  emulation::self().may_multiply = false;
}

}  // namespace bitfast::gpu

// For the tests: the next launches are those of such a device, with this seed.
BITFAST_ENTRY __attribute__((used)) inline void emulate_device(
    int capability, int multiprocessors, int shared_bytes_per_block, unsigned seed) {
  auto& machine = bitfast::gpu::emulation::machine;
  machine.device.capability = capability;
  machine.device.multiprocessors = multiprocessors;
  machine.device.shared_bytes_per_block = shared_bytes_per_block;
  machine.device.shared_bytes_per_multiprocessor = shared_bytes_per_block + 1024;
  machine.random.seed(seed);
  machine.runs_last_only = false;
}

// For the tests: of the next launches on this device only the last cluster runs, as where offsets are large.
BITFAST_ENTRY __attribute__((used)) inline void emulate_last_cluster_only() {
  bitfast::gpu::emulation::machine.runs_last_only = true;
}
