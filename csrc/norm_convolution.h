// What the loops of norm_convolution work on, and how the work is divided;
// shared by norm_convolution.cpp and the loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"
#include "ceil_div.h"
#include "convolution_words.h"

namespace bitfast::norm_convolution {

// The product of matrices is computed in tiles of up to this many rows (pixels) and a panel of columns (output
// channels): what fits into the 32 registers of AVX-512 beside two vectors of weights.
constexpr int64_t tile_rows = 14;

// Rows cut into tiles of equal size, but for the last.
struct Tiles {
  int64_t rows, count, size;

  explicit Tiles(int64_t rows)
      : rows(rows), count(ceil_div(rows, tile_rows)), size(count == 0 ? 0 : ceil_div(rows, count)) {
    count = size == 0 ? 0 : ceil_div(rows, size);
  }
  int64_t rows_of(int64_t tile) const { return std::min(size, rows - tile * size); }
};

// A convolution of channels_last feature maps, cut into tasks: an image, a piece of its rows, a block of its
// columns. A row of a 1x1 convolution is an output pixel, one of a 3x3 convolution (Winograd's) a row of
// squares of 2x2 output pixels.
template <typename T>
struct Work {
  int64_t images, in_channels, out_channels, in_height, in_width, height, width, stride;
  Activation activation;
  const T* x;
  const float *center, *scale, *shift;  // for each image and input channel; null: x is taken as it is
  const float* weight;                  // packed
  T* result;
  const T* addend;          // of the result's layout, or null; may be the result itself
  double *means, *squares;  // for each image, piece and output channel, or null
  int64_t rows;    // in an image
  int64_t piece;   // rows; the last piece may have fewer
  int64_t pieces;  // in an image
  int64_t block;   // columns, whole panels; the last block may have fewer
  int64_t blocks;

  int64_t tasks() const { return images * pieces * blocks; }
  int64_t words() const { return words_of(in_channels, sizeof(T)); }
  int64_t panel_words() const { return words() * panel_columns; }
};

struct Task {
  int64_t image, piece;
  int64_t first_row, rows;
  int64_t first_column, last_column;
};

template <typename T>
Task task_of(const Work<T>& work, int64_t number) {
  Task task;
  const int64_t block = number % work.blocks;
  task.piece = number / work.blocks % work.pieces;
  task.image = number / work.blocks / work.pieces;
  task.first_row = task.piece * work.piece;
  task.rows = std::min(work.piece, work.rows - task.first_row);
  task.first_column = block * work.block;
  task.last_column = std::min(work.out_channels, task.first_column + work.block);
  return task;
}

// ---- Winograd's 3x3 convolution ----------------------------------------------------------------------

// The words of one of the 16 packed inputs of `squares` squares. The odd number of cache lines between them keeps
// their rows from falling on each other in the cache.
inline int64_t position_words(int64_t squares, int64_t words) {
  return squares * words + chunk_words;
}

// The words that a task needs for itself: the packed input, the products of a panel, the normalized rows.
template <typename T>
int64_t scratch_words(const Work<T>& work, int64_t kernel_size) {
  if (kernel_size == 1) {
    return work.piece * work.words();
  }
  const int64_t across = squares_in_row(work.width), squares = work.piece * across;
  return positions * (position_words(squares, work.words()) + squares * panel_columns) +
      (2 * work.piece + 2) * (2 * across + 2) * chunk_words;
}

}  // namespace bitfast::norm_convolution
