// What the kernels of group_norm_act.cu share: how a block's threads divide a slice of channels, and sums over groups.
//
// A thread owns a vector of 16 bytes, the same channels of every pixel that it meets. It sums parts of the vector apart:
// all channels of a part belong to one group. Sums are taken around pivots near the mean, so that they do not cancel, and
// added up in a fixed order.
#pragma once

#include "gpu.h"
#include "gpu_activation.h"

namespace bitfast::group_norm_act {

using gpu::BFloat16;
using gpu::Dtype;
using gpu::Half;
using gpu::vector_size;

// What all kernels read and write; see group_norm_act_cuda.h.
struct Tensors {
  const void *x, *residual, *weight, *bias;
  void *total, *result;
  float *mean, *rstd;
};

// How a block's threads divide a slice of the channels: whole groups, a multiple of a vector.
struct Layout {
  int channels, groups;
  int group_channels;
  int vectors;          // of one pixel
  int lanes;            // pixels that the threads meet at once, each `vectors` threads
  int parts_per_group;
  int rows;             // of sums that the threads leave in shared memory
  int members;          // threads that add up a group: a power of two up to 32
  bool folds;           // whether a warp first adds up its lanes, which it can if vectors are a power of two below 32

  int parts() const { return groups * parts_per_group; }
  int sums_bytes() const { return rows * parts() * static_cast<int>(sizeof(float2)); }
};

inline Layout layout_of(int channels, int group_channels, int vector, int parts, int threads) {
  Layout l;
  l.channels = channels;
  l.group_channels = group_channels;
  l.groups = channels / group_channels;
  l.vectors = channels / vector;
  l.lanes = threads / l.vectors;
  l.parts_per_group = group_channels / (vector / parts);
  l.folds = l.vectors < 32 && 32 % l.vectors == 0;
  l.rows = l.folds ? threads / 32 : l.lanes;
  l.members = 1;
  while (l.members < 32 && 2 * l.members * l.groups <= threads) l.members *= 2;
  return l;
}

// Where a thread works.
struct Place {
  int vector;  // its number in the pixel
  int lane;
  bool is_active;

  BITFAST_GPU explicit Place(const Layout& l) {
    const int thread = static_cast<int>(threadIdx.x);
    vector = thread % l.vectors;
    lane = thread / l.vectors;
    is_active = lane < l.lanes;
  }
};

// The group that each part of a thread's vector belongs to.
template <int parts>
struct Groups {
  int of[parts];

  BITFAST_GPU Groups(const Layout& l, const Place& place) {
    int group = place.vector * parts / l.parts_per_group;
    int part = place.vector * parts - group * l.parts_per_group;
#pragma unroll
    for (int p = 0; p < parts; ++p) {
      of[p] = min(group, l.groups - 1);
      if (++part == l.parts_per_group) {
        part = 0;
        ++group;
      }
    }
  }
};

// A thread's sums of x - pivot and of its square, for each part of its vector.
template <typename T, int parts>
struct Sums {
  static constexpr int part_channels = vector_size<T> / parts;
  float pivots[parts];
  float first[parts], second[parts];

  BITFAST_GPU void clear() {
#pragma unroll
    for (int p = 0; p < parts; ++p) first[p] = second[p] = pivots[p] = 0.0f;
  }

  // around: a pivot for each group of the slice.
  BITFAST_GPU void begin(const float* around, const Groups<parts>& groups) {
    clear();
#pragma unroll
    for (int p = 0; p < parts; ++p) pivots[p] = around[groups.of[p]];
  }

  // Without squares.
  BITFAST_GPU void add_first(const uint4& v) {
    float numbers[vector_size<T>];
    gpu::unpack<T>(v, numbers);
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) first[i / part_channels] += numbers[i];
  }

  BITFAST_GPU void add(const uint4& v) {
    float numbers[vector_size<T>];
    gpu::unpack<T>(v, numbers);
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) {
      const int p = i / part_channels;
      const float d = numbers[i] - pivots[p];
      first[p] += d;
      second[p] = gpu::fused_multiply_add(d, d, second[p]);
    }
  }

  // Writes them to shared memory: rows of all parts of the slice.
  BITFAST_GPU void leave(float2* sums, const Layout& l, const Place& place) {
    int row = place.lane;
    bool writes = place.is_active;
    if (l.folds) {
      for (int mask = l.vectors; mask < 32; mask *= 2) {
#pragma unroll
        for (int p = 0; p < parts; ++p) {
          first[p] += gpu::shuffle_xor(first[p], mask);
          second[p] += gpu::shuffle_xor(second[p], mask);
        }
      }
      const int thread = static_cast<int>(threadIdx.x);
      row = thread / 32;
      writes = thread % 32 < l.vectors;
    }
    if (!writes) return;
    float2* mine = sums + (row * l.vectors + place.vector) * parts;
#pragma unroll
    for (int p = 0; p < parts; ++p) mine[p] = make_float2(first[p], second[p]);
  }
};

// Adds v of `members` adjacent lanes; all of them get the sum.
BITFAST_GPU float add_members(float v, int members) {
  for (int mask = 1; mask < members; mask *= 2) v += gpu::shuffle_xor(v, mask);
  return v;
}

// Calls use(group, first, second) with the sums of each group of the slice, in one thread of the block.
// After a barrier that follows Sums::leave.
template <typename Use>
BITFAST_GPU void for_each_group(const float2* sums, const Layout& l, const Use& use) {
  const int thread = gpu::not_before_here(static_cast<int>(threadIdx.x)), member = thread & (l.members - 1);
  const int at_once = gpu::not_before_here(static_cast<int>(blockDim.x)) / l.members;
  const int count = gpu::not_before_here(l.rows) * l.parts_per_group, pitch = gpu::not_before_here(l.groups) * l.parts_per_group;
  for (int from = 0; from < l.groups; from += at_once) {
    const int group = from + thread / l.members;
    float first = 0.0f, second = 0.0f;
    if (group < l.groups) {
      for (int i = member; i < count; i += l.members) {
        const int row = i / l.parts_per_group, part = i - row * l.parts_per_group;
        const float2 v = sums[row * pitch + group * l.parts_per_group + part];
        first += v.x;
        second += v.y;
      }
    }
    first = add_members(first, l.members);
    second = add_members(second, l.members);
    if (member == 0 && group < l.groups) use(group, first, second);
  }
}

// The mean of `count` numbers and the sum of the squares of their differences from it, by their sums around a pivot.
BITFAST_GPU float2 moments_of(float pivot, float first, float second, float count) {
  const float away = first / count, squares = second - first * away;
  return make_float2(pivot + away, squares < 0.0f ? 0.0f : squares);
}

// 1 / standard deviation.
BITFAST_GPU float rstd_of(float squares, float count, float eps) { return gpu::reciprocal_sqrt(squares / count + eps); }

// sixteen bytes of shared memory, as numbers.
BITFAST_GPU void load_floats(const float* shared, float (&v)[4]) {
  const uint4 words = gpu::load_shared_16(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = gpu::float_from_bits(gpu::word_of(words, i));
}

// What a thread multiplies its channels with, and adds to them.
template <typename T, int parts>
struct Affine {
  static constexpr int count = vector_size<T>;
  // float32 data show the rounding of shift where the mean is large: there the mean is subtracted first.
  static constexpr bool centers = sizeof(T) == 4;
  float scale[count], shift[count], mean[centers ? count : 1];

  // weight, bias: of the slice, in shared memory. statistics: mean and 1/std of each group.
  BITFAST_GPU Affine(
      const float* weight, const float* bias, const float2* statistics, const Groups<parts>& groups,
      const Place& place) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      float w[4], b[4];
      load_floats(weight + place.vector * count + i, w);
      load_floats(bias + place.vector * count + i, b);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 s = statistics[groups.of[(i + j) * parts / count]];
        scale[i + j] = w[j] * s.y;
        shift[i + j] = centers ? b[j] : b[j] - s.x * scale[i + j];
        if constexpr (centers) mean[i + j] = s.x;
      }
    }
  }

  template <Activation activation>
  BITFAST_GPU uint4 apply(const uint4& v) const {
    float numbers[count];
    gpu::unpack<T>(v, numbers);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float x = centers ? numbers[i] - mean[centers ? i : 0] : numbers[i];
      numbers[i] = gpu::fused_multiply_add(x, scale[i], shift[i]);
    }
    return gpu::pack_activated<T, activation>(numbers);
  }
};

// The sums of two vectors, rounded to T.
template <typename T>
BITFAST_GPU uint4 add_vectors(const uint4& a, const uint4& b) {
  float x[vector_size<T>], y[vector_size<T>];
  gpu::unpack<T>(a, x);
  gpu::unpack<T>(b, y);
#pragma unroll
  for (int i = 0; i < vector_size<T>; ++i) x[i] += y[i];
  return gpu::pack<T>(x);
}

// Copies the parameters of channels from `begin` on to shared memory, in float32.
BITFAST_GPU void load_parameters(
    const Tensors& t, Dtype weight_dtype, Dtype bias_dtype, int begin, int count, float* weight, float* bias) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    weight[i] = gpu::number_at(t.weight, begin + i, weight_dtype);
    bias[i] = gpu::number_at(t.bias, begin + i, bias_dtype);
  }
}

// A vector's address in memory.
template <typename T>
BITFAST_GPU const char* address(const void* data, int64_t element) {
  return static_cast<const char*>(data) + element * static_cast<int64_t>(sizeof(T));
}
template <typename T>
BITFAST_GPU char* address(void* data, int64_t element) {
  return static_cast<char*>(data) + element * static_cast<int64_t>(sizeof(T));
}

}  // namespace bitfast::group_norm_act
