// stem: two rows of the convolution as products of matrices, in two ways.
//
// The left matrix of a row, with a window of 8 pixels in each of its rows, is the ring itself (csrc/stem_images.h); the
// right one holds the filters. K has 7 * 32 numbers: 7 rows of a filter, each of two halves of 16 numbers.
#pragma once

#include "stem_tiles.h"

namespace bitfast::stem {

// A thread's part of two rows of the convolution, 16 columns of a warp, 64 channels: by row, 8 channels, and number.
// Numbers 0 and 1 are of column lane / 4, channels 8 * j + lane % 4 * 2 and the next; 2 and 3 of column lane / 4 + 8.
using Sums = float[rows_per_step][group_channels / 8][4];

// The row of the ring that holds a row of the images.
template <int row_bytes>
BITFAST_GPU int place_in_ring(int row) {
  return (row & (ring_rows - 1)) * row_bytes;
}

// Each warp multiplies its 16 columns. Filters lie in shared memory as vectors of 16 bytes, `channel_bytes` from those of
// the next channel and `vector_bytes` from the next of the same one.
template <typename T, int row_bytes, int channel_bytes, int vector_bytes>
BITFAST_GPU void multiply_by_warps(
    Sums& sums, const unsigned char* ring, const unsigned char* filters, int row, bool first_is_unused) {
  const int thread = not_before_here(static_cast<int>(threadIdx.x)), lane = thread % 32, warp = thread / 32;
  const unsigned char* window = ring + (warp * 16 + lane % 16 + lane / 16) * pair_bytes;
  const unsigned char* filter = filters + (lane / 16 * 8 + lane % 8) * channel_bytes + lane / 8 % 2 * vector_bytes;
  // The unused pixel may be infinite, and would give NaN though its weight is zero.
  const bool drops_first = first_is_unused && lane % 4 < 2, drops_last = !first_is_unused && lane % 4 >= 2;
#pragma unroll 1  // there are registers for no more
  for (int y = 0; y < filter_size; ++y) {
    const unsigned char* upper = window + place_in_ring<row_bytes>(row + y);
    const unsigned char* lower = window + place_in_ring<row_bytes>(row + y + 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pixels[rows_per_step][4], weights[group_channels / 16][4];
      load_matrices(pixels[0], upper + half * 2 * pair_bytes);
      load_matrices(pixels[1], lower + half * 2 * pair_bytes);
#pragma unroll
      for (int r = 0; r < rows_per_step; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (half == 0 ? drops_first : drops_last) pixels[r][2 * half + i] = 0;
        }
      }
#pragma unroll
      for (int j = 0; j < group_channels / 16; ++j) {
        load_matrices(weights[j], filter + j * 16 * channel_bytes + (y * 2 + half) * 2 * vector_bytes);
      }
#pragma unroll
      for (int j = 0; j < group_channels / 8; ++j) {
        const uint32_t first = weights[j / 2][j % 2 * 2], second = weights[j / 2][j % 2 * 2 + 1];
        multiply_add_16x8x16<T>(sums[0][j], pixels[0], first, second);
        multiply_add_16x8x16<T>(sums[1][j], pixels[1], first, second);
      }
    }
  }
}

// Products by warps: mma.sync, on every GPU from capability 80 on. Rows of filters end with unused bytes, so that the
// eight rows of a matrix lie in different banks.
template <typename T, int columns_>
struct ByWarps {
  static constexpr int columns = columns_, capability = 80, row_bytes = (columns + window_pairs) * pair_bytes;
  static constexpr int vector_bytes = 16, channel_bytes = 2 * filter_numbers + 16;
  static constexpr int filters_bytes = group_channels * channel_bytes;
  static constexpr bool needs_finite_pixels = false, leaves_registers = false;

  static BITFAST_GPU void begin(
      Sums& sums, const unsigned char* ring, const unsigned char* filters, int row, bool first_is_unused) {
    multiply_by_warps<T, row_bytes, channel_bytes, vector_bytes>(sums, ring, filters, row, first_is_unused);
  }
  static BITFAST_GPU void finish(Sums&, const unsigned char*, const unsigned char*, int, bool, bool) {}
};

// Products by groups of four warps, which read both matrices from shared memory: wgmma, on capability 90 only. They
// multiply the unused pixels, too; where a pixel is not finite, warps multiply again.
template <typename T, int columns_>
struct ByWarpGroups {
  static constexpr int columns = columns_, capability = 90, row_bytes = (columns + window_pairs) * pair_bytes;
  static constexpr int channel_bytes = 16, vector_bytes = group_channels * channel_bytes;
  static constexpr int filters_bytes = filter_numbers / 8 * vector_bytes;
  static constexpr bool needs_finite_pixels = true, leaves_registers = true;

  static BITFAST_GPU void begin(
      Sums& sums, const unsigned char* ring, const unsigned char* filters, int row, bool) {
    const unsigned char* windows = ring + static_cast<int>(threadIdx.x) / 128 * 64 * pair_bytes;
    begin_products(sums);
#pragma unroll
    for (int y = 0; y < filter_size; ++y) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned char* part = filters + (y * 2 + half) * 2 * vector_bytes;
        const MatrixPlace weights = matrix_at(part, vector_bytes, 8 * channel_bytes);
#pragma unroll
        for (int r = 0; r < rows_per_step; ++r) {
          const unsigned char* pixels = windows + place_in_ring<row_bytes>(row + y + 2 * r) + half * 2 * pair_bytes;
          multiply_add_64xNx16<T>(sums[r], matrix_at(pixels, pair_bytes, 8 * pair_bytes), weights, true);
        }
      }
    }
    commit_products();
  }

  // The products have been begun in any case: the compiler lets them wait for each other where a condition decides.
  static BITFAST_GPU void finish(
      Sums& sums, const unsigned char* ring, const unsigned char* filters, int row, bool first_is_unused,
      bool all_are_finite) {
    wait_products(sums);
    if (all_are_finite) return;
#pragma unroll
    for (int i = 0; i < rows_per_step * group_channels / 2; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0;
    multiply_by_warps<T, row_bytes, channel_bytes, vector_bytes>(sums, ring, filters, row, first_is_unused);
  }
};

}  // namespace bitfast::stem
