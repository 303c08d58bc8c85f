// norm_convolution on a GPU: the warps that bring weights and input into shared memory, and normalize the latter.
#pragma once

#include "gpu_activation.h"
#include "norm_convolution_tiles.h"

namespace bitfast::norm_convolution {

using gpu::load_shared_16;
using gpu::store_shared_16;

// What one thread does: brings the weights of all tiles of the block.
struct WeightLoader {
  const Arguments& a;
  const Barriers& barriers;
  int columns;

  BITFAST_GPU void run() const {
    const BlockTiles tiles(a);
    const int steps = a.chunks * a.taps;
    // Into the cache, where it is not stale if the launch before still writes it.
    if (tiles.first < a.tiles) prefetch(Tile(a, tiles.first, columns), min(steps, a.weight_stages));
    gpu::wait_for_launch_before();
    RingPlace place;
    for (int t = tiles.first; t < a.tiles; t += tiles.step) {
      const Tile tile(a, t, columns);
      for (int i = 0; i < steps; ++i) {
        if (!a.keeps_weights) gpu::wait_for(barriers.weights_empty(place.stage), place.parity ^ 1);
        load(tile, i, place.stage);
        place.advance(a.weight_stages);
      }
      if (a.keeps_weights) return;  // all tiles of the block are of the same channels
    }
  }

 private:
  BITFAST_GPU const unsigned char* plane_of(const Tile& tile, int number, int plane) const {
    const Output& output = a.outputs[tile.is_second];
    const int64_t vectors = (static_cast<int64_t>(number) * planes + plane) * output.channels + tile.column;
    return output.weights + vectors * vector_bytes;
  }
  BITFAST_GPU int channels_of(const Tile& tile) const {
    return min(columns, a.outputs[tile.is_second].channels - tile.column);
  }

  BITFAST_GPU void prefetch(const Tile& tile, int stages) const {
    for (int i = 0; i < stages * planes; ++i) {
      gpu::prefetch_l2(plane_of(tile, i / planes, i % planes), channels_of(tile) * vector_bytes);
    }
  }

  // Brings the weights of one place in the filter and 64 input channels: as a plane of each 8 channels, the vectors of
  // the tile's result channels.
  BITFAST_GPU void load(const Tile& tile, int number, int stage) const {
    const Output& output = a.outputs[tile.is_second];
    const int count = channels_of(tile), mine = planes / a.cluster;
    const int first = a.cluster == 1 ? 0 : gpu::cluster_rank() * mine;
    unsigned char* to =
        gpu::shared_memory() + a.shared.weights + (stage * planes + first) * columns * vector_bytes;
    const unsigned char* from = plane_of(tile, number, first);
    gpu::Barrier* barrier = barriers.weights_full(stage);
    gpu::arrive_and_expect(barrier, planes * count * vector_bytes);
    const bool are_together = count == output.channels && count == columns;
    const int copies = are_together ? 1 : mine;
    const uint32_t bytes = (are_together ? mine : 1) * count * vector_bytes;
    for (int i = 0; i < copies; ++i) {
      if (a.cluster == 1) {
        gpu::bulk_load(to, from, bytes, barrier);
      } else {
        gpu::bulk_load_to(static_cast<uint16_t>((1 << a.cluster) - 1), to, from, bytes, barrier);
      }
      to += columns * vector_bytes;
      from += static_cast<int64_t>(output.channels) * vector_bytes;
    }
  }
};

// The scale and the shift of eight channels.
struct Factors {
  uint4 words[4];

  BITFAST_GPU void load(const float* scale, int channels) {
    words[0] = gpu::load_written_16(scale);
    words[1] = gpu::load_written_16(scale + 4);
    words[2] = gpu::load_written_16(scale + channels);
    words[3] = gpu::load_written_16(scale + channels + 4);
  }

  template <typename T, Activation activation>
  BITFAST_GPU uint4 normalized(const uint4& v) const {
    float numbers[8];
    gpu::unpack<T>(v, numbers);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = gpu::float_from_bits(gpu::word_of(words[i / 4], i % 4));
      const float shift = gpu::float_from_bits(gpu::word_of(words[2 + i / 4], i % 4));
      numbers[i] = gpu::fused_multiply_add(numbers[i], scale, shift);
    }
    return gpu::pack_activated<T, activation>(numbers);
  }
};

// The pixels of a patch that a thread brings, one after the other: every twelfth, of eight channels. Here those of a
// run: 1x1 filters with stride 1.
struct RunItems {
  int number, end;  // in the patch
  int first_pixel;  // of the patch, in the image

  BITFAST_GPU RunItems(const Arguments&, const Patch& patch, int first)
      : number(first), end(patch.columns), first_pixel(patch.column) {}

  BITFAST_GPU bool is_in_patch() const { return number < end; }
  BITFAST_GPU void advance(const Arguments&) { number += items_at_once; }
  // Whether it is a pixel of the input, and not padding.
  BITFAST_GPU bool is_in_map(const Arguments&) const { return true; }
  // Which.
  BITFAST_GPU int pixel(const Arguments&) const { return first_pixel + number; }
  // Its place in a plane, in bytes.
  BITFAST_GPU int place(const Patches&) const { return number * vector_bytes; }
};

// The same for all others. Items go along rows of the input; with 1x1 filters, on from where the patch before ended.
struct RowItems {
  int number, end;
  int row, column;
  int row0, column0;  // of the input, where items are counted from
  int step;           // pixels of the input from one to the next

  BITFAST_GPU RowItems(const Arguments& a, const Patch& patch, int first) : number(first) {
    const Patches& p = a.patches;
    const bool is_run = a.taps == 1;
    end = is_run ? patch.columns : ((patch.rows - 1) * a.stride + 3) * static_cast<int>(p.items_per_row.value);
    column = is_run ? patch.column + first : first;
    row = p.items_per_row.divide(column);
    row0 = is_run ? 0 : patch.row * a.stride - a.top;
    column0 = is_run ? 0 : patch.column * a.stride - a.left;
    step = is_run ? a.stride : 1;
  }

  BITFAST_GPU bool is_in_patch() const { return number < end; }
  BITFAST_GPU void advance(const Arguments& a) {
    number += items_at_once;
    column += items_at_once;
    row += a.patches.items_per_row.divide(column);
  }
  BITFAST_GPU int y() const { return row0 + row * step; }
  BITFAST_GPU int x() const { return column0 + column * step; }
  BITFAST_GPU bool is_in_map(const Arguments& a) const {
    return static_cast<unsigned>(y()) < static_cast<unsigned>(a.height) &&
           static_cast<unsigned>(x()) < static_cast<unsigned>(a.width);
  }
  BITFAST_GPU int pixel(const Arguments& a) const { return y() * a.width + x(); }
  BITFAST_GPU int place(const Patches& p) const {
    if (p.phase == 0) return number * vector_bytes;
    const int phase = (row & 1) * 2 + (column & 1);
    return (phase * p.phase + (row >> 1) * static_cast<int>(p.pitch.value) + (column >> 1)) * vector_bytes;
  }
};

// What 96 threads do: bring the input of all tiles of the block, and normalize it some stages later; each thread what
// it has brought itself, so that nobody waits for anybody. A thread has the same 8 channels of each 64.
template <typename T, typename Items>
struct Loader {
  const Arguments& a;
  const Barriers& barriers;
  int columns;
  unsigned thread;

  BITFAST_GPU Loader(const Arguments& arguments, const Barriers& all_barriers, int tile_columns)
      : a(arguments), barriers(all_barriers), columns(tile_columns), thread(threadIdx.x - 32) {}

  BITFAST_GPU void run() {
    const BlockTiles tiles(a);
    Step loading(a, tiles, columns), normalizing(a, tiles, columns);
    int behind = 0;  // how many stages normalizing is
    while (normalizing.tile < a.tiles) {
      thread = gpu::not_before_here(thread);  // or what follows from it would be held in registers all the time
      const bool normalizes = behind == a.lag;
      Factors factors = {};
      // Long before they are needed.
      if (normalizes && normalizes_now(normalizing)) factors = factors_of(normalizing, 0);
      if (loading.tile < a.tiles) {
        gpu::wait_for(barriers.empty(loading.place.stage), loading.place.parity ^ 1);
        load(loading);
        loading.advance(a, tiles, columns);
      }
      gpu::commit_copies();
      if (!normalizes) {
        ++behind;
        continue;
      }
      wait_for_copies(a.lag);
      if (normalizes_now(normalizing)) normalize(normalizing, factors);
      gpu::sync_warp();  // those who multiply fence what lies there: a fence here could wait for the copies under way
      if (thread % 32 == 0) gpu::arrive(barriers.full(normalizing.place.stage));
      normalizing.advance(a, tiles, columns);
    }
    gpu::wait_copies<0>();
  }

 private:
  // A tile of the block, and 64 channels.
  struct Step {
    int tile, chunk = 0;
    int first_patch, patches;  // of the tile
    RingPlace place;

    BITFAST_GPU Step(const Arguments& a, const BlockTiles& tiles, int columns) : tile(tiles.first) {
      find_patches(a, columns);
    }

    BITFAST_GPU void advance(const Arguments& a, const BlockTiles& tiles, int columns) {
      place.advance(a.stages);
      if (++chunk < a.chunks) return;
      chunk = 0;
      tile += tiles.step;
      find_patches(a, columns);
    }

   private:
    BITFAST_GPU void find_patches(const Arguments& a, int columns) {
      first_patch = Tile(a, tile, columns).first_patch;
      patches = min(1 << (a.units_log2 - a.patches.units_log2), a.patches.count - first_patch);
    }
  };

  static BITFAST_GPU void wait_for_copies(int stages_under_way) {
    switch (stages_under_way) {
      case 0:
        return gpu::wait_copies<0>();
      case 1:
        return gpu::wait_copies<1>();
      case 2:
        return gpu::wait_copies<2>();
      case 3:
        return gpu::wait_copies<3>();
      default:
        return gpu::wait_copies<4>();
    }
  }

  BITFAST_GPU int plane() const { return thread & (planes - 1); }
  BITFAST_GPU Items items_of(const Patch& patch) const { return Items(a, patch, thread / planes); }
  // Where a patch of a stage lies in this thread's plane.
  BITFAST_GPU unsigned char* place_of(const Step& step, int patch) const {
    return gpu::shared_memory() + (step.place.stage * planes + plane()) * a.plane_bytes +
           patch * a.patches.positions * vector_bytes;
  }
  // The first of this thread's channels.
  BITFAST_GPU int channel_of(const Step& step) const { return step.chunk * chunk_channels + plane() * 8; }
  BITFAST_GPU bool has_channels(const Step& step) const { return channel_of(step) < a.channels; }

  BITFAST_GPU void load(const Step& step) const {
    const bool has_channels = this->has_channels(step);
    for (int n = 0; n < step.patches; ++n) {
      const Patch patch(a.patches, step.first_patch + n);
      unsigned char* to = place_of(step, n);
      if (has_channels) {
        load_patch(step, patch, to);
      } else {
        for (Items i = items_of(patch); i.is_in_patch(); i.advance(a)) set_zero(to + i.place(a.patches));
      }
    }
  }

  BITFAST_GPU void load_patch(const Step& step, const Patch& patch, unsigned char* to) const {
    const uint16_t* image =
        a.x + static_cast<int64_t>(patch.image) * a.height * a.width * a.channels + channel_of(step);
    for (Items i = items_of(patch); i.is_in_patch(); i.advance(a)) {
      unsigned char* place = to + i.place(a.patches);
      if (i.is_in_map(a)) {
        gpu::copy_16_async(place, image + static_cast<int64_t>(i.pixel(a)) * a.channels);
      } else {
        set_zero(place);
      }
    }
  }

  static BITFAST_GPU void set_zero(unsigned char* place) { store_shared_16(place, make_uint4(0, 0, 0, 0)); }

  BITFAST_GPU bool normalizes_now(const Step& step) const {
    return a.has_norm && has_channels(step) && step.patches > 0;
  }

  BITFAST_GPU Factors factors_of(const Step& step, int n) const {
    const int64_t image = Patch(a.patches, step.first_patch + n).image;
    Factors factors;
    factors.load(a.factors + image * 2 * a.channels + channel_of(step), a.channels);
    return factors;
  }

  // `next`: the factors of the first patch.
  BITFAST_GPU void normalize(const Step& step, Factors next) const {
    for (int n = 0; n < step.patches; ++n) {
      const Factors factors = next;
      if (n + 1 < step.patches) next = factors_of(step, n + 1);
      const Patch patch(a.patches, step.first_patch + n);
      if (a.activation == Activation::relu) {
        normalize_patch<Activation::relu>(patch, place_of(step, n), factors);
      } else {
        normalize_patch<Activation::none>(patch, place_of(step, n), factors);
      }
    }
  }

  // Padding stays zero.
  template <Activation activation>
  BITFAST_GPU void normalize_patch(const Patch& patch, unsigned char* at, const Factors& factors) const {
    constexpr int batch = 3;
    for (Items i = items_of(patch); i.is_in_patch();) {
      uint4 v[batch];
      int places[batch];
      bool are_pixels[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        are_pixels[k] = i.is_in_patch() && i.is_in_map(a);
        places[k] = i.place(a.patches);
        v[k] = load_shared_16(at + places[k]);  // whatever lies there: only the result is left away
        i.advance(a);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const uint4 result = factors.template normalized<T, activation>(v[k]);
        if (are_pixels[k]) store_shared_16(at + places[k], result);
      }
    }
  }
};

}  // namespace bitfast::norm_convolution
