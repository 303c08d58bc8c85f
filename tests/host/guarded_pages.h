// Memory whose bounds the hardware checks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

namespace bitfast::gpu::emulation {

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

}  // namespace bitfast::gpu::emulation
