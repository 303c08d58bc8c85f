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

constexpr int most_blocks = 8;       // of a cluster
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
  int images;
  int slices;                        // of the channels; a cluster works on one of them, and on one image after the other
  int pixels, channels, groups;      // of an image
  int pitch, image_bytes;            // of a pixel and of an image, in bytes
  int cluster;                       // blocks
  int block_pixels, blocks_with_one_more;  // the first blocks of a cluster may have a pixel more
};

// A block at work. All threads call all functions.
template <typename T, int parts, bool adds>
class ClusterBlock {
 public:
  BITFAST_GPU explicit ClusterBlock(const ClusterArguments& arguments)
      : a(arguments), l(arguments.layout), place(arguments.layout), groups(arguments.layout, place) {
    const int rank = this->rank();
    const int first_pixel = rank * a.block_pixels + min(rank, a.blocks_with_one_more);
    pixels = pixels_of(rank);
    offset = first_pixel * a.pitch + slice() * l.vectors * 16;
    lane = place.is_active ? place.lane : pixels;  // past the last pixel
  }

  // Begins to load the first image.
  BITFAST_GPU void begin(int image) {
    if (thread() == 0) {
      for (int c = 0; c * chunk() < pixels; ++c) gpu::init_barrier(barriers() + c, 1);
      gpu::fence_barrier_init();
    }
    gpu::sync_block();
    if (image < a.images) {
      for (int c = 0; c * chunk() < pixels; ++c) load_chunk(image, c);
    }
    load_parameters(a.tensors, a.weight_dtype, a.bias_dtype, slice() * l.channels, l.channels, weight(), bias());
  }

  // Leaves the mean of the first chunk and sums around it: each group's moments in this block.
  BITFAST_GPU void sum(int image, uint32_t parity) {
    Sums<T, parts> sums;
    sums.clear();
    for_chunk(image, 0, parity, [&](const uint4& v) { sums.add_first(v); });
    sums.leave(sums_of_rows(), l, place);
    gpu::sync_block();
    const float count = static_cast<float>(min(gpu::not_before_here(pixels), chunk())) * gpu::not_before_here(l.group_channels);
    for_each_group(sums_of_rows(), l, [&](int group, float first, float) { pivots()[group] = first / count; });
    gpu::sync_block();
    sums.begin(pivots(), groups);
    for_loaded(0, [&](int, const uint4& v) { sums.add(v); });
    for (int c = 1; c * chunk() < pixels; ++c) {
      for_chunk(image, c, parity, [&](const uint4& v) { sums.add(v); });
    }
    sums.leave(sums_of_rows(), l, place);
    gpu::sync_block();
    const float all = static_cast<float>(gpu::not_before_here(pixels)) * gpu::not_before_here(l.group_channels);
    float2* mine = partials(parity);
    for_each_group(sums_of_rows(), l, [&](int group, float first, float second) {
      mine[group] = moments_of(pivots()[group], first, second, all);
    });
  }

  // Merges the moments of all blocks.
  BITFAST_GPU void merge(int image, uint32_t parity) {
    if (a.cluster > 1) {
      gpu::sync_cluster();
    } else {
      gpu::sync_block();
    }
    const int at_once = gpu::not_before_here(static_cast<int>(blockDim.x)) / most_blocks;
    for (int from = 0; from < l.groups; from += at_once) {
      const int group = from + thread() / most_blocks, block = thread() % most_blocks;
      const float2* of_block = partials(parity) + min(group, l.groups - 1);
      const float2 moments = a.cluster > 1 ? merged(of_block, block) : *of_block;
      if (block > 0 || group >= l.groups) continue;
      const float count = static_cast<float>(gpu::not_before_here(a.pixels)) * gpu::not_before_here(l.group_channels);
      const float rstd = rstd_of(moments.y, count, a.eps);
      statistics()[group] = make_float2(moments.x, rstd);
      if (a.tensors.mean != nullptr && rank() == 0) {
        const int64_t at = static_cast<int64_t>(image) * a.groups + slice() * l.groups + group;
        a.tensors.mean[at] = moments.x;
        a.tensors.rstd[at] = rstd;
      }
    }
    gpu::sync_block();
  }

  // Writes the result, and loads the next image into each chunk that has been read.
  BITFAST_GPU void normalize(int image, int next) {
    const Affine<T, parts> affine(weight(), bias(), statistics(), groups, place);
    char* result = vector_of(static_cast<char*>(a.tensors.result), image);
    for (int c = 0; c * chunk() < pixels; ++c) {
      dispatch_activation(a.activation, [&](auto kind) {
        constexpr Activation activation = decltype(kind)::value;
        constexpr bool is_simple = activation == Activation::relu || activation == Activation::none;
        for_loaded<is_simple ? vectors_of_chunk : 1>(c, [&](int pixel, const uint4& v) {
          gpu::store_16(result + pixel * a.pitch, affine.template apply<activation>(v));
        });
      });
      if (next < a.images) {
        gpu::fence_async_proxy();
        gpu::sync_block();
        load_chunk(next, c);
      }
    }
  }

 private:
  // Cheaper to compute than to keep in registers.
  BITFAST_GPU int thread() const { return gpu::not_before_here(static_cast<int>(threadIdx.x)); }
  BITFAST_GPU int chunk() const { return vectors_of_chunk * gpu::not_before_here(l.lanes); }  // pixels
  BITFAST_GPU unsigned char* data() const { return gpu::shared_memory() + gpu::not_before_here(0); }
  BITFAST_GPU float* weight() const { return reinterpret_cast<float*>(data() + a.shared.weight); }
  BITFAST_GPU float* bias() const { return reinterpret_cast<float*>(data() + a.shared.bias); }
  BITFAST_GPU float2* sums_of_rows() const { return reinterpret_cast<float2*>(data() + a.shared.sums); }
  // Those of two images in turn lie in two places, so that one barrier between the blocks is enough.
  BITFAST_GPU float2* partials(uint32_t parity) const {
    return reinterpret_cast<float2*>(data() + a.shared.partials) + parity * l.groups;
  }
  BITFAST_GPU float2* statistics() const { return reinterpret_cast<float2*>(data() + a.shared.statistics); }
  BITFAST_GPU float* pivots() const { return reinterpret_cast<float*>(data() + a.shared.pivots); }
  BITFAST_GPU gpu::Barrier* barriers() const { return reinterpret_cast<gpu::Barrier*>(data() + a.shared.barriers); }

  BITFAST_GPU int pixels_of(int block) const { return gpu::not_before_here(a.block_pixels) + (block < a.blocks_with_one_more ? 1 : 0); }
  BITFAST_GPU int rank() const { return a.cluster > 1 ? gpu::cluster_rank() : 0; }
  BITFAST_GPU int slice() const { return static_cast<int>(blockIdx.x) / a.cluster % a.slices; }

  // The block's first pixel of an image.
  BITFAST_GPU int64_t begin_of(int image) const { return static_cast<int64_t>(image) * a.image_bytes + offset; }
  // The thread's vector there.
  template <typename Data>
  BITFAST_GPU Data* vector_of(Data* data, int image) const {
    return data + begin_of(image) + place.vector * 16;
  }

  // One copy for whole pixels, else one for each pixel, by the first warp.
  BITFAST_GPU void load_chunk(int image, int c) {
    if (thread() >= 32) return;
    const int first = c * chunk(), count = min(pixels - first, chunk()), row = l.vectors * 16;
    const char* from = static_cast<const char*>(a.tensors.x) + begin_of(image) + first * a.pitch;
    unsigned char* to = data() + first * row;
    gpu::Barrier* barrier = barriers() + c;
    if (thread() == 0) gpu::arrive_and_expect(barrier, static_cast<uint32_t>(count * row));
    if (a.slices == 1) {
      if (thread() == 0) gpu::bulk_load(to, from, static_cast<uint32_t>(count * row), barrier);
      return;
    }
    gpu::sync_warp();
    for (int i = thread(); i < count; i += 32) {
      gpu::bulk_load(to + i * row, from + i * a.pitch, static_cast<uint32_t>(row), barrier);
    }
  }

  BITFAST_GPU unsigned char* loaded(int pixel) const { return data() + (pixel * l.vectors + place.vector) * 16; }

  // Calls use(pixel, vector) for each vector of the thread in a chunk that has arrived.
  template <int at_once = vectors_of_chunk, typename Use>
  BITFAST_GPU void for_loaded(int c, const Use& use) const {
    const int first = c * chunk() + gpu::not_before_here(lane);
#pragma unroll at_once
    for (int i = 0; i < vectors_of_chunk; ++i) {
      const int pixel = first + i * l.lanes;
      if (pixel < pixels) use(pixel, gpu::load_shared_16(loaded(pixel)));
    }
  }

  // Waits for a chunk, adds the residual to it, and calls use(vector).
  template <typename Use>
  BITFAST_GPU void for_chunk(int image, int c, uint32_t parity, const Use& use) {
    const int first = c * chunk() + gpu::not_before_here(lane);
    uint4 residual[vectors_of_chunk] = {};  // without values the registers would be taken all the time
    if constexpr (adds) {
      const char* more = vector_of(static_cast<const char*>(a.tensors.residual), gpu::not_before_here(image));
#pragma unroll
      for (int i = 0; i < vectors_of_chunk; ++i) {
        const int pixel = first + i * l.lanes;
        if (pixel < pixels) {
          residual[i] = gpu::load_streaming(more + pixel * a.pitch);
        }
      }
    }
    gpu::wait_for(barriers() + c, parity);
    const int again = gpu::not_before_here(first);
    char* total = adds ? vector_of(static_cast<char*>(a.tensors.total), gpu::not_before_here(image)) : nullptr;
#pragma unroll
    for (int i = 0; i < vectors_of_chunk; ++i) {
      const int pixel = again + i * l.lanes;
      if (pixel < pixels) {
        uint4 v = gpu::load_shared_16(loaded(pixel));
        if constexpr (adds) {
          v = add_vectors<T>(v, residual[i]);
          gpu::store_shared_16(loaded(pixel), v);
          gpu::store_16(total + pixel * a.pitch, v);
        }
        use(v);
      }
    }
  }

  // A group's moments over all blocks (Chan, Golub & LeVeque, 1979), by adjacent lanes, each for one block.
  BITFAST_GPU float2 merged(const float2* of_block, int block) const {
    const float2 first = gpu::load_remote(of_block, 0), mine = gpu::load_remote(of_block, min(block, a.cluster - 1));
    const float size = block < a.cluster ? static_cast<float>(pixels_of(block)) : 0.0f;
    const float away = add_members((mine.x - first.x) * size, most_blocks);
    const float mean = first.x + away / static_cast<float>(gpu::not_before_here(a.pixels)), d = mine.x - mean;
    const float squares = block < a.cluster ? mine.y + d * d * (size * gpu::not_before_here(l.group_channels)) : 0.0f;
    return make_float2(mean, add_members(squares, most_blocks));
  }

  const ClusterArguments& a;
  const Layout& l;
  const Place place;
  const Groups<parts> groups;
  int pixels;  // of the block in an image
  int offset;  // of the first in the image, in bytes
  int lane;
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
    const int step = static_cast<int>(gridDim.x) / (a.cluster * a.slices);
    int image = static_cast<int>(blockIdx.x) / (a.cluster * a.slices);
    ClusterBlock<T, parts, adds> block(a);
    block.begin(image);
    for (uint32_t parity = 0; image < a.images; image += step, parity ^= 1) {
      block.sum(image, parity);
      block.merge(image, parity);
      block.normalize(image, image + step);
    }
    if (a.cluster > 1) gpu::sync_cluster();  // nobody leaves while others read its shared memory
  }
};

}  // namespace bitfast::group_norm_act
