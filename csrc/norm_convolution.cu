// norm_convolution on a GPU of capability 9.0: the kernel, and its entries. csrc/norm_convolution_cuda.h says how they
// are called, csrc/norm_convolution_tiles.h how the work is cut.
#include <string.h>

#include <initializer_list>
#include <type_traits>

#include "norm_convolution_loaders.h"
#include "norm_convolution_plan.h"

namespace bitfast::norm_convolution {
namespace {

// T: of feature maps and weights; columns: of a tile; units: of a group of warps that multiplies. One warp brings
// weights, three bring the input, eight multiply.
template <typename T, int columns, int units>
struct NormConvolution {
  using Arguments = norm_convolution::Arguments;
  static constexpr int threads = 384, min_blocks = 1, capability = 90;
  static constexpr bool needs_wgmma = true;
  // What the warps that load leave, those that multiply take. A block of 384 threads begins with 168 registers each.
  static constexpr int loader_registers = 88, multiplier_registers = 208;
  static_assert(loader_registers + multiplier_groups * multiplier_registers <= 3 * 168);

  static BITFAST_GPU void run(const Arguments& a) {
    const Barriers barriers{a};
    if (threadIdx.x == 0) init(a, barriers);
    sync(a);
    gpu::let_next_launch_begin();
    if (threadIdx.x < 128) {
      gpu::leave_registers<loader_registers>();
      load(a, barriers);
    } else {
      gpu::take_registers<multiplier_registers>();
      gpu::wait_for_launch_before();
      Multiplier<T, columns, units>(a, barriers).run();
    }
    if (a.cluster > 1) gpu::meet_cluster();  // the other block may still send something here
  }

  static BITFAST_GPU void load(const Arguments& a, const Barriers& barriers) {
    if (threadIdx.x == 0) WeightLoader{a, barriers, columns}.run();
    if (threadIdx.x < 32) return;
    gpu::wait_for_launch_before();
    if (a.taps == 1 && a.stride == 1) {
      Loader<T, RunItems>(a, barriers, columns).run();
    } else {
      Loader<T, RowItems>(a, barriers, columns).run();
    }
  }

  static BITFAST_GPU void sync(const Arguments& a) {
    if (a.cluster > 1) {
      gpu::meet_cluster();
    } else {
      gpu::sync_block();
    }
  }

  static BITFAST_GPU void init(const Arguments& a, const Barriers& barriers) {
    const int readers = 4 * (a.takes_turns ? 1 : multiplier_groups);  // warps
    for (int i = 0; i < a.stages; ++i) {
      gpu::init_barrier(barriers.full(i), loaders / 32);
      gpu::init_barrier(barriers.empty(i), readers);
    }
    for (int i = 0; i < a.weight_stages; ++i) {
      gpu::init_barrier(barriers.weights_full(i), 1);
      gpu::init_barrier(barriers.weights_empty(i), readers * a.cluster);
    }
    for (int i = 0; i < multiplier_groups; ++i) gpu::init_barrier(barriers.turn(i), 4);
    gpu::fence_barrier_init();
  }
};

// What is wrong with a call; null if nothing is.
const char* why_wrong(const Call& c) {
  using gpu::Dtype;
  if (c.dtype != static_cast<int32_t>(Dtype::bfloat16) && c.dtype != static_cast<int32_t>(Dtype::float16)) {
    return "norm_convolution: feature maps must be bfloat16 or float16";
  }
  const auto activation = static_cast<Activation>(c.activation);
  if (activation != Activation::none && activation != Activation::relu) {
    return "norm_convolution: the activation must be relu or none";
  }
  if (!c.has_norm && activation != Activation::none) return "norm_convolution: an activation needs a norm";
  if (c.kernel_size != 1 && c.kernel_size != 3) return "norm_convolution: the kernel size must be 1 or 3";
  if (c.stride != 1 && c.stride != 2) return "norm_convolution: the stride must be 1 or 2";
  if (c.top < 0 || c.left < 0 || c.top >= c.kernel_size || c.left >= c.kernel_size) {
    return "norm_convolution: the padding must be smaller than the kernel";
  }
  if (c.images < 0 || c.height < 1 || c.width < 1 || c.result_height < 1 || c.result_width < 1) {
    return "norm_convolution: feature maps must not be empty";
  }
  for (const int32_t channels : {c.channels, c.result_channels, c.second_channels}) {
    if (channels < 0 || channels % 8 != 0) return "norm_convolution: channels must be a multiple of 8";
  }
  if (c.channels == 0 || c.result_channels == 0) return "norm_convolution: feature maps must have channels";
  if (c.cell_channels != 0 && c.cell_channels != 2 && c.cell_channels != 4 && c.cell_channels != 8) {
    return "norm_convolution: cells must have 2, 4 or 8 channels";
  }
  // Windows begin in the input, and end at most two pixels after it.
  const auto ends = [&](int32_t results, int32_t before, int32_t size) {
    const int64_t end = (results - int64_t{1}) * c.stride - before + c.kernel_size;
    return end - c.kernel_size < size && end <= size + c.kernel_size - 1;
  };
  if (!ends(c.result_height, c.top, c.height) || !ends(c.result_width, c.left, c.width)) {
    return "norm_convolution: the result is larger than its input allows";
  }
  constexpr int64_t most = INT32_MAX;
  const int64_t pixels = int64_t{c.height} * c.width, results = int64_t{c.result_height} * c.result_width;
  if (pixels > most || results > most || c.images > most / results) {
    return "norm_convolution: there are more pixels than one launch takes";
  }
  if (c.kernel_size == 1 && c.stride == 1 && (c.result_height != c.height || c.result_width != c.width)) {
    return "norm_convolution: the result must be as large as its input";
  }
  return nullptr;
}

// Everything but addresses.
Arguments arguments_of(const Call& c) {
  Arguments a = {};
  a.outputs[0].channels = c.result_channels;
  a.outputs[1].channels = c.second_channels;
  a.activation = static_cast<Activation>(c.activation);
  a.has_norm = c.has_norm != 0;
  a.height = c.height;
  a.width = c.width;
  a.channels = c.channels;
  a.top = c.top;
  a.left = c.left;
  a.stride = c.stride;
  a.chunks = static_cast<int>(ceil_div(c.channels, chunk_channels));
  a.taps = c.kernel_size * c.kernel_size;
  a.buffers = c.has_residual ? 2 : 1;
  a.cell_log2 = c.cell_channels == 0 ? 0 : log2_of(c.cell_channels);
  a.cells = c.cell_channels == 0 ? 0 : c.result_channels / c.cell_channels;
  return a;
}

// What is launched; null, or why it cannot be.
const char* plan(const Call& c, Plan& found) {
  if (const char* problem = why_wrong(c)) return problem;
  gpu::Device device;
  if (const char* error = gpu::current_device(device)) return error;
  if (device.capability != 90) return "norm_convolution: the kernel is for GPUs of capability 9.0";
  found = plan_for(c, arguments_of(c), device);
  if (found.tiling.columns == 0) return "norm_convolution: the convolution cannot be cut to fit the device";
  const Patches& p = found.arguments.patches;
  found.arguments.strips = static_cast<int>(p.per_image.value << p.units_log2);
  return nullptr;
}

template <typename T>
const char* run(const Prepared& prepared, const Arguments& arguments, void* stream) {
  gpu::LaunchShape shape{prepared.blocks, arguments.cluster, prepared.shared_bytes};
  shape.overlaps = true;
  switch (prepared.tiling.columns) {
    case 64:
      return prepared.tiling.units == 1 ? gpu::launch<NormConvolution<T, 64, 1>>(shape, arguments, stream)
                                        : gpu::launch<NormConvolution<T, 64, 2>>(shape, arguments, stream);
    case 128:
      return gpu::launch<NormConvolution<T, 128, 2>>(shape, arguments, stream);
    default:
      return gpu::launch<NormConvolution<T, 256, 1>>(shape, arguments, stream);
  }
}

bool are_aligned(int bytes, std::initializer_list<const void*> addresses) {
  uintptr_t together = 0;
  for (const void* p : addresses) together |= reinterpret_cast<uintptr_t>(p);
  return together % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace
}  // namespace bitfast::norm_convolution

BITFAST_ENTRY const char* bitfast_norm_convolution_prepare(
    const bitfast::norm_convolution::Call* call, bitfast::norm_convolution::Prepared* prepared) {
  using namespace bitfast::norm_convolution;
  Plan found;
  if (const char* problem = plan(*call, found)) return problem;
  const Arguments& a = found.arguments;
  const int64_t tiles = int64_t{a.tiles} * a.cluster;
  *prepared = {found.tiling, a.stages, a.strips, a.shared.bytes, found.blocks, tiles, found.cost, call->dtype};
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof a <= sizeof prepared->arguments);
  memcpy(prepared->arguments, &a, sizeof a);
  return nullptr;
}

BITFAST_ENTRY const char* bitfast_norm_convolution(
    const bitfast::norm_convolution::Prepared* prepared, void* stream, const void* x, const float* factors,
    const void* packed, const void* residual, void* result, float* partials, const void* second_packed,
    void* second_result) {
  using namespace bitfast::norm_convolution;
  if (prepared->blocks == 0) return nullptr;
  Arguments a;
  memcpy(&a, prepared->arguments, sizeof a);
  const bool are_complete = x != nullptr && packed != nullptr && result != nullptr &&
                            (factors != nullptr) == a.has_norm && (residual != nullptr) == (a.buffers > 1) &&
                            (partials != nullptr) == (a.cells > 0) &&
                            (second_packed != nullptr) == (a.outputs[1].channels > 0) &&
                            (second_result != nullptr) == (a.outputs[1].channels > 0);
  if (!are_complete) return "norm_convolution: an address is missing, or is not what the call was prepared for";
  if (!are_aligned(16, {x, factors, packed, residual, result, second_packed, second_result})) {
    return "norm_convolution: an address is not a multiple of 16";
  }
  if (!are_aligned(8, {partials})) return "norm_convolution: the address of the partials is not a multiple of 8";
  a.x = static_cast<const uint16_t*>(x);
  a.factors = factors;
  a.residual = static_cast<const uint16_t*>(residual);
  a.partials = partials;
  a.outputs[0].weights = static_cast<const unsigned char*>(packed);
  a.outputs[0].result = static_cast<uint16_t*>(result);
  a.outputs[1].weights = static_cast<const unsigned char*>(second_packed);
  a.outputs[1].result = static_cast<uint16_t*>(second_result);
  return prepared->dtype == static_cast<int32_t>(bitfast::gpu::Dtype::bfloat16)
             ? run<bitfast::gpu::BFloat16>(*prepared, a, stream)
             : run<bitfast::gpu::Half>(*prepared, a, stream);
}
