// What the kernels of this folder are written with: one function per primitive of the hardware, and one way to launch.
//
// Every kernel that includes this file is compiled twice: by nvcc for the library (gpu_device.h holds the primitives, in
// PTX), and by any C++ compiler for the tests (tests/host/gpu_emulation.h models them, with a fiber for each thread).
// The code between stays the same, and so do its launch shapes.
//
// A kernel is a struct:
//
//   struct Kernel {
//     struct Arguments { ... };                      // passed by value
//     static constexpr int threads = 256;            // per block at most, a multiple of 32
//     static constexpr int min_blocks = 2;           // that must fit on a multiprocessor: bounds the registers
//     static constexpr int capability = 90;          // the oldest GPU that it runs on, 80 or 90
//     static constexpr bool needs_wgmma = true;      // optional: it runs on GPUs of capability 90 only
//     static BITFAST_GPU void run(const Arguments&); // what a thread does
//   };
//
// and is launched by launch<Kernel>(shape, arguments, stream), from a BITFAST_ENTRY: a function with C linkage that the
// operators (csrc/<op>_cuda.cpp), prepared calls (bitfast/ops) and the tests share. It returns null, or what went wrong.
// Sources with kernels (csrc/*.cu) include nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

// A function that is found by its name in the library.
#define BITFAST_ENTRY extern "C" __attribute__((visibility("default")))

namespace bitfast::gpu {

// The limits that launch shapes depend on.
struct Device {
  int capability;                // 10 * major + minor: 80, 90, ...
  int multiprocessors;
  int shared_bytes_per_block;    // at most, dynamic
  int shared_bytes_per_multiprocessor;
  int64_t l2_bytes;
};

// How a kernel is launched: all in one dimension.
struct LaunchShape {
  int64_t blocks;        // a multiple of cluster
  int cluster = 1;       // blocks that share their shared memory; more than 1 only from capability 90 on
  int shared_bytes = 0;  // dynamic, per block
  int threads = 0;       // per block, a multiple of 32 up to the kernel's; 0 for as many as the kernel's
  // Whether blocks may begin before the launch before them in the stream has ended (from capability 90 on). Threads of
  // such a kernel wait (wait_for_launch_before) before they touch memory that any launch may have touched.
  bool overlaps = false;
};

// float16 and bfloat16 as they lie in memory; the C++ types of CUDA and of torch cannot be had on both sides.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The numbers that C callers give for dtypes.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace bitfast::gpu

namespace bitfast::gpu {

template <typename Kernel>
int threads_of(const LaunchShape& shape) {
  return shape.threads > 0 ? shape.threads : Kernel::threads;
}

}  // namespace bitfast::gpu

#if defined(__CUDACC__)
#include "gpu_launch.h"
#else
#include "gpu_emulation.h"
#endif

namespace bitfast::gpu {

// ---- sixteen bytes at a time -----------------------------------------------------------------------------------------

// How many numbers of a type lie in 16 bytes.
template <typename T>
constexpr int vector_size = 16 / static_cast<int>(sizeof(T));

BITFAST_GPU uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Sixteen bytes as numbers, in float32.
template <typename T>
BITFAST_GPU void unpack(const uint4& v, float (&numbers)[vector_size<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      numbers[i] = float_from_bits(word_of(v, i));
    } else {
      numbers[2 * i] = low_number<T>(word_of(v, i));
      numbers[2 * i + 1] = high_number<T>(word_of(v, i));
    }
  }
}

// The numbers, rounded to T, as sixteen bytes.
template <typename T>
BITFAST_GPU uint4 pack(const float (&numbers)[vector_size<T>]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(
        bits_of(numbers[0]), bits_of(numbers[1]), bits_of(numbers[2]), bits_of(numbers[3]));
  } else {
    return make_uint4(
        pack_two<T>(numbers[0], numbers[1]), pack_two<T>(numbers[2], numbers[3]),
        pack_two<T>(numbers[4], numbers[5]), pack_two<T>(numbers[6], numbers[7]));
  }
}

// One number of a tensor whose dtype is known only at run time, such as a parameter.
BITFAST_GPU float number_at(const void* data, int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(data)[index];
    case Dtype::bfloat16:
      return to_float(static_cast<const BFloat16*>(data)[index]);
    default:
      return to_float(static_cast<const Half*>(data)[index]);
  }
}

BITFAST_GPU void set_number_at(void* data, int64_t index, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::float32:
      static_cast<float*>(data)[index] = value;
      return;
    case Dtype::bfloat16:
      static_cast<BFloat16*>(data)[index] = rounded<BFloat16>(value);
      return;
    default:
      static_cast<Half*>(data)[index] = rounded<Half>(value);
  }
}

// Calls function(T{}) with the C++ type of a dtype and returns what it returns.
template <typename Function>
auto dispatch(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::bfloat16:
      return function(BFloat16{});
    case Dtype::float16:
      return function(Half{});
    default:
      return function(float{});
  }
}

}  // namespace bitfast::gpu
