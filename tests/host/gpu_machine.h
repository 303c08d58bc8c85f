// The machine that gpu_emulation.h makes of a CPU: fibers for threads, blocks with guarded shared memory, barriers,
// copies on their way, and the chance by which all of them go on.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_names.h"
#include "guarded_pages.h"
#include "shared_writes.h"

#define BITFAST_GPU inline

namespace bitfast::gpu {

namespace emulation {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 64 * 1024;
constexpr int patience = 2000;  // rounds without progress, after which nobody will make any

struct Meeting {  // a barrier for a number of threads
  int arrived = 0;
  uint8_t phase = 0;
};

struct Block;

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
  Block* block;  // whose shared memory it is
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

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  const uint8_t* awaited = nullptr;  // the fiber goes on when this is no longer
  uint8_t awaited_phase = 0;         // that
  bool has_begun = false, has_ended = false;
  bool has_waited = false;  // for the launch before
  std::vector<uint64_t*> new_barriers;  // since fence_barrier_init
  unsigned thread = 0;
  Block* block = nullptr;
  Groups copies, stores;
  bool may_multiply = false;  // since begin_products
  unsigned products_begun = 0, products_awaited = 0;
  std::deque<unsigned> product_groups;  // of those committed and not awaited: how many products have begun with it
  unsigned register_changes = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t slots[warp_size];
  uint32_t fragments[warp_size][6];
  void* results[warp_size];  // where the lanes want what one of them computes for all
};

constexpr int warps_per_group = 4;

struct Product;

// What is multiplied.
struct Factors {
  uint64_t left, right;  // the places of the matrices
  bool adds;
  void (*multiply)(const Product* const* products, int count, int warp);  // several that add to the same sums

  bool operator==(const Factors& other) const {
    return left == other.left && right == other.right && adds == other.adds && multiply == other.multiply;
  }
};

// A product of matrices in shared memory, by four warps.
struct Product {
  Factors factors;
  float* sums[warps_per_group * warp_size];  // of each thread
  int lanes_begun[warps_per_group];
};

struct WarpGroup {
  std::deque<Product> products;  // that some warp has yet to multiply
  unsigned dropped = 0;          // the number of the first of them
  unsigned done[warps_per_group] = {};
  std::vector<int> registers;  // what they were changed to, change by change
};

struct Block {
  Block(size_t bytes, int threads)
      : shared_bytes(bytes),
        shared(bytes),
        warps(threads / warp_size),
        warp_groups((warps.size() + warps_per_group - 1) / warps_per_group),
        writes(bytes, threads) {}

  size_t shared_bytes;
  GuardedPages shared;
  Meeting meeting, some[16];
  bool any_holds = false;  // of sync_block_or
  int registers_left = 0;  // of a thread of each group, by those who have changed theirs
  bool* or_results[1024];
  std::vector<Warp> warps;
  std::vector<WarpGroup> warp_groups;
  SharedWrites writes;
  int rank = 0;
};

struct Machine {
  Device device{90, 132, 227 * 1024, 228 * 1024, 50 * 1024 * 1024};
  std::mt19937 random{0};
  bool runs_last_only = false;  // of the clusters of a launch
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
  bool overlaps = false;  // whether the launch may begin before the one before has ended
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

inline void pause_during(const uint8_t& phase, uint8_t awaited_phase) {
  machine.current->awaited = &phase;
  machine.current->awaited_phase = awaited_phase;
  while (phase == awaited_phase) pause_thread();
  machine.current->awaited = nullptr;
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
  const uint8_t phase = meeting.phase;
  if (++meeting.arrived == threads) {
    work();
    meeting.arrived = 0;
    ++meeting.phase;
    return;
  }
  pause_during(meeting.phase, phase);
}

inline void meet(Meeting& meeting, int threads) {
  meet_and(meeting, threads, [] {});
}

inline Fiber& self() { return *machine.current; }
inline Block& block() { return *self().block; }
inline Warp& warp() { return block().warps[threadIdx.x / warp_size]; }
inline WarpGroup& warp_group() { return block().warp_groups[threadIdx.x / (warps_per_group * warp_size)]; }
inline int lane() { return static_cast<int>(threadIdx.x % warp_size); }

inline void check_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fault("%s is not aligned to %d bytes", what, bytes);
}

inline void check_shared(const void* p, size_t bytes, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  const Block& b = block();
  if (at < b.shared.begin || at + bytes > b.shared.begin + b.shared_bytes) fault("%s is outside of shared memory", what);
}

// A block that has ended has no shared memory any more.
inline void check_running(const Block& of) {
  const auto has_ended = [&of](const Fiber& fiber) { return fiber.block != &of || fiber.has_ended; };
  if (std::all_of(machine.fibers.begin(), machine.fibers.end(), has_ended)) fault("a block that has ended is written to");
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
T* in_block(T* p, int rank) {
  check_shared(p, sizeof(T), "an address of another block");
  if (rank < 0 || rank >= static_cast<int>(machine.blocks.size())) fault("block %d is not in the cluster", rank);
  check_running(*machine.blocks[rank]);
  auto* base = machine.blocks[rank]->shared.begin;
  return reinterpret_cast<T*>(base + ((unsigned char*)p - block().shared.begin));
}

inline size_t place_in_block(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - block().shared.begin);
}

inline void remember_write(const void* p, size_t bytes) {
  block().writes.write(static_cast<int>(threadIdx.x), place_in_block(p), bytes);
}

inline void check_waited() {
  if (machine.overlaps && !self().has_waited) fault("memory is touched before the launch before has ended");
}

inline void check_fenced(const void* p, size_t bytes, const char* what) {
  if (!block().writes.are_fenced(place_in_block(p), bytes)) fault("%s meets shared memory that was written without fence_async_proxy", what);
}

struct BarrierState {
  int32_t pending;
  uint8_t arrivals, left, phase, is_valid;
};
static_assert(sizeof(BarrierState) == 8);
constexpr uint8_t initialised = 0xb6, valid = 0xb7;  // before and after fence_barrier_init

inline BarrierState& state_of(uint64_t* barrier) {
  auto& state = *reinterpret_cast<BarrierState*>(barrier);
  if (state.is_valid == initialised) fault("a barrier is used without fence_barrier_init");
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
    check_running(*copy.block);
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
      if (fiber.awaited != nullptr && *fiber.awaited == fiber.awaited_phase) continue;
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
    if (!fiber.copies.is_idle() || !fiber.stores.open.empty() || fiber.products_awaited != fiber.products_begun) {
      fault("a thread has ended without waiting for its asynchronous work");
    }
    machine.current = &fiber;
    if (fiber.register_changes != warp_group().registers.size()) {
      fault("only some warps of a warpgroup change their registers");
    }
    fiber.stores.wait(0);  // the hardware completes them
  }
  for (const auto& b : machine.blocks) {
    if (b->registers_left < 0) fault("warps wait for ever for registers that no others leave");
    for (const WarpGroup& group : b->warp_groups) {
      if (!group.products.empty()) fault("only some warps of a warpgroup have multiplied");
    }
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
    for (Warp& w : b.warps) w.meeting = {};
    for (WarpGroup& group : b.warp_groups) group = {};
    b.writes.clear();
    b.any_holds = false;
    b.registers_left = 0;
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
  machine.overlaps = shape.overlaps;
  machine.blocks.clear();
  gridDim.x = static_cast<unsigned>(shape.blocks);
  blockDim.x = static_cast<unsigned>(threads);
  if (threads % warp_size != 0 || threads > 1024) return "the number of threads is not a multiple of 32 up to 1024";
  if (shape.blocks % shape.cluster != 0) return "the blocks do not divide into clusters";
  if (shape.cluster > 1 && machine.device.capability < 90) return "the device has no clusters";
  if (shape.overlaps && machine.device.capability < 90) return "launches of the device do not overlap";
  if (shape.cluster > 8) return "clusters of more than 8 blocks are not portable";
  if (shape.shared_bytes > machine.device.shared_bytes_per_block) return "the launch shape does not fit on the device";
  for (int i = 0; i < shape.cluster; ++i) machine.blocks.push_back(std::make_unique<Block>(shape.shared_bytes, threads));
  machine.fibers = std::vector<Fiber>(static_cast<size_t>(threads) * shape.cluster);
  const Stacks stacks(machine.fibers.size());
  const SignalGuard guard;
  if (sigsetjmp(machine.fault_exit, 1) == 0) {
    const int64_t begin = machine.runs_last_only ? shape.blocks - shape.cluster : 0;
    for (int64_t first = begin; first < shape.blocks; first += shape.cluster) {
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

}  // namespace bitfast::gpu
