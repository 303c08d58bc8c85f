// norm_convolution on a GPU: the statistics of what a warp writes.
//
// A strip of the partials is a unit. A warp holds 16 pixels of it, 64 channels at a time, as products leave them: lane
// l has two channels of every 8, of pixels l / 4 and l / 4 + 8. Each lane takes mean and squares of its own few numbers
// exactly; then lanes merge theirs (Chan, Golub & LeVeque, 1979). As long as a lane has several vectors of 8 channels,
// two lanes that merge go on with half of them each.
#pragma once

#include "norm_convolution_tiles.h"

namespace bitfast::norm_convolution {

constexpr int piece_vectors = piece_channels / 8;

// How lanes merge; the same for all channels of a strip.
struct Merging {
  static constexpr int rounds = 3;  // over the lanes with the same channels

  bool has_first, has_second;  // whether this lane's pixels exist
  float inverse;               // 1 / the numbers that it has of a vector
  float share[rounds];         // of the other lane's numbers in all
  float weight[rounds];        // numbers of one lane times those of the other, over all
  float count;                 // numbers of two channels in the end

  BITFAST_GPU Merging(bool first, bool second) : has_first(first), has_second(second) {
    count = 2.0f * (static_cast<float>(first) + static_cast<float>(second));
    inverse = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const float other = gpu::shuffle_xor(count, lane_mask(round)), all = count + other;
      share[round] = all > 0.0f ? other / all : 0.0f;
      weight[round] = count * share[round];
      count = all;
    }
  }
  static BITFAST_GPU int lane_mask(int round) { return 16 >> round; }
  BITFAST_GPU float pixels() const { return 0.5f * count; }
};

struct Moments {
  float mean, squares;

  BITFAST_GPU void merge(const Moments& other, float share, float weight) {
    const float d = other.mean - mean;
    mean = gpu::fused_multiply_add(d, share, mean);
    squares = gpu::fused_multiply_add(d * d, weight, squares + other.squares);
  }
  BITFAST_GPU Moments from_lane(int mask) const {
    return {gpu::shuffle_xor(mean, mask), gpu::shuffle_xor(squares, mask)};
  }
};

// Of a lane's numbers of one vector: packed pairs of its first and of its second pixel.
template <typename T>
BITFAST_GPU Moments moments_of(const Merging& merging, uint32_t first, uint32_t second) {
  const float v[4] = {
      gpu::low_number<T>(first), gpu::high_number<T>(first), gpu::low_number<T>(second), gpu::high_number<T>(second)};
  float sum = 0.0f, squares = 0.0f;
  if (merging.has_first) sum += v[0] + v[1];
  if (merging.has_second) sum += v[2] + v[3];
  const float mean = sum * merging.inverse;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = v[i] - mean;
    if (i < 2 ? merging.has_first : merging.has_second) squares = gpu::fused_multiply_add(d, d, squares);
  }
  return {mean, squares};
}

// Merges the moments that this lane keeps with those that another one gives for its own.
BITFAST_GPU Moments merged(const Merging& merging, int round, int lane, const Moments& lower, const Moments& upper) {
  const int mask = Merging::lane_mask(round);
  const bool keeps_upper = (lane & mask) != 0;
  Moments kept = keeps_upper ? upper : lower;
  const Moments given = keeps_upper ? lower : upper;
  kept.merge(given.from_lane(mask), merging.share[round], merging.weight[round]);
  return kept;
}

// The first round, for two vectors: of each the packed pairs of the lane's two pixels.
template <typename T>
BITFAST_GPU Moments moments_of_pair(const Merging& merging, int lane, const uint32_t (&packed)[4]) {
  return merged(
      merging, 0, lane, moments_of<T>(merging, packed[0], packed[1]), moments_of<T>(merging, packed[2], packed[3]));
}

// The other rounds, for all vectors; leaves the moments of the cells of 64 channels in shared memory.
BITFAST_GPU void leave_cells(
    const Merging& merging, const Moments (&pairs)[piece_vectors / 2], int lane, int cell_log2, Moments* cells) {
  Moments cell = merged(
      merging, 2, lane, merged(merging, 1, lane, pairs[0], pairs[2]), merged(merging, 1, lane, pairs[1], pairs[3]));
  // Now the lane's two channels of its vector with those of its neighbours: as many numbers on either side.
  if (cell_log2 >= 2) cell.merge(cell.from_lane(1), 0.5f, 0.5f * merging.count);
  if (cell_log2 >= 3) cell.merge(cell.from_lane(2), 0.5f, merging.count);
  const int upper[] = {lane & Merging::lane_mask(0), lane & Merging::lane_mask(1), lane & Merging::lane_mask(2)};
  const int vector = (upper[0] ? 1 : 0) + (upper[1] ? 4 : 0) + (upper[2] ? 2 : 0);
  const int channel = vector * 8 + lane % 4 * 2;
  if ((channel & ((1 << cell_log2) - 1)) == 0) cells[channel >> cell_log2] = cell;
}

// What the four warps of a group have of a unit, in shared memory.
struct UnitMoments {
  float* pixels;   // of each warp
  Moments* cells;  // of each warp, `count` of them
  int count;

  BITFAST_GPU UnitMoments(unsigned char* shared, int cells_of_tile)
      : pixels(reinterpret_cast<float*>(shared)),
        cells(reinterpret_cast<Moments*>(shared + 16)),
        count(cells_of_tile) {}

  // Merges the warps' moments of a cell, of so many channels, in order.
  BITFAST_GPU Moments merged_cell(int cell, int channels) const {
    Moments all = cells[cell];
    float numbers = pixels[0] * static_cast<float>(channels);
    for (int warp = 1; warp < 4; ++warp) {
      const float others = pixels[warp] * static_cast<float>(channels), sum = numbers + others;
      const float share = sum > 0.0f ? others / sum : 0.0f;
      all.merge(cells[warp * count + cell], share, numbers * share);
      numbers = sum;
    }
    return all;
  }
};

}  // namespace bitfast::norm_convolution
