// stem: the kernel, for both ways to multiply.
#pragma once

#include "stem_products.h"

namespace bitfast::stem {

// Where things lie in shared memory: the ring, the filters, and buffers, each with a row of pixels of the convolution.
// Pixels end with unused bytes, so that the numbers that a warp writes at once lie in different banks.
template <typename Product, int buffers>
struct SharedLayout {
  static constexpr int ring_bytes = ring_rows * Product::row_bytes;
  static constexpr int pixel_bytes = 2 * group_channels + 16;
  static constexpr int buffer_bytes = Product::columns * pixel_bytes;
  static constexpr int bytes = ring_bytes + Product::filters_bytes + buffers * buffer_bytes;
};

// Brings the rows of one tile from the images into the ring.
template <typename T, typename Number, typename Product, int threads>
struct Loader {
  static constexpr int columns = Product::columns;
  static constexpr int tasks = (image_rows_per_step * (columns + window_pairs - 1) + threads - 1) / threads;

  const Images& images;
  const unsigned char* image;
  int before;        // pairs that the tile has before the image; the tile's are numbered from 0
  int first, count;  // the tile's pairs that lie in the image
  int place[tasks];  // of each task of a step: its row, and its pair

  BITFAST_GPU Loader(const Arguments& a, const Tile& tile)
      : images(a.images), image(a.images.data + tile.image * a.images.image_step) {
    before = a.pairs_before - tile.first_column;
    const int in_image = (images.width + 1) / 2;
    first = max(before, 0);
    count = max(min(columns + window_pairs - 1, in_image + before) - first, 0);
#pragma unroll
    for (int i = 0; i < tasks; ++i) place[i] = place_of(static_cast<int>(threadIdx.x) + i * threads);
  }

  BITFAST_GPU int place_of(int task) const {
    return count == 0 ? -1 : task / count * 0x10000 + first + task % count;
  }

  // The pairs of a step that this thread brings; zeros in the place of what is not wanted.
  BITFAST_GPU void read(RawPair<Number> (&raw)[tasks], int row, bool is_wanted) const {
#pragma unroll
    for (int i = 0; i < tasks; ++i) {
      const int at = not_before_here(place[i]);
      raw[i] = {};  // or the compiler would hold the last step's in registers
      if (is_wanted && is_in_step(at)) raw[i] = read_at(row, at);
    }
  }

  // Writes them to the ring; returns whether all of them are finite, or nobody asks.
  BITFAST_GPU bool write(unsigned char* ring, const RawPair<Number> (&raw)[tasks], int row) const {
    bool all_are_finite = true;
#pragma unroll
    for (int i = 0; i < tasks; ++i) {
      const int at = not_before_here(place[i]);
      if (is_in_step(at)) all_are_finite &= put(ring, raw[i], row, at);
    }
    return all_are_finite;
  }

  // Brings the rows of the first step; returns the same.
  BITFAST_GPU bool fill(unsigned char* ring, int row) const {
    bool all_are_finite = true;
    for (int task = static_cast<int>(threadIdx.x); task < image_rows_in_use * count; task += threads) {
      const int at = place_of(task);
      all_are_finite &= put(ring, read_at(row, at), row, at);
    }
    return all_are_finite;
  }

 private:
  static BITFAST_GPU bool is_in_step(int at) { return at >= 0 && at < image_rows_per_step << 16; }

  BITFAST_GPU RawPair<Number> read_at(int row, int at) const {
    return read_pair<Number>(images, image, row + (at >> 16), (at & 0xffff) - before);
  }

  BITFAST_GPU bool put(unsigned char* ring, const RawPair<Number>& raw, int row, int at) const {
    unsigned char* to = ring + place_in_ring<Product::row_bytes>(row + (at >> 16));
    const uint4 pixels = pixels_of<T>(raw, images.reading);
    store_shared_16(to + (at & 0xffff) * pair_bytes, pixels);
    return !Product::needs_finite_pixels || are_finite<T>(pixels);
  }
};

// The numbers of one column, 0 and 1, or 2 and 3.
template <typename T>
BITFAST_GPU uint32_t rounded_pair(const float (&sums)[4], int half) {
  return pack_two<T>(sums[2 * half], sums[2 * half + 1]);
}

// T: of filters and result; Number: of the images; Product: ByWarps or ByWarpGroups.
template <typename T, typename Number, typename Product>
struct Stem {
  using Arguments = stem::Arguments;
  static constexpr int columns = Product::columns, threads = 2 * columns, capability = Product::capability;
  static constexpr int min_blocks = columns > 64 ? 2 : 3;
  static constexpr bool needs_wgmma = Product::capability == 90;
  // Whether images are read during the products: where there are registers for what is read. Two buffers make one
  // barrier a step enough then.
  static constexpr bool reads_meanwhile = Product::leaves_registers && sizeof(Number) == 2;
  static constexpr int buffers = reads_meanwhile ? 2 : 1;
  using Layout = SharedLayout<Product, buffers>;
  using Loader = stem::Loader<T, Number, Product, threads>;

  static BITFAST_GPU void run(const Arguments& a) {
    unsigned char* ring = shared_memory();
    unsigned char* filters = ring + Layout::ring_bytes;
    unsigned char* first_buffer = filters + Product::filters_bytes;
    const Tile tile = tile_of(a);
    clear(ring);
    load_filters(filters, a, tile);
    const Loader loader(a, tile);
    sync_block();

    // The row above the strip belongs to its first windows, unless it is one of zeros.
    const bool has_above = a.pools && a.first_conv_row + rows_per_step * tile.first_step > 0;
    const int begin = has_above ? tile.first_step - 1 : tile.first_step;
    // Which of the last three times that rows came in brought a pixel that is not finite; a step reads rows of three.
    constexpr int times = 7;
    int not_finite = sync(loader.fill(ring, a.first_image_row + image_rows_per_step * begin)) ? 0 : times;
    uint32_t above[group_channels / 8][2] = {};
    for (int step = begin; step < tile.last_step; ++step) {
      const int row = a.first_image_row + image_rows_per_step * step;
      const bool is_last = step + 1 == tile.last_step, has_result = a.pools && step >= tile.first_step;
      unsigned char* buffer = first_buffer + (step & (buffers - 1)) * Layout::buffer_bytes;
      RawPair<Number> next[Loader::tasks];
      Sums sums = {};
      Product::begin(sums, ring, filters, row, a.first_is_unused);
      if (reads_meanwhile) loader.read(next, row + image_rows_in_use, !is_last);
      Product::finish(sums, ring, filters, row, a.first_is_unused, not_finite == 0);
      if (a.pools) {
        compare_rows(buffer, above, sums, a, step);
      } else {
        store_rows(buffer, sums, a, tile, step);
      }
      if (!reads_meanwhile) {  // another block multiplies meanwhile
        loader.read(next, row + image_rows_in_use, !is_last);
        sync_block();
        if (has_result) compare_columns(buffer, a, tile, step);
      }
      const bool all_are_finite = is_last || loader.write(ring, next, row + image_rows_in_use);
      not_finite = (not_finite << 1 | (sync(all_are_finite) ? 0 : 1)) & times;
      if (reads_meanwhile && has_result) compare_columns(buffer, a, tile, step);
    }
  }

  // Ends the writing of rows; returns whether what all threads have written is finite, or nobody asks.
  static BITFAST_GPU bool sync(bool all_are_finite) {
    if constexpr (!Product::needs_finite_pixels) {
      sync_block();
      return true;
    } else {
      fence_async_proxy();
      return !sync_block_or(!all_are_finite);
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
      unsigned char* to = filters + i / vectors * Product::channel_bytes + i % vectors * Product::vector_bytes;
      store_shared_16(to, load_16(weight + i * 8));
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
    return tile.result + (static_cast<int64_t>(row) * a.result_width + column) * a.channels + channel;
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
      store_16(result_at(a, tile, row, i / 8, channel), largest);
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
              result_at(a, tile, row, column, channel),
              load_shared_16(buffer + column * Layout::pixel_bytes + channel * 2));
        }
      }
      sync_warp();
    }
  }
};

}  // namespace bitfast::stem
