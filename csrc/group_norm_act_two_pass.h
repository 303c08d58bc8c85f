// group_norm_act in two launches, for what does not fit on chip, and for GPUs without clusters: the first leaves the
// moments (mean, sum of squares) of tiles of an image in a workspace, the second merges them in order and normalizes.
//
// Two pairs of kernels: by vectors, where a slice of whole groups is a multiple of a vector; and one number after the other.
#pragma once

#include "group_norm_act_sums.h"

namespace bitfast::group_norm_act {

// A tile is `tile_pixels` pixels of the channels of a slice.
struct TileArguments {
  Tensors tensors;
  float2* workspace;  // (images, tiles, groups)
  Layout layout;
  Dtype dtype, weight_dtype, bias_dtype;
  Activation activation;
  float eps;
  int64_t pixels, tile_pixels;
  int slices, tiles;
  int pivots;            // where the first kernel keeps them in shared memory
  int channels, groups;  // of an image
};

// The tile that a block works on.
struct Tile {
  int64_t image, begin, end;  // of its pixels
  int slice, number;

  BITFAST_GPU Tile(const TileArguments& a, int64_t block) {
    const int64_t row = block / a.tiles;
    number = static_cast<int>(block - row * a.tiles);
    image = row / a.slices;
    slice = static_cast<int>(row - image * a.slices);
    begin = number * a.tile_pixels;
    end = min(a.pixels, begin + a.tile_pixels);
  }

  // The first element of the slice in the first pixel of the image.
  BITFAST_GPU int64_t element(const TileArguments& a) const {
    return image * a.pixels * a.channels + static_cast<int64_t>(slice) * a.layout.channels;
  }
  // Where the moments of the slice's groups in tile 0 of the image lie.
  BITFAST_GPU float2* moments(const TileArguments& a) const {
    return a.workspace + image * a.tiles * a.groups + slice * a.layout.groups;
  }
};

// Merges the moments of a group over all tiles (Chan, Golub & LeVeque, 1979), by `members` adjacent lanes; all of them get
// mean and 1/std.
BITFAST_GPU float2 merged_statistics(const TileArguments& a, const float2* of_tiles, int member) {
  const int members = a.layout.members;
  const float first = of_tiles[0].x, size = static_cast<float>(a.layout.group_channels);
  auto pixels_of = [&](int tile) {
    const int64_t begin = tile * a.tile_pixels;
    return static_cast<float>(min(a.tile_pixels, a.pixels - begin));
  };
  float away = 0.0f;
  for (int tile = member; tile < a.tiles; tile += members) {
    away += (of_tiles[static_cast<int64_t>(tile) * a.groups].x - first) * pixels_of(tile);
  }
  const float mean = first + add_members(away, members) / static_cast<float>(a.pixels);
  float squares = 0.0f;
  for (int tile = member; tile < a.tiles; tile += members) {
    const float2 v = of_tiles[static_cast<int64_t>(tile) * a.groups];
    const float d = v.x - mean;
    squares += v.y + d * d * (pixels_of(tile) * size);
  }
  squares = add_members(squares, members);
  return make_float2(mean, rstd_of(squares, static_cast<float>(a.pixels) * size, a.eps));
}

// Stores a group's statistics for the backward pass, once.
BITFAST_GPU void keep_statistics(const TileArguments& a, const Tile& tile, int group, const float2& statistics) {
  if (a.tensors.mean == nullptr || tile.number != 0) return;
  const int64_t at = tile.image * a.groups + tile.slice * a.layout.groups + group;
  a.tensors.mean[at] = statistics.x;
  a.tensors.rstd[at] = statistics.y;
}

constexpr int tile_threads = 256;

// ---- by vectors ------------------------------------------------------------------------------------------------------

inline int moments_shared_bytes(const Layout& l) { return l.sums_bytes() + l.groups * 4; }
inline int normalize_shared_bytes(const Layout& l) { return 2 * l.channels * 4 + l.groups * 8; }

template <typename T, bool adds>
struct TileMomentsKernel {
  using Arguments = TileArguments;
  static constexpr int parts = vector_size<T>;
  static constexpr int threads = tile_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    const Layout& l = a.layout;
    const Tile tile(a, blockIdx.x);
    const Place place(l);
    const Groups<parts> groups(l, place);
    auto* rows = reinterpret_cast<float2*>(gpu::shared_memory());
    auto* pivots = reinterpret_cast<float*>(gpu::shared_memory() + a.pivots);
    const int64_t at = tile.element(a) + place.vector * vector_size<T>;
    const int64_t first = place.is_active ? tile.begin + place.lane : tile.end;
    constexpr int unroll = adds ? 2 : 4;  // as many as the registers hold

    // The mean of the first pixels is the pivot of all.
    const int64_t some = min(tile.end, tile.begin + unroll * l.lanes);
    Sums<T, parts> sums;
    sums.clear();
    for (int64_t pixel = first; pixel < some; pixel += l.lanes) {
      const int64_t element = at + pixel * a.channels;
      uint4 v = gpu::load_written_16(address<T>(a.tensors.x, element));
      if constexpr (adds) v = add_vectors<T>(v, gpu::load_written_16(address<T>(a.tensors.residual, element)));
      sums.add_first(v);
    }
    sums.leave(rows, l, place);
    gpu::sync_block();
    const float count = static_cast<float>(some - tile.begin) * l.group_channels;
    for_each_group(rows, l, [&](int group, float sum, float) { pivots[group] = sum / count; });
    gpu::sync_block();

    sums.begin(pivots, groups);
    for (int64_t pixel = first; pixel < tile.end; pixel += unroll * l.lanes) {
      uint4 v[unroll] = {}, residual[unroll] = {};  // without values the registers would be taken all the time
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const int64_t element = at + (pixel + i * l.lanes) * a.channels;
        if (pixel + i * l.lanes < tile.end) {
          v[i] = gpu::load_written_16(address<T>(a.tensors.x, element));
          if constexpr (adds) residual[i] = gpu::load_written_16(address<T>(a.tensors.residual, element));
        }
      }
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        if (pixel + i * l.lanes < tile.end) {
          if constexpr (adds) {
            v[i] = add_vectors<T>(v[i], residual[i]);
            gpu::store_16(address<T>(a.tensors.total, at + (pixel + i * l.lanes) * a.channels), v[i]);
          }
          sums.add(v[i]);
        }
      }
    }
    sums.leave(rows, l, place);
    gpu::sync_block();
    const float all = static_cast<float>(tile.end - tile.begin) * l.group_channels;
    float2* moments = tile.moments(a) + static_cast<int64_t>(tile.number) * a.groups;
    for_each_group(rows, l, [&](int group, float sum, float squares) {
      moments[group] = moments_of(pivots[group], sum, squares, all);
    });
  }
};

// Normalizes x; where there is a residual, x is the total.
template <typename T>
struct TileNormalizeKernel {
  using Arguments = TileArguments;
  static constexpr int parts = vector_size<T>;
  static constexpr int threads = tile_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    const Layout& l = a.layout;
    // The last tiles first: of them the most is still in the cache.
    const Tile tile(a, static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x);
    const Place place(l);
    auto* weight = reinterpret_cast<float*>(gpu::shared_memory());
    float* bias = weight + l.channels;
    auto* statistics = reinterpret_cast<float2*>(bias + l.channels);
    load_parameters(a.tensors, a.weight_dtype, a.bias_dtype, tile.slice * l.channels, l.channels, weight, bias);
    const int thread = static_cast<int>(threadIdx.x), member = thread & (l.members - 1);
    for (int from = 0; from < l.groups; from += threads / l.members) {
      const int group = from + thread / l.members;
      const float2 found = merged_statistics(a, tile.moments(a) + min(group, l.groups - 1), member);
      if (member == 0 && group < l.groups) {
        statistics[group] = found;
        keep_statistics(a, tile, group, found);
      }
    }
    gpu::sync_block();
    if (!place.is_active) return;
    const Affine<T, parts> affine(weight, bias, statistics, Groups<parts>(l, place), place);
    const int64_t at = tile.element(a) + place.vector * vector_size<T>;
    dispatch_activation(a.activation, [&](auto activation) {
#pragma unroll 4
      for (int64_t pixel = tile.begin + place.lane; pixel < tile.end; pixel += l.lanes) {
        const int64_t element = at + pixel * a.channels;
        const uint4 v = gpu::load_written_16(address<T>(a.tensors.x, element));
        gpu::store_16(
            address<T>(a.tensors.result, element), affine.template apply<decltype(activation)::value>(v));
      }
    });
  }
};

// ---- one number after the other ----------------------------------------------------------------------------------------

// Here a slice is a group, and all of a warp's lanes are members of it.
constexpr int tile_warps = tile_threads / 32;

// The sum over the block; all threads get it. shared: tile_warps numbers, free to be written.
BITFAST_GPU float add_block(float v, float* shared) {
  v = add_members(v, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  gpu::sync_block();
  float sum = 0.0f;
  for (int i = 0; i < tile_warps; ++i) sum += shared[i];
  gpu::sync_block();
  return sum;
}

// Calls use(element) for each element of the tile that is the thread's.
template <typename Use>
BITFAST_GPU void for_each_element(const TileArguments& a, const Tile& tile, const Use& use) {
  const int64_t size = a.layout.group_channels, at = tile.element(a), end = tile.end * size;
  for (int64_t i = tile.begin * size + threadIdx.x; i < end; i += tile_threads) {
    const int64_t pixel = i / size;
    use(at + pixel * a.channels + (i - pixel * size));
  }
}

struct ElementMomentsKernel {
  using Arguments = TileArguments;
  static constexpr int threads = tile_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
    const Tile tile(a, blockIdx.x);
    const bool adds = a.tensors.residual != nullptr;
    const void* source = adds ? a.tensors.total : a.tensors.x;
    float sum = 0.0f;
    for_each_element(a, tile, [&](int64_t element) {
      float v = gpu::number_at(a.tensors.x, element, a.dtype);
      if (adds) {
        v += gpu::number_at(a.tensors.residual, element, a.dtype);
        gpu::set_number_at(a.tensors.total, element, a.dtype, v);
        v = gpu::number_at(a.tensors.total, element, a.dtype);
      }
      sum += v;
    });
    const float count = static_cast<float>(tile.end - tile.begin) * a.layout.group_channels;
    const float pivot = add_block(sum, shared) / count;
    float first = 0.0f, second = 0.0f;
    for_each_element(a, tile, [&](int64_t element) {
      const float d = gpu::number_at(source, element, a.dtype) - pivot;
      first += d;
      second = gpu::fused_multiply_add(d, d, second);
    });
    first = add_block(first, shared);
    second = add_block(second, shared);
    if (threadIdx.x == 0) {
      tile.moments(a)[static_cast<int64_t>(tile.number) * a.groups] = moments_of(pivot, first, second, count);
    }
  }
};

struct ElementNormalizeKernel {
  using Arguments = TileArguments;
  static constexpr int threads = tile_threads;
  static constexpr int min_blocks = 4;
  static constexpr int capability = 80;

  static BITFAST_GPU void run(const Arguments& a) {
    const Tile tile(a, static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x);
    const float2 statistics = merged_statistics(a, tile.moments(a), static_cast<int>(threadIdx.x) % 32);
    if (threadIdx.x == 0) keep_statistics(a, tile, 0, statistics);
    dispatch_activation(a.activation, [&](auto activation) {
      for_each_element(a, tile, [&](int64_t element) {
        const int64_t channel = element % a.channels;
        const float scale = gpu::number_at(a.tensors.weight, channel, a.weight_dtype) * statistics.y;
        const float away = gpu::number_at(a.tensors.x, element, a.dtype) - statistics.x;
        const float v = gpu::fused_multiply_add(away, scale, gpu::number_at(a.tensors.bias, channel, a.bias_dtype));
        gpu::set_number_at(a.tensors.result, element, a.dtype, gpu::activate<decltype(activation)::value>(v));
      });
    });
  }
};

}  // namespace bitfast::group_norm_act
