// group_norm_act by clusters: an image (or a slice of its channels) stays in the shared memory of up to 8 blocks, so that
// memory sees one read and one write.
//
// The blocks of a cluster share an image's pixels. Bulk copies fill chunks of pixels, and sums are taken as chunks
// arrive. The blocks merge their means and sums of squares through distributed shared memory, in the order of their ranks.
// A chunk that has been written out is refilled with the next image's, so that reads and writes overlap.
#pragma once

#include "group_norm_act_sums.h"

namespace bitfast::group_norm_act {

// Where things lie in a block's shared memory, in bytes. The data come first.
struct SharedPlan {
  int weight, bias, sums, partials, statistics, pivots, barriers, bytes;
};

constexpr int vectors_of_chunk = 4;  // that a thread meets in a chunk

inline SharedPlan shared_plan(int pixels, const Layout& l) {
  const int chunk = vectors_of_chunk * l.lanes, chunks = (pixels + chunk - 1) / chunk;
  SharedPlan p;
  p.weight = pixels * l.vectors * 16;
  p.bias = p.weight + l.channels * 4;
  p.sums = p.bias + l.channels * 4;
  p.partials = p.sums + l.sums_bytes();
  p.statistics = p.partials + 2 * l.groups * 8;
  p.barriers = p.statistics + l.groups * 8;
  p.pivots = p.barriers + chunks * 8;
  p.bytes = p.pivots + l.groups * 4;
  return p;
}

struct ClusterArguments {
  Tensors tensors;
  Layout layout;
  SharedPlan shared;
  Dtype weight_dtype, bias_dtype;
  Activation activation;
  float eps;
  int64_t images;
  int slices;                        // of an image; a cluster works on one of them after the other
  int pixels, channels, groups;      // of an image
  int cluster;                       // blocks
  int block_pixels, blocks_with_one_more;  // the first blocks of a cluster may have a pixel more
};

// A block at work. All threads call all functions.
template <typename T, int parts, bool adds>
class ClusterBlock {
 public:
  BITFAST_GPU explicit ClusterBlock(const ClusterArguments& arguments)
      : a(arguments), l(arguments.layout), place(arguments.layout), groups(arguments.layout, place) {
    thread = static_cast<int>(threadIdx.x);
    rank = a.cluster > 1 ? gpu::cluster_rank() : 0;
    first_pixel = rank * a.block_pixels + min(rank, a.blocks_with_one_more);
    pixels = pixels_of(rank);
    chunk = vectors_of_chunk * l.lanes;
    chunks = (pixels + chunk - 1) / chunk;
    lane = place.is_active ? place.lane : pixels;  // past the last pixel
    data = gpu::shared_memory();
    weight = reinterpret_cast<float*>(data + a.shared.weight);
    bias = reinterpret_cast<float*>(data + a.shared.bias);
    sums_of_rows = reinterpret_cast<float2*>(data + a.shared.sums);
    partials = reinterpret_cast<float2*>(data + a.shared.partials);
    statistics = reinterpret_cast<float2*>(data + a.shared.statistics);
    pivots = reinterpret_cast<float*>(data + a.shared.pivots);
    barriers = reinterpret_cast<gpu::Barrier*>(data + a.shared.barriers);
  }

  // Begins to load the first image.
  BITFAST_GPU void begin(int64_t unit, int64_t units) {
    if (thread == 0) {
      for (int c = 0; c < chunks; ++c) gpu::init_barrier(barriers + c, 1);
      gpu::fence_barrier_init();
    }
    gpu::sync_block();
    if (unit < units) {
      for (int c = 0; c < chunks; ++c) load_chunk(unit, c);
    }
    if (a.slices == 1) load_parameters(a.tensors, a.weight_dtype, a.bias_dtype, 0, l.channels, weight, bias);
  }

  // Leaves the mean of the first chunk and sums around it: each group's moments in this block.
  BITFAST_GPU void sum(int64_t unit, uint32_t parity) {
    if (a.slices > 1) {
      const int begin = static_cast<int>(slice_of(unit)) * l.channels;
      load_parameters(a.tensors, a.weight_dtype, a.bias_dtype, begin, l.channels, weight, bias);
    }
    const int64_t at = element(unit);
    Sums<T, parts> sums;
    sums.clear();
    for_chunk(at, 0, parity, [&](const uint4& v) { sums.add_first(v); });
    sums.leave(sums_of_rows, l, place);
    gpu::sync_block();
    const float count = static_cast<float>(min(pixels, chunk)) * l.group_channels;
    for_each_group(sums_of_rows, l, [&](int group, float first, float) { pivots[group] = first / count; });
    gpu::sync_block();
    sums.begin(pivots, groups);
    for_loaded(0, [&](int, const uint4& v) { sums.add(v); });
    for (int c = 1; c < chunks; ++c) {
      for_chunk(at, c, parity, [&](const uint4& v) { sums.add(v); });
    }
    sums.leave(sums_of_rows, l, place);
    gpu::sync_block();
    const float all = static_cast<float>(pixels) * l.group_channels;
    float2* mine = partials + parity * l.groups;
    for_each_group(sums_of_rows, l, [&](int group, float first, float second) {
      mine[group] = moments_of(pivots[group], first, second, all);
    });
  }

  // Merges the moments of all blocks. Those of two images in turn lie in two places, so that one barrier is enough.
  BITFAST_GPU void merge(int64_t unit, uint32_t parity) {
    if (a.cluster > 1) {
      gpu::sync_cluster();
    } else {
      gpu::sync_block();
    }
    const float2* of_blocks = partials + parity * l.groups;
    for (int group = thread; group < l.groups; group += static_cast<int>(blockDim.x)) {
      const float2 moments = a.cluster > 1 ? merged(of_blocks + group) : of_blocks[group];
      const float count = static_cast<float>(a.pixels) * l.group_channels;
      const float rstd = rstd_of(moments.y, count, a.eps);
      statistics[group] = make_float2(moments.x, rstd);
      if (a.tensors.mean != nullptr && rank == 0) {
        const int64_t at = image_of(unit) * a.groups + slice_of(unit) * l.groups + group;
        a.tensors.mean[at] = moments.x;
        a.tensors.rstd[at] = rstd;
      }
    }
    gpu::sync_block();
  }

  // Writes the result, and loads the next image into each chunk that has been read.
  BITFAST_GPU void normalize(int64_t unit, int64_t next, int64_t units) {
    const Affine<T, parts> affine(weight, bias, statistics, groups, place);
    const int64_t at = element(unit);
    gpu::with_activation(a.activation, [&](auto activation) {
      for (int c = 0; c < chunks; ++c) {
        for_loaded(c, [&](int pixel, const uint4& v) {
          gpu::store_16(
              address<T>(a.tensors.result, at + static_cast<int64_t>(pixel) * a.channels),
              affine.template apply<decltype(activation)::value>(v));
        });
        if (next < units) {
          gpu::fence_async_proxy();
          gpu::sync_block();
          load_chunk(next, c);
        }
      }
    });
  }

 private:
  BITFAST_GPU int pixels_of(int block) const { return a.block_pixels + (block < a.blocks_with_one_more ? 1 : 0); }
  BITFAST_GPU int64_t image_of(int64_t unit) const { return a.slices == 1 ? unit : unit / a.slices; }
  BITFAST_GPU int64_t slice_of(int64_t unit) const { return a.slices == 1 ? 0 : unit % a.slices; }

  // The first element of the unit's slice in the block's first pixel.
  BITFAST_GPU int64_t first_element(int64_t unit) const {
    return (image_of(unit) * a.pixels + first_pixel) * a.channels + slice_of(unit) * l.channels;
  }
  // The first element of the thread's vector there.
  BITFAST_GPU int64_t element(int64_t unit) const { return first_element(unit) + place.vector * vector_size<T>; }

  // One copy for whole pixels, else one for each pixel, by the first warp.
  BITFAST_GPU void load_chunk(int64_t unit, int c) {
    if (thread >= 32) return;
    const int first = c * chunk, count = min(pixels - first, chunk), row = l.vectors * 16;
    const char* from = address<T>(a.tensors.x, first_element(unit) + static_cast<int64_t>(first) * a.channels);
    unsigned char* to = data + first * row;
    gpu::Barrier* barrier = barriers + c;
    if (thread == 0) gpu::arrive_and_expect(barrier, static_cast<uint32_t>(count * row));
    if (a.slices == 1) {
      if (thread == 0) gpu::bulk_load(to, from, static_cast<uint32_t>(count * row), barrier);
      return;
    }
    gpu::sync_warp();
    const int64_t pitch = static_cast<int64_t>(a.channels) * static_cast<int64_t>(sizeof(T));
    for (int i = thread; i < count; i += 32) {
      gpu::bulk_load(to + i * row, from + i * pitch, static_cast<uint32_t>(row), barrier);
    }
  }

  BITFAST_GPU unsigned char* loaded(int pixel) const { return data + (pixel * l.vectors + place.vector) * 16; }

  // Calls use(pixel, vector) for each vector of the thread in a chunk that has arrived.
  template <typename Use>
  BITFAST_GPU void for_loaded(int c, const Use& use) const {
    const int first = c * chunk + lane;
#pragma unroll
    for (int i = 0; i < vectors_of_chunk; ++i) {
      const int pixel = first + i * l.lanes;
      if (pixel < pixels) use(pixel, gpu::load_shared_16(loaded(pixel)));
    }
  }

  // Waits for a chunk, adds the residual to it, and calls use(vector).
  template <typename Use>
  BITFAST_GPU void for_chunk(int64_t at, int c, uint32_t parity, const Use& use) {
    const int first = c * chunk + lane;
    uint4 residual[vectors_of_chunk];
    if constexpr (adds) {
#pragma unroll
      for (int i = 0; i < vectors_of_chunk; ++i) {
        const int pixel = first + i * l.lanes;
        if (pixel < pixels) {
          residual[i] = gpu::load_streaming(
              address<T>(a.tensors.residual, at + static_cast<int64_t>(pixel) * a.channels));
        }
      }
    }
    gpu::wait_for(barriers + c, parity);
#pragma unroll
    for (int i = 0; i < vectors_of_chunk; ++i) {
      const int pixel = first + i * l.lanes;
      if (pixel < pixels) {
        uint4 v = gpu::load_shared_16(loaded(pixel));
        if constexpr (adds) {
          v = add_vectors<T>(v, residual[i]);
          gpu::store_shared_16(loaded(pixel), v);
          gpu::store_16(address<T>(a.tensors.total, at + static_cast<int64_t>(pixel) * a.channels), v);
        }
        use(v);
      }
    }
  }

  // A group's moments over all blocks (Chan, Golub & LeVeque, 1979).
  BITFAST_GPU float2 merged(const float2* of_block) const {
    constexpr int most = 8;
    float2 v[most];
#pragma unroll
    for (int r = 0; r < most; ++r) {
      v[r] = gpu::load_remote(of_block, r < a.cluster ? r : 0);
    }
    float away = 0.0f;
#pragma unroll
    for (int r = 0; r < most; ++r) {
      if (r < a.cluster) away += (v[r].x - v[0].x) * static_cast<float>(pixels_of(r));
    }
    const float mean = v[0].x + away / static_cast<float>(a.pixels);
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < most; ++r) {
      const float d = v[r].x - mean;
      if (r < a.cluster) squares += v[r].y + d * d * (static_cast<float>(pixels_of(r)) * l.group_channels);
    }
    return make_float2(mean, squares);
  }

  const ClusterArguments& a;
  const Layout& l;
  const Place place;
  const Groups<parts> groups;
  int thread, rank, first_pixel, pixels, chunk, chunks, lane;
  unsigned char* data;
  float *weight, *bias, *pivots;
  float2 *sums_of_rows, *partials, *statistics;
  gpu::Barrier* barriers;
};

// Data of type T. parts: of a thread's vector, each of which lies in one group. adds: whether there is a residual.
template <typename T, int parts_of_vector, bool adds>
struct ClusterKernel {
  using Arguments = ClusterArguments;
  static constexpr int parts = parts_of_vector;
  static constexpr int threads = 512;
  static constexpr int min_blocks = 2;
  static constexpr int capability = 90;

  static BITFAST_GPU void run(const Arguments& a) {
    const int64_t units = a.images * a.slices, step = gridDim.x / a.cluster;
    int64_t unit = blockIdx.x / a.cluster;
    ClusterBlock<T, parts, adds> block(a);
    block.begin(unit, units);
    for (uint32_t parity = 0; unit < units; unit += step, parity ^= 1) {
      block.sum(unit, parity);
      block.merge(unit, parity);
      block.normalize(unit, unit + step, units);
    }
    if (a.cluster > 1) gpu::sync_cluster();  // nobody leaves while others read its shared memory
  }
};

}  // namespace bitfast::group_norm_act
