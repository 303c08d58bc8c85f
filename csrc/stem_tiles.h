// stem: how the work is cut into blocks, and what they share.
//
// A block computes 64 channels of a tile, some columns of the convolution, and marches down a strip of it, two rows a
// step. The rows of the images that it needs lie in a ring in shared memory. With the max-pool, a step ends with a row
// of the result: the largest of its two rows and of the last row of the step before, whose columns are compared then.
#pragma once

#include "stem_images.h"

namespace bitfast::stem {

constexpr int group_channels = 64;        // that a block computes
constexpr int rows_per_step = 2;          // of the convolution
constexpr int image_rows_per_step = 4;    // that come in
constexpr int image_rows_in_use = 9;      // that two rows of the convolution read
constexpr int filter_numbers = filter_size * 2 * window_pairs * 4;  // of one channel: 7 rows of 8 pixels of 4 channels
constexpr int pool_size = 3;

struct Arguments {
  Images images;
  const void* weight;  // (channels, 7, 8, 4)
  void* result;
  int conv_height, conv_width, channels;
  bool pools;
  int pool_left, result_height, result_width;
  int first_conv_row, first_image_row;  // of step 0; may lie above the images
  int pairs_before;                     // of column 0 of the convolution
  bool first_is_unused;                 // which of the eight pixels does not count: the first, or the last
  int steps, steps_per_strip, strips, tiles, groups;
  int first_tile_results, tile_results;  // columns of the result that the first tile of a row has, and others
};

// What a block computes.
struct Tile {
  int64_t image;
  int first_channel;
  int first_step, last_step;  // of which results are written, first to last - 1
  uint16_t* result;           // its first channel and column, in row 0
  int results;                // columns
  int first_column;           // of the convolution
  int columns;                // that the convolution has from there on; more may be computed
  int before;                 // columns of zeros that the first pooling window has before that
};

BITFAST_GPU Tile tile_of(const Arguments& a) {
  unsigned block = blockIdx.x;
  const auto next = [&block](int count) {
    const unsigned index = block % static_cast<unsigned>(count);
    block /= static_cast<unsigned>(count);
    return static_cast<int>(index);
  };
  Tile tile;
  tile.first_channel = next(a.groups) * group_channels;
  const int across = next(a.tiles);
  const int strip = next(a.strips);
  tile.image = block;
  tile.first_step = strip * a.steps_per_strip;
  tile.last_step = min(tile.first_step + a.steps_per_strip, a.steps);
  const int first_result = across == 0 ? 0 : a.first_tile_results + (across - 1) * a.tile_results;
  tile.results = min(across == 0 ? a.first_tile_results : a.tile_results, a.result_width - first_result);
  const int64_t pixel = tile.image * a.result_height * a.result_width + first_result;
  tile.result = static_cast<uint16_t*>(a.result) + pixel * a.channels + tile.first_channel;
  const int wanted = a.pools ? 2 * first_result - a.pool_left : first_result;
  tile.first_column = max(wanted, 0);
  tile.before = tile.first_column - wanted;
  tile.columns = a.conv_width - tile.first_column;
  return tile;
}

}  // namespace bitfast::stem
