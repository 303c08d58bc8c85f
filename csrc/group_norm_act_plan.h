// How a forward pass of group_norm_act is launched: by its shape and the limits of the GPU alone.
#pragma once

#include <algorithm>

#include "ceil_div.h"
#include "group_norm_act_cluster.h"
#include "group_norm_act_cuda.h"
#include "group_norm_act_two_pass.h"

namespace bitfast::group_norm_act {

using gpu::Device;

// How a pass is launched. slices == 0: it is not launched this way.
struct ClusterPlan {
  int slices = 0;   // of the channels
  int cluster = 0;  // blocks
  int threads = 0;
  int parts = 0;    // of a thread's vector of channels
  Layout layout;
  SharedPlan shared;
};

struct TilePlan {
  bool by_vectors = false;
  int slices = 0;
  int tiles = 0;  // of an image's pixels
  int64_t tile_pixels = 0;
  Layout layout;
};

inline int vector_of(const GroupNormActCall& c) { return c.dtype == static_cast<int>(Dtype::float32) ? 4 : 8; }

// Whether a slice of so many groups can be cut into vectors, at most so many.
inline bool is_sliceable(const GroupNormActCall& c, int64_t groups, int most_vectors) {
  const int64_t channels = groups * (c.channels / c.groups);
  return channels % vector_of(c) == 0 && channels / vector_of(c) <= most_vectors;
}

// The shapes that were the fastest, or within 3 % of it, on an H100 for the maps of R50x1 in bfloat16, batch 128:
// blocks of 50 KiB with 256 threads for images that two of them hold, else of 100 KiB with 512 threads (2 to a
// multiprocessor); larger ones where 8 blocks could not hold the image. Of few images every one takes as many blocks
// as there are, up to 8. Images that 8 blocks cannot hold are cut into slices of channels, as long as rows of them have
// 256 bytes.
inline ClusterPlan plan_clusters(const GroupNormActCall& c, const Device& device) {
  constexpr int most_threads = 512, shortest_row = 256;
  constexpr int64_t small_block = 50 * 1024, large_block = 100 * 1024;
  const int vector = vector_of(c);
  const int64_t group_channels = c.channels / c.groups;
  ClusterPlan plan;
  plan.parts = group_channels % vector == 0 ? 1 : vector / 2;
  if (device.capability < 90 || !c.is_aligned || group_channels % (vector / plan.parts) != 0) return plan;
  if (c.images * c.groups > INT32_MAX || c.pixels * c.channels * 16 / vector > INT32_MAX) return plan;
  for (int64_t slices = 1; slices <= c.groups; ++slices) {
    const int64_t groups = c.groups / slices, row = groups * group_channels * 16 / vector;
    if (slices > 1 && row < shortest_row) return plan;
    // A block holds less than 2^18 bytes.
    if (c.pixels * row > most_blocks * (int64_t{1} << 18)) continue;
    if (c.groups % slices != 0 || !is_sliceable(c, groups, most_threads)) continue;
    const int64_t block = c.pixels * row <= 2 * small_block ? small_block : large_block;
    const int widest = static_cast<int>(std::min<int64_t>(most_blocks, c.pixels));
    auto block_bytes = [&](int cluster) { return ceil_div(c.pixels, cluster) * row; };
    int cluster = 1;
    while (2 * cluster <= widest && block_bytes(cluster) > block) cluster *= 2;
    while (2 * cluster <= widest && 2 * cluster * slices * c.images <= device.multiprocessors) cluster *= 2;
    for (; cluster <= widest; cluster *= 2) {
      const bool is_small = block_bytes(cluster) <= small_block && row <= 256 * 16;
      const bool are_many = 2 * cluster * slices * c.images > device.multiprocessors;
      const int threads = is_small && are_many ? 256 : most_threads;
      const Layout layout = layout_of(
          static_cast<int>(groups * group_channels), static_cast<int>(group_channels), vector, plan.parts, threads);
      const SharedPlan shared = shared_plan(static_cast<int>(ceil_div(c.pixels, cluster)), layout);
      if (shared.bytes > device.shared_bytes_per_block) continue;
      plan.slices = static_cast<int>(slices);
      plan.cluster = cluster;
      plan.threads = threads;
      plan.layout = layout;
      plan.shared = shared;
      return plan;
    }
  }
  return plan;
}

// As many tiles as give 16 blocks to each multiprocessor, of at least 8 pixels for each thread. By vectors where that
// goes, else each group by itself.
inline TilePlan plan_tiles(const GroupNormActCall& c, const Device& device) {
  const int vector = vector_of(c);
  const int64_t group_channels = c.channels / c.groups;
  TilePlan plan;
  if (c.is_aligned) {
    for (int64_t slices = 1; slices <= c.groups && !plan.by_vectors; ++slices) {
      plan.by_vectors = c.groups % slices == 0 && is_sliceable(c, c.groups / slices, tile_threads);
      plan.slices = static_cast<int>(slices);
    }
  }
  if (plan.by_vectors) {
    const int channels = static_cast<int>(c.channels / plan.slices);
    plan.layout = layout_of(channels, static_cast<int>(group_channels), vector, vector, tile_threads);
  } else {
    plan.slices = static_cast<int>(c.groups);
    plan.layout = {};
    plan.layout.channels = plan.layout.group_channels = static_cast<int>(group_channels);
    plan.layout.groups = 1;
    plan.layout.members = 32;
    plan.layout.lanes = static_cast<int>(ceil_div(tile_threads, group_channels));
  }
  const int64_t rows = std::max<int64_t>(1, c.images * plan.slices);
  const int64_t wanted = ceil_div(16 * device.multiprocessors, rows);
  const int64_t most = ceil_div(c.pixels, 8 * plan.layout.lanes);
  plan.tile_pixels = ceil_div(c.pixels, std::min(wanted, most));
  plan.tiles = static_cast<int>(ceil_div(c.pixels, plan.tile_pixels));
  return plan;
}

inline int64_t workspace_bytes(const GroupNormActCall& c, const TilePlan& plan) {
  return c.images * plan.tiles * c.groups * static_cast<int64_t>(sizeof(float2));
}

}  // namespace bitfast::group_norm_act
