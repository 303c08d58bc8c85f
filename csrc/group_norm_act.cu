// group_norm_act on a GPU, forward, for dense channels_last feature maps: the entries, and the choice of the kernels.
#include "gpu.h"

#include "group_norm_act_plan.h"

namespace bitfast::group_norm_act {
namespace {

using gpu::LaunchShape;

// As many clusters as work at once, each with as many images to do, of one slice.
template <typename Kernel>
const char* launch_clusters(
    const GroupNormActCall& c, const ClusterPlan& plan, const Tensors& tensors, void* stream) {
  ClusterArguments a;
  a.tensors = tensors;
  a.layout = plan.layout;
  a.shared = plan.shared;
  a.weight_dtype = static_cast<Dtype>(c.weight_dtype);
  a.bias_dtype = static_cast<Dtype>(c.bias_dtype);
  a.activation = static_cast<Activation>(c.activation);
  a.eps = c.eps;
  a.images = static_cast<int>(c.images);
  a.slices = plan.slices;
  a.pixels = static_cast<int>(c.pixels);
  a.channels = static_cast<int>(c.channels);
  a.groups = static_cast<int>(c.groups);
  a.pitch = a.channels * (16 / vector_of(c));
  a.image_bytes = a.pixels * a.pitch;
  a.cluster = plan.cluster;
  a.block_pixels = a.pixels / plan.cluster;
  a.blocks_with_one_more = a.pixels % plan.cluster;
  LaunchShape shape{0, plan.cluster, plan.shared.bytes, plan.threads};
  int64_t clusters = 0;
  if (const char* error = gpu::resident_clusters<Kernel>(shape, clusters)) return error;
  const int64_t at_once = std::max<int64_t>(1, clusters / plan.slices);
  const int64_t rounds = ceil_div(c.images, at_once);
  shape.blocks = ceil_div(c.images, rounds) * plan.slices * plan.cluster;
  return gpu::launch<Kernel>(shape, a, stream);
}

template <typename T, bool adds>
const char* run_clusters(const GroupNormActCall& c, const ClusterPlan& plan, const Tensors& tensors, void* stream) {
  if (plan.parts == 1) return launch_clusters<ClusterKernel<T, 1, adds>>(c, plan, tensors, stream);
  return launch_clusters<ClusterKernel<T, vector_size<T> / 2, adds>>(c, plan, tensors, stream);
}

template <typename Moments, typename Normalize>
const char* launch_tiles(
    const TilePlan& plan, TileArguments a, int64_t images, int moments_bytes, int normalize_bytes, void* stream) {
  const int64_t blocks = images * plan.slices * plan.tiles;
  if (const char* error = gpu::launch<Moments>({blocks, 1, moments_bytes}, a, stream)) return error;
  if (a.tensors.residual != nullptr) a.tensors.x = a.tensors.total;
  return gpu::launch<Normalize>({blocks, 1, normalize_bytes}, a, stream);
}

template <typename T, bool adds>
const char* run_tiles(
    const GroupNormActCall& c, const TilePlan& plan, const Tensors& tensors, void* workspace, void* stream) {
  TileArguments a;
  a.tensors = tensors;
  a.workspace = static_cast<float2*>(workspace);
  a.layout = plan.layout;
  a.dtype = static_cast<Dtype>(c.dtype);
  a.weight_dtype = static_cast<Dtype>(c.weight_dtype);
  a.bias_dtype = static_cast<Dtype>(c.bias_dtype);
  a.activation = static_cast<Activation>(c.activation);
  a.eps = c.eps;
  a.pixels = c.pixels;
  a.tile_pixels = plan.tile_pixels;
  a.slices = plan.slices;
  a.tiles = plan.tiles;
  a.pivots = plan.layout.sums_bytes();
  a.channels = static_cast<int>(c.channels);
  a.groups = static_cast<int>(c.groups);
  if (plan.by_vectors) {
    return launch_tiles<TileMomentsKernel<T, adds>, TileNormalizeKernel<T>>(
        plan, a, c.images, moments_shared_bytes(plan.layout), normalize_shared_bytes(plan.layout), stream);
  }
  return launch_tiles<ElementMomentsKernel, ElementNormalizeKernel>(plan, a, c.images, tile_warps * 4, 0, stream);
}

const char* problem_of(const GroupNormActCall& c) {
  if (c.images < 0 || c.pixels < 1 || c.channels < 1 || c.groups < 1) return "a size is not positive";
  if (c.channels % c.groups != 0) return "the groups do not divide the channels";
  if (c.channels > (1 << 24)) return "too many channels";
  return nullptr;
}

bool are_aligned(const Tensors& t) {
  uintptr_t together = 0;
  for (const void* p : {t.x, t.residual, static_cast<const void*>(t.total), static_cast<const void*>(t.result)}) {
    together |= reinterpret_cast<uintptr_t>(p);
  }
  return together % 16 == 0;
}

}  // namespace
}  // namespace bitfast::group_norm_act

BITFAST_ENTRY const char* bitfast_group_norm_act_workspace(const GroupNormActCall* call, int64_t* bytes) {
  using namespace bitfast::group_norm_act;
  if (const char* problem = problem_of(*call)) return problem;
  Device device;
  if (const char* error = bitfast::gpu::current_device(device)) return error;
  const bool needs_none = call->images == 0 || plan_clusters(*call, device).slices > 0;
  *bytes = needs_none ? 0 : workspace_bytes(*call, plan_tiles(*call, device));
  return nullptr;
}

BITFAST_ENTRY const char* bitfast_group_norm_act_forward(
    const GroupNormActCall* call, void* stream, const void* x, const void* residual, const void* weight,
    const void* bias, void* total, void* result, float* mean, float* rstd, void* workspace) {
  using namespace bitfast::group_norm_act;
  if (const char* problem = problem_of(*call)) return problem;
  if (call->images == 0) return nullptr;
  const Tensors tensors{x, residual, weight, bias, residual != nullptr ? total : nullptr, result, mean, rstd};
  if (call->is_aligned && !are_aligned(tensors)) return "an address is not a multiple of 16";
  Device device;
  if (const char* error = bitfast::gpu::current_device(device)) return error;
  const ClusterPlan clusters = plan_clusters(*call, device);
  return bitfast::gpu::dispatch(static_cast<Dtype>(call->dtype), [&](auto zero) {
    using T = decltype(zero);
    if (clusters.slices > 0) {
      return residual != nullptr ? run_clusters<T, true>(*call, clusters, tensors, stream)
                                 : run_clusters<T, false>(*call, clusters, tensors, stream);
    }
    const TilePlan tiles = plan_tiles(*call, device);
    return residual != nullptr ? run_tiles<T, true>(*call, tiles, tensors, workspace, stream)
                               : run_tiles<T, false>(*call, tiles, tensors, workspace, stream);
  });
}

// For the tests: how the pass is launched, as (slices, cluster, threads), or (0, slices, tiles).
BITFAST_ENTRY const char* bitfast_group_norm_act_shape(const GroupNormActCall* call, int64_t (*shape)[3]) {
  using namespace bitfast::group_norm_act;
  if (const char* problem = problem_of(*call)) return problem;
  Device device;
  if (const char* error = bitfast::gpu::current_device(device)) return error;
  const ClusterPlan clusters = plan_clusters(*call, device);
  if (clusters.slices > 0) {
    (*shape)[0] = clusters.slices;
    (*shape)[1] = clusters.cluster;
    (*shape)[2] = clusters.threads;
    return nullptr;
  }
  const TilePlan tiles = plan_tiles(*call, device);
  (*shape)[0] = 0;
  (*shape)[1] = tiles.slices;
  (*shape)[2] = tiles.tiles;
  return nullptr;
}
