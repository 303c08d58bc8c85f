// Work of uneven parts, divided among the threads of torch's pool.
#pragma once

#include "errors.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace bitfast {

// Calls function(i) for each i < count. A thread that has done its part takes the next one, so that parts may differ.
template <typename Function>
void in_parallel(int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      function(i);
    }
  });
}

}  // namespace bitfast
