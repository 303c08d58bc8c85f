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

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define BITFAST_GPU inline

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::max;
using std::min;

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim, blockDim;

namespace bitfast::gpu {

// ---- the machine -----------------------------------------------------------------------------------------------------

namespace emulation {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 64 * 1024;
constexpr int patience = 2000;  // rounds without progress, after which nobody will make any

struct Meeting {  // a barrier for a number of threads
  int arrived = 0;
  int generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
  float sent = 0;  // what is copied if `from` is null
};

// Asynchronous work of a thread, in groups, done as late as its waits allow.
struct Groups {
  std::vector<std::vector<std::function<void()>>> committed;
  std::vector<std::function<void()>> open;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void wait(size_t groups) {
    while (committed.size() > groups) {
      for (auto& work : committed.front()) work();
      committed.erase(committed.begin());
    }
  }
  bool is_idle() const { return open.empty() && committed.empty(); }
};

struct Block;

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  bool has_begun = false, has_ended = false;
  unsigned thread = 0;
  Block* block = nullptr;
  Groups copies, stores, products;
  bool may_multiply = false;  // since begin_products
  unsigned products_begun = 0;
  const unsigned char* written_first = nullptr;  // shared memory written since the last fence of the async proxy
  const unsigned char* written_last = nullptr;
};

struct Warp {
  Meeting meeting;
  uint64_t slots[warp_size];
  uint32_t fragments[warp_size][6];
  std::vector<std::pair<uint64_t, uint64_t>> products;  // the matrices of each that a lane has begun
  void* results[warp_size];  // where the lanes want what one of them computes for all
};

// Pages with a guard page before and after them; the bytes in use end where the last page does.
struct GuardedPages {
  explicit GuardedPages(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    used = (bytes + 127) / 128 * 128;
    total = (used + page - 1) / page * page + 2 * page;
    mapped = static_cast<unsigned char*>(
        mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(mapped, page, PROT_NONE);
    mprotect(mapped + total - page, page, PROT_NONE);
    begin = mapped + total - page - used;
  }
  ~GuardedPages() { munmap(mapped, total); }
  GuardedPages(const GuardedPages&) = delete;

  unsigned char* mapped;
  unsigned char* begin;
  size_t used, total;
};

struct Block {
  Block(size_t bytes, int threads) : shared_bytes(bytes), shared(bytes), warps(threads / warp_size) {}

  size_t shared_bytes;
  GuardedPages shared;
  Meeting meeting, some[16];
  bool any_holds = false;  // of sync_block_or
  bool* or_results[1024];
  std::vector<Warp> warps;
  int rank = 0;
};

struct Machine {
  Device device{90, 132, 227 * 1024, 228 * 1024, 50 * 1024 * 1024};
  std::mt19937 random{0};
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster at work
  std::vector<Copy> bulk_copies;
  Meeting cluster_meeting;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  sigjmp_buf fault_exit;
  std::string message;
  std::function<void()> body;
  int threads = 0;
  long progress = 0;

  unsigned below(size_t n) { return static_cast<unsigned>(random() % n); }
  bool toss() { return random() & 1; }
};

inline Machine machine;

// Ends the launch.
[[noreturn]] inline void fault(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.message = std::string(text) + " (block " + std::to_string(blockIdx.x) + ", thread " +
                    std::to_string(threadIdx.x) + ")";
  siglongjmp(machine.fault_exit, 1);
}

[[gnu::noinline]] inline void pause_thread() {
  if (_setjmp(machine.current->where) == 0) _longjmp(machine.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.has_begun) _longjmp(fiber.where, 1);
  fiber.has_begun = true;
  setcontext(&fiber.start);
}

// The last thread to arrive does the work for all of them.
template <typename Work>
void meet_and(Meeting& meeting, int threads, const Work& work) {
  ++machine.progress;
  const int generation = meeting.generation;
  if (++meeting.arrived == threads) {
    work();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) pause_thread();
}

inline void meet(Meeting& meeting, int threads) {
  meet_and(meeting, threads, [] {});
}

inline Fiber& self() { return *machine.current; }
inline Block& block() { return *self().block; }
inline Warp& warp() { return block().warps[threadIdx.x / warp_size]; }
inline int lane() { return static_cast<int>(threadIdx.x % warp_size); }

inline void check_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fault("%s is not aligned to %d bytes", what, bytes);
}

inline void check_shared(const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  const Block& b = block();
  if (at < b.shared.begin || at + bytes > b.shared.begin + b.shared_bytes) fault("%s is outside of shared memory", what);
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
T* in_block(T* p, int rank) {
  check_shared(p, sizeof(T), "an address of another block");
  if (rank < 0 || rank >= static_cast<int>(machine.blocks.size())) fault("block %d is not in the cluster", rank);
  auto* base = machine.blocks[rank]->shared.begin;
  return reinterpret_cast<T*>(base + ((unsigned char*)p - block().shared.begin));
}

inline void remember_write(const void* p, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(p);
  Fiber& f = self();
  if (f.written_first == nullptr || first < f.written_first) f.written_first = first;
  if (f.written_last == nullptr || first + bytes > f.written_last) f.written_last = first + bytes;
}

inline void check_fenced(const void* p, size_t bytes, const char* what) {
  const auto* first = static_cast<const unsigned char*>(p);
  for (const Fiber& f : machine.fibers) {
    if (f.block == &block() && f.written_first != nullptr && f.written_first < first + bytes && first < f.written_last) {
      fault("%s meets shared memory that was written without fence_async_proxy", what);
    }
  }
}

struct BarrierState {
  int32_t pending;
  uint8_t arrivals, left, phase, is_valid;
};
static_assert(sizeof(BarrierState) == 8);
constexpr uint8_t valid = 0xb7;

inline BarrierState& state_of(uint64_t* barrier) {
  auto& state = *reinterpret_cast<BarrierState*>(barrier);
  if (state.is_valid != valid) fault("a barrier is not initialised");
  return state;
}

inline void advance(BarrierState& state) {
  ++machine.progress;
  if (state.left == 0 && state.pending == 0) {
    state.left = state.arrivals;
    state.phase ^= 1;
  }
}

inline void arrive_at(BarrierState& state) {
  if (state.left == 0) fault("a barrier is arrived at too often");
  --state.left;
  advance(state);
}

inline void deliver_some_copies() {
  auto& copies = machine.bulk_copies;
  const unsigned most = machine.below(4) == 0 ? 64 : 0;
  for (unsigned n = 0; n < most && !copies.empty(); ++n) {
    std::swap(copies[machine.below(copies.size())], copies.back());
    const Copy copy = copies.back();
    copies.pop_back();
    memcpy(copy.to, copy.from == nullptr ? &copy.sent : copy.from, copy.bytes);
    auto& state = *reinterpret_cast<BarrierState*>(copy.barrier);
    state.pending -= static_cast<int32_t>(copy.bytes);
    advance(state);
  }
}

inline void thread_main() {
  machine.body();
  machine.current->has_ended = true;
  ++machine.progress;
  _longjmp(machine.scheduler, 1);
}

// Runs the threads of one cluster to their end.
inline void run_cluster() {
  const size_t count = machine.fibers.size();
  size_t frozen_rounds = 0, frozen_first = 0, frozen_count = 0;
  long seen = -1;
  int idle = 0;
  for (;;) {
    bool all_ended = true;
    const size_t from = machine.below(count / warp_size) * warp_size;
    const bool backwards = machine.toss();
    if (frozen_rounds == 0 && machine.below(4) == 0) {
      frozen_rounds = machine.below(60);
      frozen_count = machine.toss() ? warp_size : 4 * warp_size;
      frozen_first = machine.below(count / warp_size) * warp_size;
    } else if (frozen_rounds > 0) {
      --frozen_rounds;
    }
    for (size_t i = 0; i < count; ++i) {
      const size_t in_order = (from + i) % count;
      const size_t at = backwards ? in_order / warp_size * warp_size + warp_size - 1 - in_order % warp_size : in_order;
      Fiber& fiber = machine.fibers[at];
      if (fiber.has_ended) continue;
      all_ended = false;
      if (frozen_rounds > 0 && at >= frozen_first && at < frozen_first + frozen_count) continue;
      threadIdx.x = fiber.thread;
      blockIdx.x = static_cast<unsigned>(fiber.block->rank) + blockIdx.x / machine.blocks.size() * machine.blocks.size();
      resume(fiber);
    }
    deliver_some_copies();
    if (all_ended && machine.bulk_copies.empty()) return;
    if (machine.progress != seen) {
      seen = machine.progress;
      idle = 0;
    } else if (++idle > patience) {
      fault("threads wait for ever");
    }
  }
}

inline void check_end_of_cluster() {
  for (Fiber& fiber : machine.fibers) {
    threadIdx.x = fiber.thread;
    if (!fiber.copies.is_idle() || !fiber.stores.open.empty() || !fiber.products.is_idle()) {
      fault("a thread has ended without waiting for its asynchronous work");
    }
    fiber.stores.wait(0);  // the hardware completes them
  }
  for (const auto& b : machine.blocks) {
    for (size_t i = b->shared_bytes; i < b->shared.used; ++i) {
      if (b->shared.begin[i] != 0xff) fault("shared memory was written past its end");
    }
  }
}

inline void on_signal(int) {
  machine.message = "an access outside of memory (block " + std::to_string(blockIdx.x) + ", thread " +
                    std::to_string(threadIdx.x) + ")";
  siglongjmp(machine.fault_exit, 1);
}

// Turns accesses to guard pages into faults for as long as it lives.
struct SignalGuard {
  SignalGuard() : stack(64 * 1024) {
    stack_t mine = {};
    mine.ss_sp = stack.data();
    mine.ss_size = stack.size();
    sigaltstack(&mine, &old_stack);
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
  }
  ~SignalGuard() {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
  std::vector<char> stack;
  stack_t old_stack = {};
  struct sigaction old_segv = {}, old_bus = {};
};

struct Stacks {
  explicit Stacks(size_t fibers) : bytes(fibers * stack_bytes) {
    memory = static_cast<char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  ~Stacks() { munmap(memory, bytes); }
  Stacks(const Stacks&) = delete;

  size_t bytes;
  char* memory;
};

inline void prepare_cluster(const Stacks& stacks, int64_t first_block) {
  machine.bulk_copies.clear();
  machine.cluster_meeting = {};
  for (size_t rank = 0; rank < machine.blocks.size(); ++rank) {
    Block& b = *machine.blocks[rank];
    b.rank = static_cast<int>(rank);
    b.meeting = {};
    for (Meeting& meeting : b.some) meeting = {};
    for (Warp& w : b.warps) {
      w.meeting = {};
      w.products.clear();
    }
    b.any_holds = false;
    memset(b.shared.begin, 0xff, b.shared.used);  // NaN in any dtype
  }
  blockIdx.x = static_cast<unsigned>(first_block);
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    Fiber& f = machine.fibers[i];
    f = Fiber{};
    f.thread = static_cast<unsigned>(i % machine.threads);
    f.block = machine.blocks[i / machine.threads].get();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks.memory + i * stack_bytes;
    f.start.uc_stack.ss_size = stack_bytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, thread_main, 0);
  }
}

// Runs a grid, cluster by cluster. Returns null, or what went wrong.
inline const char* run_grid(const LaunchShape& shape, int threads, std::function<void()> body) {
  machine.message.clear();
  machine.body = std::move(body);
  machine.threads = threads;
  machine.blocks.clear();
  gridDim.x = static_cast<unsigned>(shape.blocks);
  blockDim.x = static_cast<unsigned>(threads);
  if (threads % warp_size != 0 || threads > 1024) return "the number of threads is not a multiple of 32 up to 1024";
  if (shape.blocks % shape.cluster != 0) return "the blocks do not divide into clusters";
  if (shape.cluster > 1 && machine.device.capability < 90) return "the device has no clusters";
  if (shape.cluster > 8) return "clusters of more than 8 blocks are not portable";
  if (shape.shared_bytes > machine.device.shared_bytes_per_block) return "the launch shape does not fit on the device";
  for (int i = 0; i < shape.cluster; ++i) machine.blocks.push_back(std::make_unique<Block>(shape.shared_bytes, threads));
  machine.fibers = std::vector<Fiber>(static_cast<size_t>(threads) * shape.cluster);
  const Stacks stacks(machine.fibers.size());
  const SignalGuard guard;
  if (sigsetjmp(machine.fault_exit, 1) == 0) {
    for (int64_t first = 0; first < shape.blocks; first += shape.cluster) {
      prepare_cluster(stacks, first);
      run_cluster();
      check_end_of_cluster();
    }
  }
  machine.fibers.clear();
  machine.blocks.clear();
  return machine.message.empty() ? nullptr : machine.message.c_str();
}

}  // namespace emulation

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
}
