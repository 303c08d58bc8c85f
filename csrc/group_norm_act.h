// What the loops of group_norm_act work on, and how the work is divided;
// shared by group_norm_act.cpp and the loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"

namespace bitfast::group_norm_act {

// A batch of feature maps cut into tasks: an image, a block of channels (whole groups), a piece of the
// pixels. If there is only one piece, a task has all values of its groups, and one pass over the tasks is enough.
struct Division {
  int64_t images, channels, pixels, groups;
  bool channels_last;
  int64_t block;   // channels, a multiple of those in a group; the last block may have fewer
  int64_t blocks;  // in an image
  int64_t piece;   // pixels; the last piece may have fewer
  int64_t pieces;  // in a block

  int64_t tasks() const { return images * blocks * pieces; }
  int64_t group_size() const { return channels / groups; }
};

struct Task {
  int64_t image, piece;
  int64_t first_channel, channels;
  int64_t first_pixel, pixels;
};

inline Task task_of(const Division& division, int64_t number) {
  Task task;
  task.piece = number % division.pieces;
  const int64_t block = number / division.pieces % division.blocks;
  task.image = number / division.pieces / division.blocks;
  task.first_channel = block * division.block;
  task.channels = std::min(division.block, division.channels - task.first_channel);
  task.first_pixel = task.piece * division.piece;
  task.pixels = std::min(division.piece, division.pixels - task.first_pixel);
  return task;
}

// Where a task's first element lies, in elements.
inline int64_t offset_of(const Division& division, const Task& task) {
  const int64_t image = task.image * division.channels * division.pixels;
  return division.channels_last ? image + task.first_pixel * division.channels + task.first_channel
                                : image + task.first_channel * division.pixels + task.first_pixel;
}

// Two numbers for each image, piece and channel: what the tasks of one block tell each other.
struct ChannelPairs {
  double *first, *second;
};

// Those of a task's channels in one of the pieces.
inline ChannelPairs pairs_of(const Division& division, ChannelPairs pairs, const Task& task, int64_t piece) {
  const int64_t offset = (task.image * division.pieces + piece) * division.channels + task.first_channel;
  return {pairs.first + offset, pairs.second + offset};
}

template <typename T>
struct Forward {
  Division division;
  Activation activation;
  double eps;
  const T* x;
  const T* residual;  // or null
  T* total;           // x + residual
  T* result;
  const float *weight, *bias;
  float *mean, *rstd;  // or null
  ChannelPairs moments;  // mean, and sum of the squared differences from it
  const T* shortcut;     // added after the norm, before the activation; or null
  const double *known_means, *known_variances;  // for each image and channel; or null
};

template <typename T>
struct Backward {
  Division division;
  Activation activation;
  const T* grad;
  const T* grad_total;  // or null
  const T* x;
  T* grad_x;
  T* result;  // of the forward pass, once more; or null
  const float *weight, *bias;
  const float *mean, *rstd;
  ChannelPairs sums;  // of the gradient before the activation, and of its product with the normalized x
};

}  // namespace bitfast::group_norm_act
