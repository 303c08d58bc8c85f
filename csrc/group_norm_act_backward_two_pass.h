// group_norm_act, backward, for any GPU, activation and shape: x and grad are read twice.
//
// First the sums of dz and dz h over each tile of pixels, for each channel (dz: the gradient before the activation,
// h = (x - mean) rstd); then their means over each group; then dx. Last, here and after the on-chip kernel, the sums of
// all images and tiles are merged to the gradients of weight and bias. All in a fixed order.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "gpu_activation.h"
#include "gpu_activation_slopes.h"
#include "group_norm_act_backward_plan.h"

namespace bitfast::group_norm_act_backward {

using namespace gpu;

constexpr int pixel_batch = 2;  // pixels of a thread whose loads are under way together

struct TwoPassArguments {
  const void *grad, *grad_total, *x;  // grad_total may be null
  void *grad_x, *result;  // result: written if the kernel recomputes
  const void *weight, *bias;
  const float *mean, *rstd;
  float* sums;         // [images * tiles][dz, dz h][channels]
  float* group_means;  // of weight times these: [images][2][groups]
  TwoPassPlan plan;
  int64_t pixels, channels, groups;
  Dtype weight_dtype, bias_dtype;
  Activation activation;
};

// Neighbouring numbers as they lie in memory: one, or sixteen bytes.
template <typename T, int count>
using Piece = std::conditional_t<count == 1, T, uint4>;

template <typename T, int count>
BITFAST_GPU Piece<T, count> load_piece(const void* map, int64_t at) {
  const T* from = static_cast<const T*>(map) + at;
  if constexpr (count == 1) {
    return *from;
  } else {
    return load_16(from);
  }
}

template <typename T, int count>
BITFAST_GPU void numbers_of(const Piece<T, count>& piece, float (&to)[count]) {
  if constexpr (count == 1) {
    to[0] = to_float(piece);
  } else {
    unpack<T>(piece, to);
  }
}

template <typename T, int count>
BITFAST_GPU void store_numbers(T* to, const float (&from)[count]) {
  if constexpr (count == 1) {
    *to = rounded<T>(from[0]);
  } else {
    store_16(to, pack<T>(from));
  }
}

// What a thread of both passes has: `vector` channels of the pixels from `pixel` to `end`, `rows` apart.
template <typename T, int vector>
struct Strip {
  const TwoPassArguments& a;
  bool has_channels;
  int row, column;
  int64_t image, tile, channel, pixel, end;
  float mean[vector], scale[vector], bias[vector];  // scale: weight * rstd

  BITFAST_GPU explicit Strip(const TwoPassArguments& arguments) : a(arguments) {
    const TwoPassPlan& plan = a.plan;
    int64_t block = blockIdx.x;
    const int64_t chunk = block % plan.chunks;
    block /= plan.chunks;
    tile = block % plan.tiles;
    image = block / plan.tiles;
    const int thread = static_cast<int>(threadIdx.x);
    column = thread % plan.vectors;
    row = thread / plan.vectors;
    channel = (chunk * plan.vectors + column) * vector;
    has_channels = row < plan.rows && channel < a.channels;
    pixel = tile * plan.tile + row;
    end = has_channels ? min(a.pixels, (tile + 1) * plan.tile) : 0;
    if (!has_channels) return;
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      mean[i] = a.mean[group_of(i)];
      scale[i] = number_at(a.weight, channel + i, a.weight_dtype) * a.rstd[group_of(i)];
      bias[i] = number_at(a.bias, channel + i, a.bias_dtype);
    }
  }

  // Of a channel, among those of all images.
  BITFAST_GPU int64_t group_of(int i) const { return image * a.groups + (channel + i) / (a.channels / a.groups); }

  BITFAST_GPU int64_t offset_of(int64_t p) const { return (image * a.pixels + p) * a.channels + channel; }

  // Turns x into x - mean, and grad into dz. z: what was activated.
  BITFAST_GPU void differentiate(float (&x)[vector], float (&grad)[vector], float (&z)[vector]) const {
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      x[i] -= mean[i];
      z[i] = fused_multiply_add(x[i], scale[i], bias[i]);
    }
    times_slope(grad, z, a.activation);
  }
};

// The sums of a tile.
template <typename T, int vector>
struct SumTile {
  using Arguments = TwoPassArguments;
  static constexpr int threads = two_pass_threads;
  static constexpr int min_blocks = 2;
  static constexpr int capability = 80;

  static int shared_bytes(const TwoPassPlan& plan) {
    return 2 * plan.rows * plan.vectors * vector * static_cast<int>(sizeof(float));
  }

  BITFAST_GPU static void run(const Arguments& a) {
    const Strip<T, vector> strip(a);
    float sum[vector] = {}, product[vector] = {};
    add_pixels(strip, sum, product);
    merge_rows(strip, sum, product);
  }

  BITFAST_GPU static void add_pixels(
      const Strip<T, vector>& strip, float (&sum)[vector], float (&product)[vector]) {
    const int rows = strip.a.plan.rows;
    for (int64_t first = strip.pixel; first < strip.end; first += pixel_batch * rows) {
      Piece<T, vector> x[pixel_batch], grad[pixel_batch];
#pragma unroll
      for (int u = 0; u < pixel_batch; ++u) {
        if (first + u * rows < strip.end) {
          const int64_t at = strip.offset_of(first + u * rows);
          x[u] = load_piece<T, vector>(strip.a.x, at);
          grad[u] = load_piece<T, vector>(strip.a.grad, at);
        }
      }
#pragma unroll
      for (int u = 0; u < pixel_batch; ++u) {
        if (first + u * rows < strip.end) {
          float centered[vector], dz[vector], z[vector];
          numbers_of<T>(x[u], centered);
          numbers_of<T>(grad[u], dz);
          strip.differentiate(centered, dz, z);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            sum[i] += dz[i];
            product[i] = fused_multiply_add(dz[i], centered[i], product[i]);
          }
        }
      }
    }
  }

  BITFAST_GPU static void merge_rows(
      const Strip<T, vector>& strip, const float (&sum)[vector], const float (&product)[vector]) {
    const Arguments& a = strip.a;
    const int width = a.plan.vectors * vector;
    auto* shared = reinterpret_cast<float*>(shared_memory());
    if (strip.row < a.plan.rows) {
      float* to = shared + 2 * strip.row * width + strip.column * vector;
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        to[i] = sum[i];
        to[width + i] = strip.has_channels ? product[i] * a.rstd[strip.group_of(i)] : 0.0f;
      }
    }
    sync_block();
    const int64_t first_channel = strip.channel - strip.column * vector;
    float* to = a.sums + (strip.image * a.plan.tiles + strip.tile) * 2 * a.channels + first_channel;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += threads) {
      const int kind = i >= width, channel = i - kind * width;
      float total = 0.0f;
      for (int r = 0; r < a.plan.rows; ++r) total += shared[2 * r * width + i];
      if (first_channel + channel < a.channels) to[kind * a.channels + channel] = total;
    }
  }
};

// Adds up the numbers of a block's threads, of which there are a power of two. Thread 0 has the result.
template <int threads>
BITFAST_GPU void add_up(float* shared, float& a, float& b) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = a;
  shared[threads + thread] = b;
  for (int half = threads / 2; half > 0; half /= 2) {
    sync_block();
    if (thread < half) {
      shared[thread] += shared[thread + half];
      shared[threads + thread] += shared[threads + thread + half];
    }
  }
  a = shared[0];
  b = shared[threads];
}

// The means of one group of one image: a block each.
struct AverageGroup {
  using Arguments = TwoPassArguments;
  static constexpr int threads = 128;
  static constexpr int min_blocks = 8;
  static constexpr int capability = 80;
  static constexpr int shared_bytes = 2 * threads * static_cast<int>(sizeof(float));

  BITFAST_GPU static void run(const Arguments& a) {
    const int64_t image = blockIdx.x / a.groups, group = blockIdx.x % a.groups;
    const int64_t per_group = a.channels / a.groups;
    float sum = 0.0f, product = 0.0f;
    for (int64_t i = threadIdx.x; i < a.plan.tiles * per_group; i += threads) {
      const int64_t channel = group * per_group + i % per_group;
      const float* from = a.sums + (image * a.plan.tiles + i / per_group) * 2 * a.channels + channel;
      const float weight = number_at(a.weight, channel, a.weight_dtype);
      sum = fused_multiply_add(weight, from[0], sum);
      product = fused_multiply_add(weight, from[a.channels], product);
    }
    add_up<threads>(reinterpret_cast<float*>(shared_memory()), sum, product);
    if (threadIdx.x == 0) {
      const float count = static_cast<float>(a.pixels) * static_cast<float>(per_group);
      a.group_means[image * 2 * a.groups + group] = sum / count;
      a.group_means[(image * 2 + 1) * a.groups + group] = product / count;
    }
  }
};

// dx of a tile, rstd (weight dz - mean(weight dz) - h mean(weight dz h)), plus grad_total. If it recomputes, also the
// result of the forward pass.
template <typename T, int vector, bool recomputes>
struct WriteTile {
  using Arguments = TwoPassArguments;
  static constexpr int threads = two_pass_threads;
  static constexpr int min_blocks = 2;
  static constexpr int capability = 80;

  BITFAST_GPU static void run(const Arguments& a) {
    const Strip<T, vector> strip(a);
    if (!strip.has_channels) return;
    float subtracted[vector], factor[vector];
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      const float* means = a.group_means + strip.group_of(i) + strip.image * a.groups;
      const float rstd = a.rstd[strip.group_of(i)];
      subtracted[i] = rstd * means[0];
      factor[i] = rstd * rstd * means[a.groups];
    }
    const int rows = a.plan.rows;
    for (int64_t first = strip.pixel; first < strip.end; first += pixel_batch * rows) {
      Piece<T, vector> x[pixel_batch], grad[pixel_batch], total[pixel_batch];
#pragma unroll
      for (int u = 0; u < pixel_batch; ++u) {
        if (first + u * rows < strip.end) {
          const int64_t at = strip.offset_of(first + u * rows);
          x[u] = load_piece<T, vector>(a.x, at);
          grad[u] = load_piece<T, vector>(a.grad, at);
          if (a.grad_total != nullptr) total[u] = load_piece<T, vector>(a.grad_total, at);
        }
      }
#pragma unroll
      for (int u = 0; u < pixel_batch; ++u) {
        if (first + u * rows < strip.end) {
          float centered[vector], dz[vector], z[vector], added[vector] = {}, result[vector];
          numbers_of<T>(x[u], centered);
          numbers_of<T>(grad[u], dz);
          strip.differentiate(centered, dz, z);
          if constexpr (recomputes) {
            dispatch_activation(a.activation, [&](auto activation) {
#pragma unroll
              for (float& number : z) number = activate<activation>(number);
            });
            store_numbers(static_cast<T*>(a.result) + strip.offset_of(first + u * rows), z);
          }
          if (a.grad_total != nullptr) numbers_of<T>(total[u], added);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            const float rest = fused_multiply_add(centered[i], factor[i], subtracted[i]);
            result[i] = fused_multiply_add(strip.scale[i], dz[i], added[i] - rest);
          }
          store_numbers(static_cast<T*>(a.grad_x) + strip.offset_of(first + u * rows), result);
        }
      }
    }
  }
};

struct MergeArguments {
  const float* sums;  // [rows][2 * channels]: of the gradients of bias, then of weight
  int64_t rows, channels;
  void *grad_weight, *grad_bias;
  Dtype weight_dtype, bias_dtype;
};

// The gradients of weight and bias: the sums over all rows. A block has 8 columns, which is a sector of memory.
struct MergeSums {
  using Arguments = MergeArguments;
  static constexpr int threads = 512;
  static constexpr int min_blocks = 1;
  static constexpr int capability = 80;
  static constexpr int columns = 8;
  static constexpr int shared_bytes = threads * static_cast<int>(sizeof(float));

  static int64_t blocks(int64_t channels) { return ceil_div(2 * channels, columns); }

  BITFAST_GPU static void run(const Arguments& a) {
    constexpr int rows = threads / columns, batch = 8;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t column = static_cast<int64_t>(blockIdx.x) * columns + thread % columns;
    const bool is_inside = column < 2 * a.channels;
    float sums[batch] = {};
    for (int64_t row = thread / columns; row < a.rows && is_inside; row += rows * batch) {
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (row + i * rows < a.rows) sums[i] += a.sums[(row + i * rows) * 2 * a.channels + column];
      }
    }
    auto* shared = reinterpret_cast<float*>(shared_memory());
    shared[thread] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (int half = threads / 2; half >= columns; half /= 2) {
      sync_block();
      if (thread < half) shared[thread] += shared[thread + half];
    }
    if (thread >= columns || !is_inside) return;
    if (column < a.channels) {
      set_number_at(a.grad_bias, column, a.bias_dtype, shared[thread]);
    } else {
      set_number_at(a.grad_weight, column - a.channels, a.weight_dtype, shared[thread]);
    }
  }
};

}  // namespace bitfast::group_norm_act_backward
