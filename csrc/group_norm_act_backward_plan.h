// group_norm_act, backward: how a GPU is used, by shape and by the device's limits. Integer arithmetic, as it runs in
// each call: less than a microsecond.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ceil_div.h"
#include "gpu.h"

namespace bitfast::group_norm_act_backward {

// ---- on chip ---------------------------------------------------------------------------------------------------------

// Of 16 bytes, that a thread holds of x and of grad: as many as registers allow. An eighth of 56x56 pixels, and a half
// of 28x28, over 24 rows of threads are 17, as are 14x14 over 12.
constexpr int most_pieces = 17;
constexpr int most_channels_per_thread = 2;  // whose parameters a thread reads
constexpr int most_cluster = 8;              // more are not portable

// How the units of the on-chip kernel are cut; group_norm_act_backward_on_chip.h says what they are. Places are bytes
// from the begin of shared memory, where x is.
struct OnChipPlan {
  int threads = 0;  // of a block; 0 if no unit fits
  int cluster = 1;
  int width = 0;      // channels of a unit
  int per_group = 0;  // channels of a group
  int vectors = 0;    // pieces of a pixel
  int rows = 0;       // pixels that a block's threads hold side by side
  bool halves_warps = false;  // whether a warp's halves have the same channels
  int summed_rows = 0;
  float inverse_count = 0;  // 1 / numbers in a group
  int data_bytes = 0;  // of a block's part of x
  int grad_at = 0, rows_sums_at = 0, parameters_at = 0, channel_sums_at = 0, coefficients_at = 0;
  int barriers_at = 0, mailbox_at = 0;
  int shared_bytes = 0;
};

// The blocks of each size that share a multiprocessor. 12 warps in all: registers for the pieces allow no more.
constexpr int blocks_of(int threads) { return threads == 192 ? 2 : 1; }

// A unit of `width` channels shared by `cluster` blocks, or a plan without threads if that does not fit.
inline OnChipPlan on_chip_plan(
    int threads, int cluster, int width, int64_t pixels, int per_group, int element_bytes, const gpu::Device& device) {
  OnChipPlan plan;
  plan.cluster = cluster;
  plan.width = width;
  plan.per_group = per_group;
  plan.vectors = width * element_bytes / 16;
  if (plan.vectors > threads || width > most_channels_per_thread * threads) return plan;
  plan.rows = threads / plan.vectors;
  const int64_t most_pixels = ceil_div(pixels, cluster);
  if (most_pixels > static_cast<int64_t>(plan.rows) * most_pieces) return plan;
  plan.halves_warps = 16 % plan.vectors == 0;
  plan.summed_rows = plan.halves_warps ? plan.rows / 2 : plan.rows;
  plan.inverse_count = static_cast<float>(1.0 / (static_cast<double>(pixels) * per_group));
  // A slot for each thread and piece; the last pieces are few, and so are their slots if no thread idles.
  const int slots = plan.rows * plan.vectors == threads
                        ? static_cast<int>(most_pixels) * plan.vectors
                        : static_cast<int>(ceil_div(most_pixels, plan.rows)) * threads;
  const int data = slots * 16, row = width * static_cast<int>(sizeof(float));
  const int mailbox = 2 * cluster * 2 * (width / per_group) * static_cast<int>(sizeof(float));
  plan.data_bytes = static_cast<int>(most_pixels) * plan.vectors * 16;
  plan.grad_at = data;
  plan.rows_sums_at = plan.grad_at + data;
  plan.parameters_at = plan.rows_sums_at + plan.summed_rows * 2 * row;
  plan.channel_sums_at = plan.parameters_at + 2 * 4 * row;
  plan.coefficients_at = plan.channel_sums_at + 2 * row;
  plan.barriers_at = plan.coefficients_at + 2 * row;
  plan.mailbox_at = plan.barriers_at + 16;
  plan.shared_bytes = plan.mailbox_at + mailbox;
  constexpr int reserved = 1024;  // by the hardware, for each block
  const int blocks = blocks_of(threads);
  if (plan.shared_bytes > device.shared_bytes_per_block ||
      blocks * (plan.shared_bytes + reserved) > device.shared_bytes_per_multiprocessor) {
    return plan;
  }
  plan.threads = threads;
  return plan;
}

// Bytes that cost as much as a unit's barriers and sums, when a block does little else.
constexpr int64_t unit_overhead(int cluster) { return cluster == 1 ? 2048 : 4096; }

// A row of memory that is shorter than a cache line, or than a sector, is read less well.
inline int64_t with_row_cost(int64_t bytes, int row_bytes) {
  return row_bytes >= 128 ? bytes : row_bytes >= 64 ? bytes * 9 / 8 : row_bytes >= 32 ? bytes * 5 / 4 : 2 * bytes;
}

// The units that keep the multiprocessors least busy: fewest bytes for the one that has the most to do. Of equals the
// smaller block and cluster: of two blocks on a multiprocessor one works while the other waits. No threads if none fits.
// In large batches of bfloat16, 56x56 pixels are cut into slices of 64 channels for clusters of 8, 28x28 into such for
// clusters of 2, 14x14 into 128 channels and 7x7 into 256 for single blocks.
inline OnChipPlan choose_on_chip(
    int64_t images, int64_t pixels, int64_t channels, int64_t groups, int element_bytes, const gpu::Device& device) {
  OnChipPlan best;
  const int vector = 16 / element_bytes;
  // 32 bits hold a unit's offsets and the number of units.
  const bool are_small = channels % vector == 0 && channels <= 1 << 16 && pixels <= 1 << 20 && images <= 1 << 20;
  if (device.capability < 90 || !are_small) return best;
  const int per_group = static_cast<int>(channels / groups);
  int step = per_group;  // whole groups, whole vectors
  while (step % vector != 0) step += per_group;
  constexpr int longest_row = 1024;
  int64_t least = INT64_MAX;
  for (const int threads : {192, 384}) {
    const int widest = std::max(step, longest_row / element_bytes);
    for (int cluster = 1; cluster <= most_cluster; cluster *= 2) {
      for (int width = step; width <= std::min<int64_t>(channels, widest); width += step) {
        if (channels % width != 0) continue;
        const OnChipPlan plan = on_chip_plan(threads, cluster, width, pixels, per_group, element_bytes, device);
        if (plan.threads == 0) continue;
        const int64_t units = images * (channels / width);
        const int64_t resident = device.multiprocessors * blocks_of(threads) / cluster;
        if (resident == 0) continue;
        const int64_t side_by_side = ceil_div(units * cluster, device.multiprocessors);
        const int64_t blocks = std::clamp<int64_t>(side_by_side, 1, blocks_of(threads));
        const int64_t bytes = with_row_cost(plan.data_bytes, width * element_bytes);
        const int64_t cost = ceil_div(units, resident) * (blocks * bytes + unit_overhead(cluster) / blocks);
        if (cost < least) {
          least = cost;
          best = plan;
        }
      }
    }
  }
  return best;
}

// ---- in two passes ---------------------------------------------------------------------------------------------------

constexpr int two_pass_threads = 256;

// Blocks have a chunk of the channels and a tile of the pixels of an image.
struct TwoPassPlan {
  int vector = 1;     // neighbouring channels of a thread
  int vectors = 0;    // threads side by side: those of a chunk
  int rows = 0;       // pixels that a block's threads have side by side
  int64_t chunks = 0;
  int64_t tile = 0;   // pixels
  int64_t tiles = 0;
};

inline TwoPassPlan choose_two_pass(
    int64_t images, int64_t pixels, int64_t channels, int element_bytes, const gpu::Device& device) {
  TwoPassPlan plan;
  plan.vector = channels % (16 / element_bytes) == 0 ? 16 / element_bytes : 1;
  const int64_t vectors = channels / plan.vector;
  plan.chunks = ceil_div(vectors, two_pass_threads);
  plan.vectors = static_cast<int>(ceil_div(vectors, plan.chunks));
  plan.rows = two_pass_threads / plan.vectors;
  // Enough blocks for all multiprocessors, none too small to be worth its sums, and no long sums in float32.
  const int64_t wanted = ceil_div(8 * device.multiprocessors, std::max<int64_t>(1, images * plan.chunks));
  plan.tile = std::clamp<int64_t>(ceil_div(pixels, wanted), 4 * plan.rows, 64 * plan.rows);
  plan.tiles = ceil_div(pixels, plan.tile);
  return plan;
}

// ---- what a call does ------------------------------------------------------------------------------------------------

struct BackwardPlan {
  OnChipPlan on_chip;    // without threads: in two passes
  TwoPassPlan two_pass;
  int64_t rows = 0;         // of sums of channels: [rows][2][channels]
  int64_t group_means = 0;  // numbers
};

// is_simple: the activation is a ReLU or none, whose dz needs no rounding to the feature map's dtype.
inline BackwardPlan plan_backward(
    int64_t images, int64_t pixels, int64_t channels, int64_t groups, int element_bytes, bool is_simple,
    const gpu::Device& device) {
  BackwardPlan plan;
  if (is_simple) plan.on_chip = choose_on_chip(images, pixels, channels, groups, element_bytes, device);
  if (plan.on_chip.threads != 0) {
    plan.rows = images * plan.on_chip.cluster;
  } else {
    plan.two_pass = choose_two_pass(images, pixels, channels, element_bytes, device);
    plan.rows = images * plan.two_pass.tiles;
    plan.group_means = images * 2 * groups;
  }
  return plan;
}

}  // namespace bitfast::group_norm_act_backward
