// Which parts of shared memory ordinary stores have written that the copy engine and wgmma may not meet yet: a fence of
// the async proxy must come first, by the thread that wrote, or, after it has arrived at a barrier, by one that waited
// there. A fence by any thread of the block counts for the latter.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace bitfast::gpu::emulation {

class SharedWrites {
 public:
  SharedWrites(size_t bytes, int threads) : writers((bytes + part_bytes - 1) / part_bytes), parts(threads) {}

  void clear() {
    std::fill(writers.begin(), writers.end(), nobody);
    for (auto& of_thread : parts) of_thread.clear();
    handed_over.clear();
  }

  void write(int thread, size_t at, size_t bytes) {
    for (size_t part = at / part_bytes; part * part_bytes < at + bytes; ++part) {
      const auto writer = static_cast<uint16_t>(thread + 1);
      if (writers[part] == writer) continue;
      writers[part] = writer;
      parts[thread].push_back(static_cast<uint32_t>(part));
    }
  }

  // Threads [first, end) arrive at a barrier.
  void hand_over(int first, int end) {
    for (int thread = first; thread < end; ++thread) {
      for (const uint32_t part : parts[thread]) {
        if (writers[part] != thread + 1) continue;
        writers[part] = handed;
        handed_over.push_back(part);
      }
      parts[thread].clear();
    }
  }

  void fence(int thread) {
    for (const uint32_t part : parts[thread]) {
      if (writers[part] == thread + 1) writers[part] = nobody;
    }
    parts[thread].clear();
    for (const uint32_t part : handed_over) {
      if (writers[part] == handed) writers[part] = nobody;
    }
    handed_over.clear();
  }

  bool are_fenced(size_t at, size_t bytes) const {
    const auto begin = writers.begin() + static_cast<ptrdiff_t>(at / part_bytes);
    const auto end = writers.begin() + static_cast<ptrdiff_t>((at + bytes + part_bytes - 1) / part_bytes);
    return std::all_of(begin, end, [](uint16_t writer) { return writer == nobody; });
  }

 private:
  static constexpr size_t part_bytes = 16;
  static constexpr uint16_t nobody = 0, handed = 0xffff;  // else a thread's number and 1

  std::vector<uint16_t> writers;             // of each part
  std::vector<std::vector<uint32_t>> parts;  // that each thread has written since its last fence
  std::vector<uint32_t> handed_over;
};

}  // namespace bitfast::gpu::emulation
