// What norm_convolution_statistics.cu launches: partial statistics of feature maps, and factors of norms from them.
// norm_convolution_cuda.h says what partials and factors are.
#pragma once

#include "gpu.h"

namespace bitfast::norm_convolution {

using gpu::BFloat16;
using gpu::Dtype;
using gpu::Half;

// Of some numbers: how many there are, their mean, and the sum of squared deviations from it.
struct Statistics {
  float size, mean, squares;
};

// Those of all numbers (Chan, Golub & LeVeque, 1979). All deviations are from numbers near the mean, so that
// nothing cancels.
template <int count>
BITFAST_GPU Statistics merged(const Statistics (&parts)[count]) {
  const float pivot = parts[0].mean;
  float size = 0.0f, away = 0.0f;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    size += parts[i].size;
    away = gpu::fused_multiply_add(parts[i].mean - pivot, parts[i].size, away);
  }
  if (size == 0.0f) return {};
  Statistics all = {size, pivot + away / size, 0.0f};
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float d = parts[i].mean - all.mean;
    all.squares += gpu::fused_multiply_add(d * d, parts[i].size, parts[i].squares);
  }
  return all;
}

// Those of `members` adjacent lanes, a power of two; all of them get the same.
BITFAST_GPU Statistics merged_lanes(Statistics mine, int members) {
  for (int mask = 1; mask < members; mask *= 2) {
    const Statistics other = {
        gpu::shuffle_xor(mine.size, mask), gpu::shuffle_xor(mine.mean, mask), gpu::shuffle_xor(mine.squares, mask)};
    const bool is_upper = (threadIdx.x & mask) != 0;
    mine = merged<2>({is_upper ? other : mine, is_upper ? mine : other});
  }
  return mine;
}

// ---- partials of a feature map --------------------------------------------------------------------------------------

constexpr int partials_threads = 256;
constexpr int vector_channels = 8;        // of 16 bytes
constexpr int most_slice_vectors = 64;    // of the channels that a block reads
constexpr int most_lanes_per_member = 8;  // that a thread adds up in the end

// A block reads a slice of the channels of a strip. Each pixel of it is read by `slice_vectors` threads, and `lanes`
// pixels at once. The moments that they find are merged by `members` threads for each cell.
struct PartialsArguments {
  const void* x;
  float2* partials;
  int64_t pixels;
  int strips, strip_pixels;
  int channels;
  int slices, slice_vectors;
  int lanes, members;
  int pitch;  // of the moments of a lane in shared memory: one more than there are, for the sake of banks
};

// A thread's sums of x - pivot and of its square, for each cell of its vector. The pivot is the mean of its first
// pixels, rounded to T: so the differences have few digits, and their sums no bias from digits that are lost each time.
template <typename T, int cells>
struct CellSums {
  static constexpr int cell_channels = vector_channels / cells;
  float pivots[cells], first[cells] = {}, second[cells] = {};

  // The first `pixels` of the vectors are such; the others are zero.
  template <int count>
  BITFAST_GPU CellSums(const uint4 (&vectors)[count], int pixels) {
    float sums[cells] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float numbers[vector_channels];
      gpu::unpack<T>(vectors[i], numbers);
#pragma unroll
      for (int n = 0; n < vector_channels; ++n) sums[n / cell_channels] += numbers[n];
    }
    const float share = 1.0f / static_cast<float>(max(pixels, 1) * cell_channels);
#pragma unroll
    for (int c = 0; c < cells; ++c) pivots[c] = gpu::to_float(gpu::rounded<T>(sums[c] * share));
  }

  // Adds the first `pixels` of the vectors: to each other first, which keeps digits.
  template <int count>
  BITFAST_GPU void add(const uint4 (&vectors)[count], int pixels) {
    float some_first[cells] = {}, some_second[cells] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i < pixels) {
        float numbers[vector_channels];
        gpu::unpack<T>(vectors[i], numbers);
#pragma unroll
        for (int n = 0; n < vector_channels; ++n) {
          const int c = n / cell_channels;
          const float d = numbers[n] - pivots[c];
          some_first[c] += d;
          some_second[c] = gpu::fused_multiply_add(d, d, some_second[c]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < cells; ++c) {
      first[c] += some_first[c];
      second[c] += some_second[c];
    }
  }

  // Mean and squares of a cell.
  BITFAST_GPU float2 moments(int cell, int pixels) const {
    if (pixels == 0) return make_float2(0.0f, 0.0f);
    const float away = first[cell] / static_cast<float>(pixels * cell_channels);
    const float squares = second[cell] - first[cell] * away;
    return make_float2(pivots[cell] + away, squares < 0.0f ? 0.0f : squares);  // NaN stays
  }
};

// What a block works on.
struct PartialsPlace {
  int strip;  // counted through all images
  int64_t first_pixel;
  int pixels;
  int first_vector, vectors;

  BITFAST_GPU PartialsPlace(const PartialsArguments& a, int block) {
    strip = block / a.slices;
    first_vector = (block - strip * a.slices) * a.slice_vectors;
    vectors = min(a.slice_vectors, a.channels / vector_channels - first_vector);
    const int64_t image = strip / a.strips, begin = (strip - image * a.strips) * a.strip_pixels;
    const int64_t left = max(a.pixels - begin, int64_t{0});
    pixels = static_cast<int>(min(left, static_cast<int64_t>(a.strip_pixels)));
    first_pixel = image * a.pixels + begin;
  }

  BITFAST_GPU int pixels_of(int lane, int lanes) const {
    const int of_all = pixels / lanes;
    return of_all + (lane < pixels - of_all * lanes ? 1 : 0);
  }
};

// cells: of a thread's vector.
template <typename T, int cells>
struct PartialsKernel {
  using Arguments = PartialsArguments;
  static constexpr int threads = partials_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;
  static constexpr int unroll = cells == 4 ? 6 : 8;  // as many as the registers hold

  static BITFAST_GPU void run(const Arguments& a) {
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    auto* of_lanes = reinterpret_cast<float2*>(gpu::shared_memory());
    read(a, PartialsPlace(a, block), thread, of_lanes);
    gpu::sync_block();
    // While all pixels were read, registers were short.
    merge(a, PartialsPlace(a, gpu::not_before_here(block)), gpu::not_before_here(thread), of_lanes);
  }

  // Leaves the moments of the thread's cells in shared memory.
  static BITFAST_GPU void read(const Arguments& a, const PartialsPlace& place, int thread, float2* of_lanes) {
    const int lane = thread / a.slice_vectors, vector = thread - lane * a.slice_vectors;
    if (lane >= a.lanes || vector >= place.vectors) return;
    const int64_t pixel_bytes = static_cast<int64_t>(a.channels) * sizeof(T);
    const char* first = static_cast<const char*>(a.x) + (place.first_pixel + lane) * pixel_bytes;
    const int count = place.pixels_of(lane, a.lanes);
    const CellSums<T, cells> sums = sums_of(first + (place.first_vector + vector) * 16, a.lanes * pixel_bytes, count);
#pragma unroll
    for (int c = 0; c < cells; ++c) of_lanes[lane * a.pitch + vector * cells + c] = sums.moments(c, count);
  }

  static BITFAST_GPU void merge(const Arguments& a, const PartialsPlace& place, int thread, const float2* of_lanes) {
    const int cell = thread / a.members, member = thread - cell * a.members, first_cell = place.first_vector * cells;
    const bool is_cell = cell < place.vectors * cells;
    Statistics parts[most_lanes_per_member];
#pragma unroll
    for (int i = 0; i < most_lanes_per_member; ++i) {
      const int lane = member + i * a.members;
      parts[i] = {};
      if (is_cell && lane < a.lanes) {
        const float2 v = of_lanes[lane * a.pitch + cell];
        const int numbers = place.pixels_of(lane, a.lanes) * CellSums<T, cells>::cell_channels;
        parts[i] = {static_cast<float>(numbers), v.x, v.y};
      }
    }
    const Statistics all = merged_lanes(merged(parts), a.members);
    float2* of_strip = a.partials + static_cast<int64_t>(place.strip) * (1 + a.channels / vector_channels * cells);
    if (is_cell && member == 0) of_strip[1 + first_cell + cell] = make_float2(all.mean, all.squares);
    if (first_cell == 0 && thread == 0) of_strip[0] = make_float2(static_cast<float>(place.pixels), 0.0f);
  }

  // at: the thread's vector of its first pixel. step: bytes from there to the next.
  static BITFAST_GPU CellSums<T, cells> sums_of(const char* at, int64_t step, int count) {
    uint4 vectors[unroll] = {};
    auto load = [&](int left) {
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        if (i < left) vectors[i] = gpu::load_streaming(at + i * step);
      }
    };
    load(count);
    CellSums<T, cells> sums(vectors, min(count, unroll));
    for (int left = count; left > 0; left -= unroll) {
      sums.add(vectors, left);
      at += unroll * step;
      load(left - unroll);
    }
    return sums;
  }
};

// ---- factors of a norm ----------------------------------------------------------------------------------------------

constexpr int factors_threads = 256;
constexpr int partials_at_once = 8;  // that a thread reads

BITFAST_GPU float2 load_floats(const float2* p) {
  const uint2 words = gpu::load_written_8(p);
  return make_float2(gpu::float_from_bits(words.x), gpu::float_from_bits(words.y));
}

// A block has a slice of the groups of an image. Its threads stand in rows beside each other: in `columns` of cells,
// which lie beside each other in memory, and in `rows` of strips. A row is shorter than the slice only if that is one
// group. What threads find is merged by `members` of them for each group.
struct FactorsArguments {
  const float2* partials;
  const void *weight, *bias;
  float* factors;
  int strips, channels, groups;
  int cell_channels, group_cells;
  int slices, slice_groups;
  int columns, rows;
  int members;
  Dtype weight_dtype, bias_dtype;
  float eps;
};

struct FactorsKernel {
  using Arguments = FactorsArguments;
  static constexpr int threads = factors_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;
  static constexpr int found_bytes = factors_threads * static_cast<int>(sizeof(Statistics));  // of shared memory

  struct Parameters {
    float weight, bias;
  };

  static BITFAST_GPU void run(const Arguments& a) {
    const int block = static_cast<int>(blockIdx.x), image = block / a.slices;
    const int first_group = (block - image * a.slices) * a.slice_groups;
    const int groups = min(a.slice_groups, a.groups - first_group), group_channels = a.channels / a.groups;
    const int first_channel = first_group * group_channels, channels = groups * group_channels;
    const int thread = static_cast<int>(threadIdx.x);
    auto* of_threads = reinterpret_cast<Statistics*>(gpu::shared_memory());
    auto* statistics = reinterpret_cast<float2*>(gpu::shared_memory() + found_bytes);

    gpu::let_next_launch_begin();
    gpu::wait_for_launch_before();
    // The first partials and the first parameters are on their way together.
    Reader reader(a, image, first_group * a.group_cells, groups * a.group_cells, thread);
    Statistics parts[partials_at_once];
    reader.read(a, parts);
    const Parameters of_first = parameters_of(a, first_channel + min(thread, channels - 1));
    Statistics mine = merged(parts);
    while (!reader.is_at_end()) {
      reader.read(a, parts);
      mine = merged<2>({mine, merged(parts)});
    }
    of_threads[thread] = mine;
    gpu::sync_block();

    const int group = thread / a.members, member = thread - group * a.members;
    const Statistics all = of_group(a, of_threads, min(group, groups - 1), member);
    if (member == 0 && group < groups) {
      statistics[group] = make_float2(all.mean, gpu::reciprocal_sqrt(all.squares / all.size + a.eps));
    }
    gpu::sync_block();

    float* scales = a.factors + static_cast<int64_t>(image) * 2 * a.channels + first_channel;
    for (int channel = thread; channel < channels; channel += threads) {
      const Parameters p = channel == thread ? of_first : parameters_of(a, first_channel + channel);
      const float2 of_group = statistics[channel / group_channels];
      const float scale = p.weight * of_group.y;
      scales[channel] = scale;
      scales[channel + a.channels] = gpu::fused_multiply_add(-of_group.x, scale, p.bias);
    }
  }

  static BITFAST_GPU Parameters parameters_of(const Arguments& a, int channel) {
    return {gpu::number_at(a.weight, channel, a.weight_dtype), gpu::number_at(a.bias, channel, a.bias_dtype)};
  }

  // Merges what threads found in a group of the slice.
  static BITFAST_GPU Statistics of_group(const Arguments& a, const Statistics* of_threads, int group, int member) {
    const int columns = min(a.group_cells, a.columns), first_column = group * columns;
    auto at = [&](int i) {
      const int row = i / columns;
      return of_threads[row * a.columns + first_column + (i - row * columns)];
    };
    Statistics mine = at(member);
    for (int i = member + a.members; i < columns * a.rows; i += a.members) mine = merged<2>({mine, at(i)});
    return merged_lanes(mine, a.members);
  }

  // Goes down a column of cells, then down the next that is the thread's.
  struct Reader {
    const float2* of_image;
    int pitch, row, strip, cell, first_cell, cells;

    BITFAST_GPU Reader(const Arguments& a, int image, int first_cell, int cells, int thread)
        : pitch(1 + a.groups * a.group_cells), first_cell(1 + first_cell), cells(cells) {
      of_image = a.partials + static_cast<int64_t>(image) * a.strips * pitch;
      strip = row = thread / a.columns;
      cell = row < min(a.rows, a.strips) ? thread - row * a.columns : cells;
    }
    BITFAST_GPU bool is_at_end() const { return cell >= cells; }

    // Beyond the end are cells without numbers.
    BITFAST_GPU void read(const Arguments& a, Statistics (&parts)[partials_at_once]) {
      // All loads come first, so that they are on their way together.
      float2 of_cells[partials_at_once];
      float pixels[partials_at_once];
#pragma unroll
      for (int i = 0; i < partials_at_once; ++i) {
        of_cells[i] = {};
        pixels[i] = 0.0f;
        if (!is_at_end()) {
          const float2* of_strip = of_image + static_cast<int64_t>(strip) * pitch;
          of_cells[i] = load_floats(of_strip + first_cell + cell);
          pixels[i] = load_floats(of_strip).x;
        }
        strip += a.rows;
        if (strip >= a.strips) {
          strip = row;
          cell += a.columns;
        }
      }
#pragma unroll
      for (int i = 0; i < partials_at_once; ++i) {
        parts[i] = {pixels[i] * static_cast<float>(a.cell_channels), of_cells[i].x, of_cells[i].y};
      }
    }
  };
};

}  // namespace bitfast::norm_convolution
