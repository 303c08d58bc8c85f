// What the loops of convolution_weight_gradient work on, and how the work is divided;
// shared by convolution_weight_gradient.cpp and the loops.
//
// The gradient of a weight is a product of matrices for each place in the filter (tap): output channels times input
// channels, summed over pixels. Sums run over words: pixels in float32, pairs of pixels in bfloat16, and squares of
// 2x2 pixels for Winograd's products, of which there are 16 instead of the 9 taps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activation.h"
#include "ceil_div.h"
#include "convolution_words.h"

namespace bitfast::convolution_weight_gradient {

// Tiles of the result: output channels (rows), one panel of input channels (columns).
constexpr int64_t tile_rows = 8, tile_words = tile_rows * panel_columns;
// Pixels in a row, at most, where an image's pixels are taken for rows as it suits.
constexpr int64_t flat_pixels = 128;

// Words that leave room in a core's nearest cache.
constexpr int64_t nearest_words = 6 * 1024;

template <typename T>
struct Work {
  int64_t images, in_channels, out_channels, in_height, in_width, height, width;
  int64_t kernel_height, kernel_width;
  int64_t stride[2], padding[2], dilation[2];
  // Whether the pixels of an image are taken for one row, which is cut into `height` rows of `width` pixels; `pixels`
  // is their number.
  bool is_flat;
  int64_t pixels;
  bool is_winograd;
  Activation activation;
  const T* x;
  const T* grad;
  const float *center, *scale, *shift;  // for each image and input channel; null: x is taken as it is

  // Sums over the rows of all images, of squares in Winograd's case, are cut into `splits`, the channels into blocks.
  // Each task has one of both.
  int64_t splits, row_blocks, column_blocks;

  int64_t rows_of_image() const { return is_winograd ? ceil_div(height, 2) : height; }
  int64_t rows() const { return images * rows_of_image(); }
  int64_t words_of_row() const {
    return is_winograd ? squares_in_row(width) : ceil_div(width * static_cast<int64_t>(sizeof(T)), 4);
  }
  // Words whose products are summed one after the other: the longer a sum, the more its rounding costs, most of all in
  // Winograd's case, least before rounding to bfloat16.
  int64_t summed_words() const { return is_winograd ? 64 : sizeof(T) == 4 ? 128 : 512; }
  int64_t rows_at_once() const {
    const int64_t packed_words = is_winograd ? 192 : 512;
    return std::max<int64_t>(1, packed_words / std::max<int64_t>(1, words_of_row()));
  }
  // Rows of squares whose input is transformed at once: it should stay in the nearest cache.
  int64_t squares_at_once() const {
    return std::clamp<int64_t>((nearest_words / (2 * words_of_row() + 2) / chunk_words - 2) / 2, 1, rows_at_once());
  }
  // Sums that are kept apart.
  int64_t products() const { return is_winograd ? positions : kernel_height * kernel_width; }
  // Copies of the input, each shifted as a place in a row of the filter wants it.
  int64_t versions() const { return is_winograd ? positions : kernel_width; }
  // Rows of the packed input from one row of the result to the next. A filter of height 1 needs no rows between.
  int64_t row_step() const { return is_winograd || kernel_height == 1 ? 1 : stride[0]; }
  int64_t halo() const { return is_winograd ? 0 : (kernel_height - 1) * dilation[0]; }
  int64_t packed_rows(int64_t rows) const { return (rows - 1) * row_step() + halo() + 1; }
  int64_t most_packed_rows() const {
    const int64_t rows = std::min(rows_at_once(), this->rows());
    const int64_t pieces = std::min(rows, ceil_div(rows, std::max<int64_t>(1, rows_of_image())) + 1);
    return rows * row_step() + pieces * (halo() + 1);
  }
  int64_t tiles() const { return ceil_div(out_channels, tile_rows); }
  int64_t panels() const { return ceil_div(in_channels, panel_columns); }
  int64_t tasks() const { return splits * row_blocks * column_blocks; }
};

// Of `total` parts, cut into `count` pieces, the piece `number`.
struct Piece {
  int64_t first, last;

  Piece(int64_t total, int64_t count, int64_t number)
      : first(number * total / count), last((number + 1) * total / count) {}
  int64_t size() const { return last - first; }
};

struct Task {
  Piece rows, chunks, panels;  // chunks of two tiles of output channels
};

template <typename T>
Task task_of(const Work<T>& work, int64_t number) {
  const int64_t split = number / (work.row_blocks * work.column_blocks);
  const int64_t block = number % (work.row_blocks * work.column_blocks);
  return {
      {work.rows(), work.splits, split},
      {ceil_div(work.out_channels, chunk_words), work.row_blocks, block / work.column_blocks},
      {work.panels(), work.column_blocks, block % work.column_blocks}};
}

// The words that a task needs for itself: its packed input and gradient.
template <typename T>
int64_t scratch_words(const Work<T>& work) {
  const int64_t panels = ceil_div(work.panels(), work.column_blocks);
  const int64_t chunks = ceil_div(ceil_div(work.out_channels, chunk_words), work.row_blocks);
  const int64_t words = work.rows_at_once() * work.words_of_row();
  const int64_t panel = work.most_packed_rows() * work.words_of_row() * panel_columns;
  const int64_t x = work.versions() * (panels * panel + chunk_words);
  const int64_t grad = (work.is_winograd ? positions : 1) * (chunks * words * chunk_words + chunk_words);
  const int64_t rows =
      work.is_winograd ? (2 * work.squares_at_once() + 2) * (2 * work.words_of_row() + 2) * chunk_words : 0;
  return x + grad + rows;
}

// Where a tile of a product lies in the sums of a split: those of a panel adjoin.
template <typename T>
int64_t tile_at(const Work<T>& work, int64_t panel, int64_t product, int64_t tile) {
  return ((panel * work.products() + product) * work.tiles() + tile) * tile_words;
}

template <typename T>
int64_t sums_words(const Work<T>& work) {
  return tile_at(work, work.panels(), 0, 0);
}

// What becomes of the sums: a weight's gradient of shape (out, in, height, width), with these strides.
template <typename T>
struct Output {
  T* result;
  int64_t out_stride, in_stride, tap_stride;
  const float* sums;  // of all splits
};

}  // namespace bitfast::convolution_weight_gradient
