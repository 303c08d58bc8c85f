// norm_convolution on a GPU: the statistics of what a warp writes.
//
// A warp holds 16 pixels (a strip) of 64 channels at a time, as products leave them: lane l has two channels of every 8,
// of pixels l / 4 and l / 4 + 8. Each lane takes mean and squares of its own few numbers exactly; then lanes merge theirs
// (Chan, Golub & LeVeque, 1979). As long as a lane has several vectors of channels, two lanes that merge go on with half
// of them each.
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

// Merges the moments of `count` vectors over the lanes that have the same channels. In the end the lane has those of one
// vector, `which`, in moments[0].
template <int round, int count>
BITFAST_GPU void merge_lanes(const Merging& merging, Moments* moments, int lane, int& which) {
  if constexpr (round < Merging::rounds) {
    const int mask = Merging::lane_mask(round);
    const bool takes_upper = (lane & mask) != 0;
    if (takes_upper) which += count / 2;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const Moments given = takes_upper ? moments[i] : moments[i + count / 2];
      moments[i] = takes_upper ? moments[i + count / 2] : moments[i];
      moments[i].merge(given.from_lane(mask), merging.share[round], merging.weight[round]);
    }
    merge_lanes<round + 1, count / 2>(merging, moments, lane, which);
  }
}

// Writes the partials of 64 channels of a strip. `packed`: of each vector the pairs of the lane's two pixels; `channels`:
// how many of the 64 there are; `partials`: of the strip, from the first of these channels on.
template <typename T>
BITFAST_GPU void write_partials(
    const Merging& merging, const uint32_t (&packed)[2 * piece_vectors], int lane, int channels, int cell_channels,
    float* partials) {
  Moments moments[piece_vectors];
#pragma unroll
  for (int i = 0; i < piece_vectors; ++i) moments[i] = moments_of<T>(merging, packed[2 * i], packed[2 * i + 1]);
  int vector = 0;
  merge_lanes<0, piece_vectors>(merging, moments, lane, vector);
  // Now the lane's two channels of that vector with those of its neighbours: as many numbers on either side.
  Moments cell = moments[0];
  if (cell_channels >= 4) cell.merge(cell.from_lane(1), 0.5f, 0.5f * merging.count);
  if (cell_channels >= 8) cell.merge(cell.from_lane(2), 0.5f, merging.count);
  const int channel = vector * 8 + lane % 4 * 2;
  if (channel % cell_channels != 0 || channel >= channels) return;
  gpu::store_8(
      partials + channel / cell_channels * 2, make_uint2(gpu::bits_of(cell.mean), gpu::bits_of(cell.squares)));
}

}  // namespace bitfast::norm_convolution
