// The statistics between convolutions that normalize what they read: partials of maps that another kernel wrote, and
// factors from partials, whoever wrote these.
#include "norm_convolution_statistics.h"

#include <algorithm>

#include "ceil_div.h"
#include "norm_convolution_cuda.h"

namespace bitfast::norm_convolution {
namespace {

constexpr int most_channels = 1 << 24, most_strips = 1 << 24;

bool is_aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// ---- partials -------------------------------------------------------------------------------------------------------

constexpr int most_strip_pixels = 1 << 16;  // more would cost digits, as each thread sums in float32
constexpr int fewest_thread_pixels = 4;     // in strips of many

const char* why_wrong(const PartialsCall& call) {
  if (call.dtype != static_cast<int32_t>(Dtype::bfloat16) && call.dtype != static_cast<int32_t>(Dtype::float16)) {
    return "norm_convolution: feature maps must be bfloat16 or float16";
  }
  if (call.channels < vector_channels || call.channels % vector_channels != 0 || call.channels > most_channels) {
    return "norm_convolution: channels must be a multiple of 8, up to 2^24";
  }
  if (call.cell_channels != 2 && call.cell_channels != 4 && call.cell_channels != 8) {
    return "norm_convolution: cells must have 2, 4 or 8 channels";
  }
  if (call.images < 0 || call.pixels < 1) return "norm_convolution: feature maps must not be empty";
  if (call.pixels > static_cast<int64_t>(most_strips) * most_strip_pixels) return "norm_convolution: too many pixels";
  return nullptr;
}

// How a block reads, but for the strips.
PartialsArguments arguments_of(const PartialsCall& call) {
  PartialsArguments a = {};
  a.pixels = call.pixels;
  a.channels = call.channels;
  const int vectors = call.channels / vector_channels, cells = vector_channels / call.cell_channels;
  a.slices = static_cast<int>(ceil_div(vectors, most_slice_vectors));
  a.slice_vectors = static_cast<int>(ceil_div(vectors, a.slices));
  a.slices = static_cast<int>(ceil_div(vectors, a.slice_vectors));
  a.lanes = partials_threads / a.slice_vectors;
  a.members = 1;
  while (a.members < 32 && 2 * a.members * a.slice_vectors * cells <= partials_threads) a.members *= 2;
  a.pitch = a.slice_vectors * cells + 1;
  return a;
}

int shared_bytes_of(const PartialsArguments& a) { return a.lanes * a.pitch * static_cast<int>(sizeof(float2)); }

// Calls function(Kernel{}) for the kernel of the call.
template <typename Function>
const char* with_kernel(const PartialsCall& call, const Function& function) {
  auto with_cells = [&](auto number) {
    using T = decltype(number);
    switch (call.cell_channels) {
      case 2:
        return function(PartialsKernel<T, 4>{});
      case 4:
        return function(PartialsKernel<T, 2>{});
      default:
        return function(PartialsKernel<T, 1>{});
    }
  };
  return call.dtype == static_cast<int32_t>(Dtype::bfloat16) ? with_cells(BFloat16{}) : with_cells(Half{});
}

// As many strips as take the least time, by rounds of blocks and pixels for each thread. A block costs as much as some
// pixels more: it starts, waits for the first ones, and merges. Of equals the fewest, as others will read the partials.
int strips_of(const PartialsCall& call, const PartialsArguments& a, int64_t at_once) {
  constexpr int more = 8;
  const int64_t parts = std::max<int64_t>(call.images * a.slices, 1);
  const int64_t fewest = ceil_div(call.pixels, most_strip_pixels);
  const int64_t most = std::min(ceil_div(call.pixels, fewest_thread_pixels * a.lanes), 2 * at_once / parts);
  int64_t best = fewest, least = INT64_MAX;
  for (int64_t strips = fewest; strips <= std::max(most, fewest); ++strips) {
    const int64_t pixels = ceil_div(call.pixels, strips);
    const int64_t cost = ceil_div(parts * strips, at_once) * (ceil_div(pixels, a.lanes) + more);
    if (cost < least) {
      least = cost;
      best = ceil_div(call.pixels, pixels);
    }
  }
  return static_cast<int>(best);
}

// ---- factors --------------------------------------------------------------------------------------------------------

constexpr int slice_channels = 2 * factors_threads;  // of which a block writes the factors, if groups are small
constexpr int fewest_columns = 8;                    // shorter pieces of memory would be read in vain

bool is_dtype(int32_t dtype) {
  return dtype >= static_cast<int32_t>(Dtype::float32) && dtype <= static_cast<int32_t>(Dtype::float16);
}

const char* why_wrong(const FactorsCall& call) {
  if (call.channels < vector_channels || call.channels % vector_channels != 0 || call.channels > most_channels) {
    return "norm_convolution: channels must be a multiple of 8, up to 2^24";
  }
  if (call.groups < 1 || call.channels % call.groups != 0) return "norm_convolution: groups must divide the channels";
  if (call.cell_channels != 2 && call.cell_channels != 4 && call.cell_channels != 8) {
    return "norm_convolution: cells must have 2, 4 or 8 channels";
  }
  if (call.channels / call.groups % call.cell_channels != 0) {
    return "norm_convolution: the channels of a group must be a multiple of those of a cell";
  }
  if (call.images < 0 || call.strips < 1) return "norm_convolution: an image must have a strip";
  if (call.strips > most_strips) return "norm_convolution: too many strips";
  if (!is_dtype(call.weight_dtype) || !is_dtype(call.bias_dtype)) {
    return "norm_convolution: weight and bias must be float32, bfloat16 or float16";
  }
  return nullptr;
}

// So many groups to a block that its threads read once, unless the pieces of memory became too short.
FactorsArguments arguments_of(const FactorsCall& call) {
  FactorsArguments a = {};
  a.strips = call.strips;
  a.channels = call.channels;
  a.groups = call.groups;
  a.cell_channels = call.cell_channels;
  a.weight_dtype = static_cast<Dtype>(call.weight_dtype);
  a.bias_dtype = static_cast<Dtype>(call.bias_dtype);
  a.eps = call.eps;
  const int group_channels = call.channels / call.groups;
  a.group_cells = group_channels / call.cell_channels;
  const int at_once = std::max(factors_threads * partials_at_once / call.strips, fewest_columns);  // cells
  const int most_cells = std::min({at_once, factors_threads, slice_channels / call.cell_channels});
  a.slice_groups = std::min(call.groups, std::max(most_cells / a.group_cells, 1));
  a.slices = static_cast<int>(ceil_div(call.groups, a.slice_groups));
  a.columns = std::min(a.slice_groups * a.group_cells, factors_threads);
  a.rows = factors_threads / a.columns;
  const int threads = std::min(a.group_cells, a.columns) * a.rows;  // that read a group
  a.members = 1;
  while (a.members < 32 && 2 * a.members <= threads && 2 * a.members * a.slice_groups <= factors_threads) {
    a.members *= 2;
  }
  return a;
}

}  // namespace
}  // namespace bitfast::norm_convolution

BITFAST_ENTRY const char* bitfast_norm_convolution_strips(
    const bitfast::norm_convolution::PartialsCall* call, int32_t* strips) {
  using namespace bitfast::norm_convolution;
  if (const char* problem = why_wrong(*call)) return problem;
  const PartialsArguments a = arguments_of(*call);
  return with_kernel(*call, [&](auto kernel) -> const char* {
    bitfast::gpu::LaunchShape shape{};
    shape.shared_bytes = shared_bytes_of(a);
    int64_t at_once;
    if (const char* error = bitfast::gpu::resident_clusters<decltype(kernel)>(shape, at_once)) return error;
    *strips = strips_of(*call, a, at_once);
    return nullptr;
  });
}

BITFAST_ENTRY const char* bitfast_norm_convolution_partials(
    const bitfast::norm_convolution::PartialsCall* call, void* stream, const void* x, float* partials) {
  using namespace bitfast::norm_convolution;
  if (const char* problem = why_wrong(*call)) return problem;
  if (call->strips < 1 || call->strips > most_strips ||
      bitfast::ceil_div(call->pixels, call->strips) > most_strip_pixels) {
    return "norm_convolution: the strips are too few or too many";
  }
  if (!is_aligned(x, 16) || !is_aligned(partials, sizeof(float2))) {
    return "norm_convolution: an address is not aligned";
  }
  if (call->images == 0) return nullptr;
  PartialsArguments a = arguments_of(*call);
  a.x = x;
  a.partials = reinterpret_cast<float2*>(partials);
  a.strips = call->strips;
  a.strip_pixels = static_cast<int>(bitfast::ceil_div(call->pixels, call->strips));
  const bitfast::gpu::LaunchShape shape{call->images * a.strips * a.slices, 1, shared_bytes_of(a)};
  return with_kernel(
      *call, [&](auto kernel) { return bitfast::gpu::launch<decltype(kernel)>(shape, a, stream); });
}

BITFAST_ENTRY const char* bitfast_norm_convolution_factors(
    const bitfast::norm_convolution::FactorsCall* call, void* stream, const float* partials, const void* weight,
    const void* bias, float* factors) {
  using namespace bitfast::norm_convolution;
  if (const char* problem = why_wrong(*call)) return problem;
  if (!is_aligned(partials, sizeof(float2)) || !is_aligned(factors, 16)) {
    return "norm_convolution: an address is not aligned";
  }
  FactorsArguments a = arguments_of(*call);
  a.partials = reinterpret_cast<const float2*>(partials);
  a.weight = weight;
  a.bias = bias;
  a.factors = factors;
  const int shared_bytes = FactorsKernel::found_bytes + a.slice_groups * static_cast<int>(sizeof(float2));
  bitfast::gpu::LaunchShape shape{call->images * a.slices, 1, shared_bytes};
  bitfast::gpu::Device device;
  if (const char* error = bitfast::gpu::current_device(device)) return error;
  shape.overlaps = device.capability >= 90;
  return bitfast::gpu::launch<FactorsKernel>(shape, a, stream);
}
