// norm_convolution on a GPU: how the work is cut, and where it lies in shared memory.
//
// Results are cut into units of 64 pixels of one image, the rows of a product. For 1x1 filters a unit is a run of
// pixels. For 3x3 filters some units share a patch of rows and columns, whose input is brought once, with its halo, and
// read nine times, each time from a few positions further on: so units count positions along the rows of the input, of
// which some at the end of each row belong to no result. With stride 2 the even and the odd rows and columns lie apart,
// so that the positions that a place in the filter reads still follow each other.
//
// A tile is some units times `columns` channels of a result. Blocks stay, and take one tile after the other, those of
// the same pixels one after the other. Two blocks of a cluster have tiles of the same channels at the same time, and
// each brings half of the weights for both.
//
// Shared memory holds 64 channels of a tile's input at a time, as 8 planes of vectors of 8 channels, one for each
// position: a ring of stages. Weights lie likewise, a vector for each result channel. wgmma reads both as they are,
// without swizzle. A plane has an odd number of vectors, so that the eight of one position lie in different banks.
#pragma once

#include "activation_kinds.h"
#include "gpu_divisor.h"
#include "norm_convolution_cuda.h"

namespace bitfast::norm_convolution {

using gpu::Divisor;

constexpr int unit_pixels = 64;
constexpr int chunk_channels = 64;  // of the input, in a stage
constexpr int planes = 8, vector_bytes = 16;
constexpr int piece_channels = 64;  // of a result, that a warp writes at once
constexpr int warp_pixels = 16;     // that a warp has of a unit
constexpr int loaders = 96;         // threads that bring the input
constexpr int items_at_once = loaders / planes;
constexpr int most_stages = 8, most_weight_stages = 32;

// The warps that multiply write through memory of their own, a row for each pixel.
constexpr int buffer_row_bytes = 2 * piece_channels + 16;
constexpr int buffer_bytes = warp_pixels * buffer_row_bytes;

// How a feature map is cut into patches. 1x1 filters take the map for a single row.
struct Patches {
  int count;                      // in all images
  Divisor per_image, per_row;
  int map_height, map_width;      // of the result
  int rows, columns;              // of a patch; less at the edges
  Divisor pitch;                  // positions from a row to the next
  int units_log2;                 // of a patch
  int positions;                  // in a plane
  int phase;                      // with stride 2, positions from the even columns to the odd ones; else 0
  Divisor items_per_row;          // what is brought: rows of so many pixels of the input
};

// Where things lie in shared memory, after the ring of the input. The host computes it.
struct SharedLayout {
  int weights, buffers, moments, barriers, bytes;
};

struct Output {
  const unsigned char* weights;
  uint16_t* result;
  int channels;
  int tiles;  // beside each other
};

struct Arguments {
  const uint16_t* x;
  const float* factors;
  const uint16_t* residual;
  float* partials;
  Output outputs[2];
  Activation activation;
  bool has_norm;
  int height, width, channels;
  int top, left, stride;
  int chunks, taps;         // chunks of channels; places in the filter
  Patches patches;
  int cluster;              // blocks
  int tiles;                // of a cluster
  Divisor tiles_per_row;    // beside each other, in both outputs
  int units_log2;           // of a tile
  bool takes_turns;
  int stages, lag;          // stages from loading to normalizing
  int plane_bytes;
  int weight_stages;        // as many as there are if a block keeps its weights
  bool keeps_weights;
  int buffers;              // of each warp
  SharedLayout shared;
  int cell_log2, cells, strips;  // a cell has 1 << cell_log2 channels; without partials there are none
  int unit_moments_bytes;   // of shared memory, for what the warps of a group have of a unit
};

// Of the stages: whether they may be read, or written again; and whether it is a group's turn.
struct Barriers {
  const Arguments& a;

  BITFAST_GPU gpu::Barrier* full(int stage) const { return at(stage); }
  BITFAST_GPU gpu::Barrier* empty(int stage) const { return at(most_stages + stage); }
  BITFAST_GPU gpu::Barrier* turn(int group) const { return at(2 * most_stages + group); }
  BITFAST_GPU gpu::Barrier* weights_full(int stage) const { return at(2 * most_stages + 2 + stage); }
  BITFAST_GPU gpu::Barrier* weights_empty(int stage) const { return at(2 * most_stages + 2 + a.weight_stages + stage); }

 private:
  BITFAST_GPU gpu::Barrier* at(int i) const {
    return reinterpret_cast<gpu::Barrier*>(gpu::shared_memory() + a.shared.barriers) + i;
  }
};

// A place in a ring, and the parity of the phase that its barrier is in.
struct RingPlace {
  int stage = 0, parity = 0;

  BITFAST_GPU void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Patch {
  int image, row, column;  // of its first result
  int rows, columns;       // of results
  int number;              // in the image

  BITFAST_GPU Patch(const Patches& p, int index) {
    image = p.per_image.divide(index);
    number = index;
    row = p.per_row.divide(index) * p.rows;
    column = index * p.columns;
    rows = min(p.rows, p.map_height - row);
    columns = min(p.columns, p.map_width - column);
  }

  // The number of a position's result, counted from the patch's first one; -1 if it has none.
  BITFAST_GPU int result_at(const Patches& p, int position) const {
    const int r = p.pitch.divide(position);
    return r < rows && position < columns ? r * p.map_width + position : -1;
  }
  // Of the first one in all images.
  BITFAST_GPU int64_t first_result(const Patches& p) const {
    return (static_cast<int64_t>(image) * p.map_height + row) * p.map_width + column;
  }
};

// The tiles of a block: every `step`th, from the first on.
struct BlockTiles {
  int first, step;

  BITFAST_GPU explicit BlockTiles(const Arguments& a)
      : first(static_cast<int>(blockIdx.x) / a.cluster), step(static_cast<int>(gridDim.x) / a.cluster) {}
};

// What a tile is of.
struct Tile {
  int first_patch;
  int column;            // its first channel
  bool is_second;        // whose

  BITFAST_GPU Tile(const Arguments& a, int tile, int columns) {
    const int row = a.tiles_per_row.divide(tile);
    const int rank = a.cluster == 1 ? 0 : gpu::cluster_rank();
    first_patch = (row * a.cluster + rank) << (a.units_log2 - a.patches.units_log2);
    is_second = tile >= a.outputs[0].tiles;
    column = (is_second ? tile - a.outputs[0].tiles : tile) * columns;
  }
};

}  // namespace bitfast::norm_convolution
