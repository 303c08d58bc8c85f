// stem: the kernel for GPUs from capability 80 on, by mma.sync.
#pragma once

#include "stem_tiles.h"

namespace bitfast::stem {

// Where things lie in shared memory, for tiles of so many columns. Rows end with unused bytes, so that the eight rows of
// a matrix, and the numbers that a warp writes at once, lie in different banks.
template <int columns>
struct SharedLayout {
  static constexpr int row_bytes = (columns + window_pairs) * pair_bytes;
  static constexpr int ring_bytes = ring_rows * row_bytes;
  static constexpr int filter_bytes = 2 * filter_numbers + 16;
  static constexpr int filters_bytes = group_channels * filter_bytes;
  static constexpr int pixel_bytes = 2 * group_channels + 16;
  static constexpr int buffer_bytes = columns * pixel_bytes;

  static constexpr int bytes = ring_bytes + filters_bytes + buffer_bytes;
};

// Brings the rows of one tile from the images into the ring.
template <typename T, typename Number, int columns, int threads>
struct Loader {
  using Layout = SharedLayout<columns>;
  static constexpr int tasks = (image_rows_per_step * (columns + window_pairs - 1) + threads - 1) / threads;

  const Images& images;
  const Number* image;
  int first, count;  // the tile's pairs, numbered from 0, that lie in the image
  int pair_of_first;
  int place[tasks];  // of each task of a step: its row, and its pair

  BITFAST_GPU Loader(const Arguments& a, const Tile& tile)
      : images(a.images), image(static_cast<const Number*>(a.images.data) + tile.image * a.images.image_stride) {
    const int before = a.pairs_before - tile.first_column, in_image = (images.width + 1) / 2;
    first = max(before, 0);
    count = max(min(columns + window_pairs - 1, in_image + before) - first, 0);
    pair_of_first = first - before;
#pragma unroll
    for (int i = 0; i < tasks; ++i) place[i] = place_of(static_cast<int>(threadIdx.x) + i * threads);
  }

  BITFAST_GPU int place_of(int task) const {
    return count == 0 ? -1 : task / count * 0x10000 + task % count;
  }

  // The pairs of a step that this thread brings.
  BITFAST_GPU void read(RawPair<Number> (&raw)[tasks], int row) const {
#pragma unroll
    for (int i = 0; i < tasks; ++i) {
      const int at = not_before_here(place[i]);
      if (is_in_step(at)) raw[i] = read_pair(images, image, row + (at >> 16), pair_of_first + (at & 0xffff));
    }
  }
  BITFAST_GPU void write(unsigned char* ring, const RawPair<Number> (&raw)[tasks], int row) const {
#pragma unroll
    for (int i = 0; i < tasks; ++i) {
      const int at = not_before_here(place[i]);
      if (is_in_step(at)) put(ring, raw[i], row, at);
    }
  }

  // The rows of the first step.
  BITFAST_GPU void fill(unsigned char* ring, int row) const {
    for (int task = static_cast<int>(threadIdx.x); task < image_rows_in_use * count; task += threads) {
      const int at = place_of(task);
      put(ring, read_pair(images, image, row + (at >> 16), pair_of_first + (at & 0xffff)), row, at);
    }
  }

 private:
  static BITFAST_GPU bool is_in_step(int at) { return at >= 0 && at < image_rows_per_step << 16; }

  BITFAST_GPU void put(unsigned char* ring, const RawPair<Number>& raw, int row, int at) const {
    unsigned char* to = ring + ((row + (at >> 16)) & (ring_rows - 1)) * Layout::row_bytes;
    store_shared_16(to + (first + (at & 0xffff)) * pair_bytes, pixels_of<T>(raw, images.reading));
  }
};

// A thread's part of two rows of the convolution: 16 columns of a warp, 64 channels. By row, 8 channels, and number.
using Sums = float[rows_per_step][group_channels / 8][4];

// The column and the channels of a part: columns lane / 4 (numbers 0 and 1) and lane / 4 + 8 (2 and 3), channels
// 8 * j + lane % 4 * 2 and the next.
template <typename T>
BITFAST_GPU uint32_t rounded_pair(const float (&sums)[4], int half) {
  return pack_two<T>(sums[2 * half], sums[2 * half + 1]);
}

template <typename T, typename Number, int columns>
struct Stem {
  using Arguments = stem::Arguments;
  using Layout = SharedLayout<columns>;
  static constexpr int threads = 2 * columns, min_blocks = columns > 64 ? 2 : 3, capability = 80;
  using Loader = stem::Loader<T, Number, columns, threads>;

  static BITFAST_GPU void run(const Arguments& a) {
    unsigned char* ring = shared_memory();
    unsigned char* filters = ring + Layout::ring_bytes;
    unsigned char* buffer = filters + Layout::filters_bytes;
    const Tile tile = tile_of(a);
    clear(ring);
    load_filters(filters, a, tile);
    const Loader loader(a, tile);
    sync_block();

    // The row above the strip belongs to its first windows, unless it is one of zeros.
    const int begin = a.pools && a.first_conv_row + rows_per_step * tile.first_step > 0 ? tile.first_step - 1 : tile.first_step;
    int row = a.first_image_row + image_rows_per_step * begin;
    loader.fill(ring, row);
    sync_block();
    uint32_t above[group_channels / 8][2] = {};
    for (int step = begin; step < tile.last_step; ++step, row += image_rows_per_step) {
      const bool is_last = step + 1 == tile.last_step;
      Sums sums = {};
      convolve(sums, ring, filters, row, a.first_is_unused);
      if (a.pools) {
        compare_rows(buffer, above, sums, a, step);
      } else {
        store_rows(buffer, sums, a, tile, step);
      }
      // Only now: during the product every register is taken. Another block multiplies meanwhile.
      RawPair<Number> next[Loader::tasks];
      if (!is_last) loader.read(next, row + image_rows_in_use);
      sync_block();
      if (a.pools && step >= tile.first_step) compare_columns(buffer, a, tile, step);
      if (!is_last) loader.write(ring, next, row + image_rows_in_use);
      sync_block();
    }
  }

  static BITFAST_GPU void clear(unsigned char* ring) {
    for (int i = static_cast<int>(threadIdx.x); i < Layout::ring_bytes / 16; i += threads) {
      store_shared_16(ring + i * 16, make_uint4(0, 0, 0, 0));
    }
  }

  static BITFAST_GPU void load_filters(unsigned char* filters, const Arguments& a, const Tile& tile) {
    constexpr int vectors = filter_numbers / 8;
    const auto* weight = static_cast<const uint16_t*>(a.weight) + tile.first_channel * filter_numbers;
    for (int i = static_cast<int>(threadIdx.x); i < group_channels * vectors; i += threads) {
      store_shared_16(filters + i / vectors * Layout::filter_bytes + i % vectors * 16, load_16(weight + i * 8));
    }
  }

  // Two rows of the convolution, of which the upper one begins at this row of the images.
  static BITFAST_GPU void convolve(
      Sums& sums, const unsigned char* ring, const unsigned char* filters, int row, bool first_is_unused) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const unsigned char* window = ring + (warp * 16 + lane % 16 + lane / 16) * pair_bytes;
    const unsigned char* filter = filters + (lane / 16 * 8 + lane % 8) * Layout::filter_bytes + lane / 8 % 2 * 16;
    // The unused pixel may be infinite, and would give NaN though its weight is zero.
    const uint32_t keep_first = first_is_unused && lane % 4 < 2 ? 0 : ~0u;
    const uint32_t keep_last = !first_is_unused && lane % 4 >= 2 ? 0 : ~0u;
#pragma unroll 1  // there are registers for no more
    for (int y = 0; y < filter_size; ++y) {
      const unsigned char* upper = window + ((row + y) & (ring_rows - 1)) * Layout::row_bytes;
      const unsigned char* lower = window + ((row + y + 2) & (ring_rows - 1)) * Layout::row_bytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pixels[rows_per_step][4], weights[group_channels / 16][4];
        load_matrices(pixels[0], upper + half * 2 * pair_bytes);
        load_matrices(pixels[1], lower + half * 2 * pair_bytes);
#pragma unroll
        for (int r = 0; r < rows_per_step; ++r) {
#pragma unroll
          for (int i = 0; i < 2; ++i) pixels[r][half == 0 ? i : 2 + i] &= half == 0 ? keep_first : keep_last;
        }
#pragma unroll
        for (int j = 0; j < group_channels / 16; ++j) {
          load_matrices(weights[j], filter + j * 16 * Layout::filter_bytes + (y * 2 + half) * 32);
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

  // This thread's place for numbers of 16 columns in a buffer.
  static BITFAST_GPU unsigned char* place_in(unsigned char* buffer) {
    const int thread = not_before_here(static_cast<int>(threadIdx.x)), lane = thread % 32, warp = thread / 32;
    return buffer + (warp * 16 + lane / 4) * Layout::pixel_bytes + lane % 4 * 4;
  }

  // Writes the larger of three rows, the last one of the step before among them, and keeps the lowest. Rows outside of
  // the convolution are the pool's padding.
  static BITFAST_GPU void compare_rows(
      unsigned char* buffer, uint32_t (&above)[group_channels / 8][2], const Sums& sums, const Arguments& a, int step) {
    unsigned char* mine = place_in(buffer);
    const int upper = a.first_conv_row + rows_per_step * step, lower = upper + 1;
    const uint32_t has_upper = upper >= 0 && upper < a.conv_height ? ~0u : 0;
    const uint32_t has_lower = lower >= 0 && lower < a.conv_height ? ~0u : 0;
#pragma unroll
    for (int j = 0; j < group_channels / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t first = rounded_pair<T>(sums[0][j], half) & has_upper;
        const uint32_t second = rounded_pair<T>(sums[1][j], half) & has_lower;
        *reinterpret_cast<uint32_t*>(mine + half * 8 * Layout::pixel_bytes + j * 16) =
            maximum_of_two<T>(maximum_of_two<T>(above[j][half], first), second);
        above[j][half] = second;
      }
    }
  }

  static BITFAST_GPU uint16_t* result_at(const Arguments& a, const Tile& tile, int row, int column, int channel) {
    const int64_t pixel = (tile.image * a.result_height + row) * a.result_width + column;
    return static_cast<uint16_t*>(a.result) + pixel * a.channels + tile.first_channel + channel;
  }

  // Writes a row of the result: of three columns each the largest. Columns outside of the convolution are padding.
  static BITFAST_GPU void compare_columns(const unsigned char* buffer, const Arguments& a, const Tile& tile, int row) {
    for (int i = not_before_here(static_cast<int>(threadIdx.x)); i < tile.results * 8; i += threads) {
      const int first = 2 * (i / 8) - tile.before, channel = i % 8 * 8;
      uint4 largest = column_or_zero(buffer, first, tile, channel);
#pragma unroll
      for (int k = 1; k < pool_size; ++k) {
        const uint4 other = column_or_zero(buffer, first + k, tile, channel);
        largest = make_uint4(
            maximum_of_two<T>(largest.x, other.x), maximum_of_two<T>(largest.y, other.y),
            maximum_of_two<T>(largest.z, other.z), maximum_of_two<T>(largest.w, other.w));
      }
      store_16(result_at(a, tile, row, tile.first_result + i / 8, channel), largest);
    }
  }

  static BITFAST_GPU uint4 column_or_zero(const unsigned char* buffer, int column, const Tile& tile, int channel) {
    if (column < 0 || column >= tile.columns) return make_uint4(0, 0, 0, 0);
    return load_shared_16(buffer + column * Layout::pixel_bytes + channel * 2);
  }

  // Writes two rows of the result. Each warp turns its own columns over in the buffer, so that it writes whole lines.
  static BITFAST_GPU void store_rows(
      unsigned char* buffer, const Sums& sums, const Arguments& a, const Tile& tile, int step) {
    const int thread = not_before_here(static_cast<int>(threadIdx.x)), lane = thread % 32;
    const int first_column = thread / 32 * 16;
#pragma unroll
    for (int r = 0; r < rows_per_step; ++r) {
      unsigned char* mine = place_in(buffer);
#pragma unroll
      for (int j = 0; j < group_channels / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(mine + half * 8 * Layout::pixel_bytes + j * 16) =
              rounded_pair<T>(sums[r][j], half);
        }
      }
      sync_warp();
      const int row = rows_per_step * step + r;
#pragma unroll
      for (int i = lane; i < 16 * 8; i += 32) {
        const int column = first_column + i / 8, channel = i % 8 * 8;
        if (row < a.conv_height && column < tile.results) {
          store_16(
              result_at(a, tile, row, tile.first_result + column, channel),
              load_shared_16(buffer + column * Layout::pixel_bytes + channel * 2));
        }
      }
      sync_warp();
    }
  }
};

}  // namespace bitfast::stem
