// norm_convolution on a GPU: how a convolution is cut into tiles, chosen for its shape; on the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "ceil_div.h"
#include "norm_convolution_multipliers.h"

namespace bitfast::norm_convolution {

// How a convolution is done: the choices, and what follows from them.
struct Plan {
  Tiling tiling = {};  // of no columns if the convolution cannot be cut so
  Arguments arguments = {};
  int64_t blocks = 0;
  double cost = 0;
};


inline int log2_of(int power_of_two) {
  int n = 0;
  while (1 << n < power_of_two) ++n;
  return n;
}

// ---- patches --------------------------------------------------------------------------------------------------------

struct PatchShape {
  int units = 0, rows = 0, columns = 0;
};

// Positions of a patch in a plane.
inline int positions_of(const Call& c, const PatchShape& shape) {
  const int pitch = shape.columns + 3 - c.stride, read = shape.units * unit_pixels;
  return c.stride == 1 ? read + 2 * pitch + 2 : read + 3 * (shape.rows + 1) * pitch;
}

// The shape of patches for 3x3 filters, for tiles of so many units (a power of two) and planes of at most so many
// positions: the one that takes the fewest units for an image; of these the one that brings the fewest pixels, halos
// counted. Of no units if there is none.
inline PatchShape patch_shape(const Call& c, int tile_units, int most_positions) {
  const int gap = 3 - c.stride;  // positions from a row's last result to the next row's first
  PatchShape best;
  int64_t fewest_units = 0, fewest_items = 0;
  for (int units = 1; units <= tile_units; units *= 2) {
    for (int most_columns = std::min(c.result_width, units * unit_pixels); most_columns > 0; --most_columns) {
      const int64_t across = ceil_div(c.result_width, most_columns);
      PatchShape shape{units, 0, static_cast<int>(ceil_div(c.result_width, across))};
      shape.rows = std::min((units * unit_pixels + gap) / (shape.columns + gap), c.result_height);
      while (shape.rows > 0 && tile_units / units * positions_of(c, shape) > most_positions) --shape.rows;
      if (shape.rows == 0) continue;
      const int down = static_cast<int>(ceil_div(c.result_height, shape.rows));
      shape.rows = static_cast<int>(ceil_div(c.result_height, down));
      const int64_t patches = down * across;
      const int64_t items = patches * ((shape.rows - 1) * c.stride + 3) * ((shape.columns - 1) * c.stride + 3);
      const bool is_better = best.units == 0 || patches * units < fewest_units ||
                             (patches * units == fewest_units && items < fewest_items);
      if (is_better) {
        best = shape;
        fewest_units = patches * units;
        fewest_items = items;
      }
    }
  }
  return best;
}

// Of no patches if the filters are 3x3 and there is no shape for them.
inline Patches patches_of(const Call& c, int tile_units, int most_positions) {
  Patches p = {};
  if (c.kernel_size == 1) {
    // Runs of equal length.
    p.map_height = 1;
    p.map_width = c.result_height * c.result_width;
    p.rows = 1;
    p.columns = static_cast<int>(ceil_div(p.map_width, ceil_div(p.map_width, unit_pixels)));
    p.pitch = Divisor(unit_pixels);
    p.positions = unit_pixels;
    p.items_per_row = Divisor(c.result_width);
  } else {
    const PatchShape shape = patch_shape(c, tile_units, most_positions);
    if (shape.units == 0) return p;
    const int pitch = shape.columns + 3 - c.stride;
    p.map_height = c.result_height;
    p.map_width = c.result_width;
    p.rows = shape.rows;
    p.columns = shape.columns;
    p.units_log2 = log2_of(shape.units);
    p.pitch = Divisor(pitch);
    p.phase = c.stride == 1 ? 0 : (shape.rows + 1) * pitch;
    p.positions = positions_of(c, shape);
    p.items_per_row = Divisor((shape.columns - 1) * c.stride + 3);
  }
  const int64_t down = ceil_div(p.map_height, p.rows), across = ceil_div(p.map_width, p.columns);
  p.per_image = Divisor(static_cast<int>(down * across));
  p.per_row = Divisor(static_cast<int>(across));
  p.count = static_cast<int>(c.images * down * across);
  return p;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

constexpr int fewest_stages = 2, fewest_weight_stages = 2;

// Stages from loading to normalizing: memory has that long to answer, and one stage is always left to multiply.
inline int lag_of(int stages) { return stages <= 3 ? stages - 2 : stages / 2; }

inline int bytes_of(Arguments& a, int columns) {
  const int weight_stage = planes * columns * vector_bytes;
  a.shared.weights = a.stages * planes * a.plane_bytes;
  a.shared.buffers = a.shared.weights + a.weight_stages * weight_stage;
  a.shared.moments = a.shared.buffers + 4 * multiplier_groups * a.buffers * buffer_bytes;
  a.shared.barriers = a.shared.moments + 2 * multiplier_groups * a.unit_moments_bytes;
  const int barriers = 2 * most_stages + multiplier_groups + 2 * a.weight_stages;
  a.shared.bytes = a.shared.barriers + barriers * static_cast<int>(sizeof(gpu::Barrier));
  return a.shared.bytes;
}

// Positions that a plane may have so that the fewest stages fit.
inline int most_positions(const Arguments& a, int columns, int room) {
  const int weight_stages = a.keeps_weights ? a.chunks * a.taps : fewest_weight_stages;
  const int others = weight_stages * (planes * columns * vector_bytes + 16) +
                     2 * multiplier_groups * (a.unit_moments_bytes + 2 * a.buffers * buffer_bytes);
  return (room - others - 512) / fewest_stages / (planes * vector_bytes);
}

// Gives the rings as many stages as there is room for; false if that is too few.
inline bool fill_shared_memory(Arguments& a, int columns, int room) {
  const int steps = a.chunks * a.taps;
  // First so many stages that the input has time to come; then weights, which 3x3 filters read nine times as often.
  const int most_weights = a.keeps_weights ? steps : a.taps == 1 ? 4 : 6;
  const int fewest_weights = a.keeps_weights ? steps : fewest_weight_stages;
  for (const int fewest : {fewest_stages + 1, fewest_stages}) {
    for (a.weight_stages = most_weights; a.weight_stages >= fewest_weights; --a.weight_stages) {
      for (a.stages = most_stages; a.stages >= fewest; --a.stages) {
        a.lag = lag_of(a.stages);
        if (bytes_of(a, columns) <= room) return true;
      }
    }
  }
  return false;
}

// ---- the choice -----------------------------------------------------------------------------------------------------

// What a multiprocessor of an H100 does in a cycle, when all of them are busy.
constexpr double products_a_cycle = 2048;      // multiplications
constexpr double shared_bytes_a_cycle = 112;   // of 128, as some accesses conflict
constexpr double cache_bytes_a_cycle = 28;     // of the L2 cache
constexpr double memory_bytes_a_cycle = 13;

// Instructions of a warp, roughly as in its machine code, and how many it issues in a cycle. A loader has so many for a
// stage, for each patch of it, and for each of its items; a warp that writes, for a piece.
constexpr double instructions_a_cycle = 0.6;
constexpr double of_stage = 160, of_patch = 180, of_run_item = 4, of_row_item = 48, of_run_norm = 26, of_row_norm = 50;
constexpr double of_piece = 130, of_piece_residual = 90, of_piece_moments = 240;

constexpr double waiting_for_memory = 800;

// Cycles of the loaders for a stage.
inline double loading_cost(const Arguments& a, int patches, double items) {
  const bool are_runs = a.taps == 1 && a.stride == 1;
  const double of_norm = !a.has_norm ? 0 : are_runs ? of_run_norm : of_row_norm;
  const double of_item = (are_runs ? of_run_item : of_row_item) + of_norm;
  const double instructions = of_stage + patches * (of_patch + std::ceil(items / items_at_once) * of_item);
  // A stage that is normalized as soon as it has been asked for is waited for.
  return instructions / instructions_a_cycle + (a.lag == 0 ? waiting_for_memory : 0);
}

// Cycles of a group for what it writes of a tile.
inline double writing_cost(const Arguments& a, const Tiling& tiling, double columns) {
  const double instructions =
      of_piece + (a.buffers > 1 ? of_piece_residual : 0) + (a.cells > 0 ? of_piece_moments : 0);
  return tiling.units * std::ceil(columns / piece_channels) * instructions / instructions_a_cycle;
}

// What a tile costs, in cycles. What goes on side by side takes as long as the longest of it, in whose way the rest
// gets a little.
inline double tile_cost(const Call& c, const Arguments& a, const Tiling& tiling) {
  const Patches& p = a.patches;
  const int units = 1 << a.units_log2, patches = units >> p.units_log2;
  const double steps = static_cast<double>(a.chunks) * a.taps, across = static_cast<double>(a.tiles_per_row.value);
  const double columns = (c.result_channels + static_cast<double>(c.second_channels)) / across;  // that are results
  const double items = a.taps == 1 ? p.columns : p.items_per_row.value * ((p.rows - 1.0) * c.stride + 3);
  const double input_bytes = patches * items * c.channels * 2;
  const double result_bytes = patches * static_cast<double>(p.rows) * p.columns * columns * 2;
  const double weight_bytes = a.keeps_weights ? 0 : steps * tiling.columns * chunk_channels * 2;

  const double multiplying = units * unit_pixels * tiling.columns * chunk_channels * steps / products_a_cycle;
  const double loading = a.chunks * loading_cost(a, patches, items);
  const double writing = writing_cost(a, tiling, columns);
  const double multiplied_bytes = units * steps * (chunk_channels / 16) * 32 * (unit_pixels + tiling.columns);
  const double staged_bytes = input_bytes * (a.has_norm ? 3 : 1) + weight_bytes +
                              units * unit_pixels * columns * 2 * (c.has_residual ? 4 : 2);
  const double shared = (multiplied_bytes + staged_bytes) / shared_bytes_a_cycle;
  const double cache = (input_bytes + weight_bytes / a.cluster) / cache_bytes_a_cycle;
  const double reading = input_bytes / across / memory_bytes_a_cycle;
  const double storing = result_bytes * (c.has_residual ? 2 : 1) / memory_bytes_a_cycle;

  const double until_sums = std::max({multiplying, loading, shared, cache, reading});
  // With turns two tiles are at work; else groups write while nobody multiplies.
  const double longest = a.takes_turns ? std::max({until_sums, (until_sums + writing) / 2, reading + storing})
                                       : until_sums + std::max(writing, storing);
  const double all = multiplying + loading + shared + cache + reading + writing + storing;
  return longest + 0.1 * (all - longest);
}

// What a block costs besides: its first input, and weights that it keeps.
inline double block_cost(const Arguments& a, int columns) {
  const double kept_bytes = a.keeps_weights ? a.chunks * a.taps * static_cast<double>(columns) * chunk_channels * 2 : 0;
  return 2 * waiting_for_memory + kept_bytes / cache_bytes_a_cycle;
}

// Returns the plan of one way to cut.
inline Plan cut(const Call& c, const Arguments& common, const gpu::Device& device, const Tiling& tiling) {
  Plan plan;
  Arguments& a = plan.arguments;
  a = common;
  a.takes_turns = tiling.takes_turns;
  a.keeps_weights = tiling.keeps_weights;
  a.cluster = tiling.cluster;
  if (a.keeps_weights && int64_t{a.chunks} * a.taps > most_weight_stages) return plan;
  if (a.cells > 0) a.unit_moments_bytes = 16 + 4 * (tiling.columns >> a.cell_log2) * static_cast<int>(sizeof(Moments));
  const int units = tiling.units * (a.takes_turns ? 1 : multiplier_groups);
  a.units_log2 = log2_of(units);
  a.patches = patches_of(c, units, most_positions(a, tiling.columns, device.shared_bytes_per_block));
  if (a.patches.positions == 0) return plan;
  const int patches = units >> a.patches.units_log2;
  a.plane_bytes = (patches * a.patches.positions | 1) * vector_bytes;
  if (a.plane_bytes >= 1 << 18) return plan;
  int across = 0;
  for (Output& output : a.outputs) {
    output.tiles = static_cast<int>(ceil_div(output.channels, tiling.columns));
    across += output.tiles;
  }
  a.tiles_per_row = Divisor(across);
  const int64_t tiles = ceil_div(a.patches.count, patches * a.cluster) * across;  // of a cluster
  if (tiles > INT32_MAX / 2) return plan;  // so that indices past the last one are numbers, too
  a.tiles = static_cast<int>(tiles);
  int64_t clusters = std::min<int64_t>(tiles, device.multiprocessors / a.cluster);
  if (a.keeps_weights) clusters = clusters / across * across;  // each block has the same channels all the time
  if (clusters == 0 && tiles > 0) return plan;
  plan.blocks = clusters * a.cluster;
  if (!fill_shared_memory(a, tiling.columns, device.shared_bytes_per_block)) return plan;
  const int64_t rounds = clusters == 0 ? 0 : ceil_div(tiles, clusters);
  if (rounds * a.chunks * a.taps > INT32_MAX) return plan;
  plan.cost = tile_cost(c, a, tiling) * rounds + block_cost(a, tiling.columns);
  plan.tiling = tiling;
  return plan;
}

// The ways to cut: groups of warps that share a tile share the weights that come in for it, too, also with another
// block; those that take turns need weights that are kept. Of the ways that cost the same the first is taken.
constexpr Tiling tilings[] = {
    {64, 1, 1, 1, 1},  {64, 0, 1, 1, 1},  {64, 0, 0, 1, 1},  {64, 0, 0, 2, 1},   //
    {64, 1, 1, 1, 2},  {64, 0, 1, 1, 2},  {64, 0, 0, 1, 2},  {64, 0, 0, 2, 2},   //
    {128, 1, 1, 1, 2}, {128, 0, 1, 1, 2}, {128, 0, 0, 1, 2}, {128, 0, 0, 2, 2},  //
    {256, 1, 1, 1, 1}, {256, 0, 1, 1, 1}, {256, 0, 0, 1, 1}, {256, 0, 0, 2, 1}};

inline bool are_equal(const Tiling& a, const Tiling& b) {
  return a.columns == b.columns && a.takes_turns == b.takes_turns && a.keeps_weights == b.keeps_weights &&
         a.cluster == b.cluster && a.units == b.units;
}

// Chooses the cheapest way to cut, or takes the one that is wanted.
inline Plan plan_for(const Call& c, const Arguments& common, const gpu::Device& device) {
  Plan best;
  for (const Tiling& tiling : tilings) {
    if (c.tiling.columns != 0 && !are_equal(tiling, c.tiling)) continue;
    const Plan plan = cut(c, common, device, tiling);
    if (plan.tiling.columns != 0 && (best.tiling.columns == 0 || plan.cost < best.cost)) best = plan;
  }
  return best;
}

}  // namespace bitfast::norm_convolution
