// The primitives of csrc/gpu.h on a CPU, so that kernels can be run and proved where there is no GPU.
//
// Each thread of a cluster of blocks is a fiber; clusters run one after the other. Whatever a GPU leaves open is left
// to chance here (seeded): the order of warps and of lanes, warps that stand still for a while, how late asynchronous
// copies arrive (as late as the kernel's waits allow), whether products of shared memory are done at once or as late as
// that. So a kernel that lacks a barrier gives wrong results. These end a launch with a message: addresses that are not
// aligned as the hardware wants them, accesses outside of shared memory or of buffers that end at a guard page
// (tests/emulated.py makes such), a barrier that is not initialised or arrived at too often, a thread that waits for
// ever, shared memory that is given to the copy engine or to wgmma without a fence, warps of a group that multiply
// different matrices or take different numbers of registers, and copies or products that nobody has waited for.
// tests/test_gpu_emulation.py holds it to that.
//
// Not modelled: time, bank conflicts, how many registers there are, memory order between blocks other than through
// barriers, and races whose two orders give the same result.
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

// Each warp of a warpgroup must change its registers, to the same number. In the end the groups may have no more than
// they were launched with.
inline void change_registers(int registers) {
  auto& changes = emulation::warp_group().registers;
  const unsigned number = emulation::self().register_changes++;
  if (number == changes.size()) {
    const int before = number > 0 ? changes.back() : 65536 / emulation::machine.threads / 8 * 8;
    emulation::block().registers_left += before - registers;
    changes.push_back(registers);
  }
  if (changes[number] != registers) emulation::fault("the warps of a warpgroup change their registers differently");
}
template <int registers>
void take_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  change_registers(registers);
}
template <int registers>
void leave_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  change_registers(registers);
}

inline void let_next_launch_begin() {}
inline void wait_for_launch_before() { emulation::self().has_waited = true; }

inline void meet_cluster() { sync_cluster(); }
inline int cluster_rank() { return emulation::block().rank; }

inline int same_in_warp(int v) { return v; }

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

// Of memory that does not change. The compiler may load it earlier, also before a wait.
template <typename T>
T load_constant(const void* p) {
  if (emulation::machine.overlaps) emulation::fault("a load that need not wait for the launch before");
  return load_aligned<T>(p);
}
template <typename T>
T load_written(const void* p) {
  emulation::check_waited();
  return load_aligned<T>(p);
}
template <typename T>
void store(void* p, T v) {
  emulation::check_waited();
  store_aligned(p, v);
}

inline uint4 load_streaming(const void* p) { return load_constant<uint4>(p); }
inline uint4 load_16(const void* p) { return load_constant<uint4>(p); }
inline uint2 load_8(const void* p) { return load_constant<uint2>(p); }
inline uint32_t load_4(const void* p) { return load_constant<uint32_t>(p); }
inline uint32_t load_2(const void* p) { return load_constant<uint16_t>(p); }
inline uint2 load_written_8(const void* p) { return load_written<uint2>(p); }
inline uint4 load_written_16(const void* p) { return load_written<uint4>(p); }
inline void store_16(void* p, uint4 v) { store(p, v); }
inline void store_8(void* p, uint2 v) { store(p, v); }
inline void store_4(void* p, uint32_t v) { store(p, v); }

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
  emulation::check_waited();
  emulation::remember_write(shared, 16);
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
  *reinterpret_cast<emulation::BarrierState*>(barrier) = {0, n, n, 0, emulation::initialised};
  emulation::self().new_barriers.push_back(barrier);
}
inline void fence_barrier_init() {
  for (Barrier* barrier : emulation::self().new_barriers) {
    reinterpret_cast<emulation::BarrierState*>(barrier)->is_valid = emulation::valid;
  }
  emulation::self().new_barriers.clear();
}
inline void arrive(Barrier* barrier) {
  // For the warp, whose lanes have met.
  const int first = static_cast<int>(threadIdx.x) / emulation::warp_size * emulation::warp_size;
  emulation::block().writes.hand_over(first, first + emulation::warp_size);
  emulation::arrive_at(emulation::state_of(barrier));
}
inline void arrive_remote(Barrier* barrier, int rank) {
  emulation::arrive_at(emulation::state_of(emulation::in_block(barrier, rank)));
}
inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  auto& state = emulation::state_of(barrier);
  state.pending += static_cast<int32_t>(bytes);
  emulation::arrive_at(state);
}
inline void wait_for(Barrier* barrier, uint32_t parity) {
  emulation::pause_during(emulation::state_of(barrier).phase, static_cast<uint8_t>(parity));
}

inline void send_remote(float* p, int rank, float v, Barrier* barrier) {
  emulation::check_aligned(p, 4, "a number that is sent");
  uint64_t* theirs = emulation::in_block(barrier, rank);
  emulation::state_of(theirs);
  emulation::machine.bulk_copies.push_back(
      {emulation::in_block(p, rank), nullptr, 4, theirs, emulation::machine.blocks[rank].get(), v});
}
inline void wait_for_remote(Barrier* barrier, uint32_t parity) { wait_for(barrier, parity); }

inline void check_bulk(const void* shared, const void* global, uint32_t bytes) {
  emulation::check_waited();
  emulation::check_shared(shared, bytes, "a bulk copy");
  emulation::check_aligned(shared, 16, "a bulk copy");
  emulation::check_aligned(global, 16, "a bulk copy");
  if (bytes % 16 != 0) emulation::fault("a bulk copy of %u bytes: not a multiple of 16", bytes);
  emulation::check_fenced(shared, bytes, "a bulk copy");
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  check_bulk(shared, global, bytes);
  emulation::state_of(barrier);
  emulation::machine.bulk_copies.push_back({shared, global, bytes, barrier, &emulation::block()});
}
inline void bulk_load_to(uint16_t blocks, void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  if (blocks == 0) emulation::fault("a bulk copy goes to no block");
  check_bulk(shared, global, bytes);
  for (int rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    auto* theirs = emulation::in_block(barrier, rank);
    emulation::state_of(theirs);
    auto* to = emulation::in_block(static_cast<unsigned char*>(shared), rank);
    emulation::machine.bulk_copies.push_back({to, global, bytes, theirs, emulation::machine.blocks[rank].get()});
  }
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
inline void fence_async_proxy() { emulation::block().writes.fence(static_cast<int>(threadIdx.x)); }

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
uint32_t pack_two_relu(float low, float high) {
  return pack_two<T>(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
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
template <typename T>
T not_before_here(T v) {
  return v;
}


}  // namespace bitfast::gpu

#include "gpu_matrices.h"

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
