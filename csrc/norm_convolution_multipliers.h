// norm_convolution on a GPU: the two groups of four warps that multiply, add residuals, write results and measure them.
//
// Either a group has tiles of its own, and they take turns: while one multiplies, the other writes; or both share a
// tile, of which each has half of the units, and so the weights.
#pragma once

#include "norm_convolution_moments.h"

namespace bitfast::norm_convolution {

constexpr int multiplier_groups = 2;

// units: of a tile, that a group multiplies at a time. Its registers hold the sums.
template <typename T, int columns, int units>
struct Multiplier {
  static constexpr int vectors = columns / 8, pieces = columns / piece_channels;
  static constexpr int rows_at_once = 32 * vector_bytes / (2 * piece_channels);  // that a warp copies
  static constexpr int copies = warp_pixels / rows_at_once;
  static constexpr int none = -1;
  using Sums = float[units][vectors][4];

  const Arguments& a;
  const Barriers& barriers;
  int lane, warp, group;  // warp: in the group
  int buffer = 0, moments = 0;  // which of two is next

  BITFAST_GPU Multiplier(const Arguments& arguments, const Barriers& all_barriers)
      : a(arguments), barriers(all_barriers) {
    const int thread = static_cast<int>(threadIdx.x);
    lane = thread % 32;
    warp = gpu::same_in_warp(thread / 32 % 4);
    group = gpu::same_in_warp(thread / 128 - 1);
  }

  BITFAST_GPU void run() {
    const BlockTiles tiles(a);
    Sums sums;
    // The tiles of the block that are this group's, by their number.
    int n = a.takes_turns ? group : 0;
    const int step = a.takes_turns ? multiplier_groups : 1;
    for (int t = tiles.first + n * tiles.step; t < a.tiles; t += step * tiles.step, n += step) {
      const Tile tile(a, t, columns);
      // Without turns a group could wait for a phase two rounds of the ring ahead, whose parity has been there already.
      if (a.takes_turns) gpu::wait_for(barriers.turn(group), turn_parity(n));
      multiply(sums, n, tile);
      if (adds(tile)) {
        write<true>(sums, tile);
      } else {
        write<false>(sums, tile);
      }
    }
    gpu::wait_copies<0>();
  }

 private:
  // ---- products -----------------------------------------------------------------------------------------------------

  // The first group begins; each phase of its barrier is the end of one of the other group's turns.
  BITFAST_GPU int turn_parity(int n) const { return (n / multiplier_groups & 1) ^ (group == 0 ? 1 : 0); }

  BITFAST_GPU int unit_of(int i) const { return a.takes_turns ? i : group * units + i; }

  BITFAST_GPU void multiply(Sums& sums, int n, const Tile& tile) const {
    using gpu::moved;
    const Patches& p = a.patches;
    const int pitch = static_cast<int>(p.pitch.value), weight_stage_bytes = planes * columns * vector_bytes;
    const gpu::MatrixPlace inputs = gpu::matrix_at(gpu::shared_memory(), a.plane_bytes, 8 * vector_bytes);
    const gpu::MatrixPlace weights =
        gpu::matrix_at(gpu::shared_memory() + a.shared.weights, columns * vector_bytes, 8 * vector_bytes);
    int unit_bytes[units];
#pragma unroll
    for (int i = 0; i < units; ++i) {
      const int unit = unit_of(i), patch = unit >> p.units_log2;
      unit_bytes[i] = (patch * p.positions + (unit - (patch << p.units_log2)) * unit_pixels) * vector_bytes;
    }
    RingPlace place = after(n * a.chunks, a.stages);
    // Weights that are kept have been there since the first phase.
    RingPlace weight_place = a.keeps_weights ? RingPlace() : after(n * a.chunks * a.taps, a.weight_stages);
    int read = none, weights_read = none;  // stages that the products before read last
    gpu::begin_products(sums);
    bool adds = false;
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
      gpu::wait_for(barriers.full(place.stage), place.parity);
      gpu::fence_async_proxy();  // of what the loaders wrote
      const gpu::MatrixPlace stage = moved(inputs, place.stage * planes * a.plane_bytes);
      for (int tap = 0, y = 0, x = 0; tap < a.taps; ++tap) {
        gpu::wait_for(barriers.weights_full(weight_place.stage), weight_place.parity);
        const int phase = p.phase == 0 ? 0 : ((y & 1) * 2 + (x & 1)) * p.phase;
        const int position = p.phase == 0 ? y * pitch + x : phase + (y >> 1) * pitch + (x >> 1);
        const gpu::MatrixPlace left = moved(stage, position * vector_bytes);
        const gpu::MatrixPlace right = moved(weights, weight_place.stage * weight_stage_bytes);
        gpu::continue_products();
#pragma unroll
        for (int k = 0; k < chunk_channels / 16; ++k) {
#pragma unroll
          for (int i = 0; i < units; ++i) {
            gpu::multiply_add_64xNx16<T>(
                sums[i], moved(left, unit_bytes[i] + 2 * k * a.plane_bytes),
                moved(right, 2 * k * columns * vector_bytes), adds || k > 0);
          }
        }
        adds = true;
        gpu::commit_products();
        gpu::wait_product_groups<1>();
        tell(read, weights_read);
        read = tap + 1 == a.taps ? place.stage : none;
        weights_read = a.keeps_weights ? none : weight_place.stage;
        if (++x == 3) {
          x = 0;
          ++y;
        }
        weight_place.advance(a.weight_stages);
      }
      place.advance(a.stages);
    }
    if (a.takes_turns && lane == 0) gpu::arrive(barriers.turn(group ^ 1));
    if (this->adds(tile)) fetch_first_residual(tile, 0, buffer);  // no fence waits for it any more
    gpu::wait_products(sums);
    tell(read, weights_read);
  }

  static BITFAST_GPU RingPlace after(int steps, int stages) {
    RingPlace place;
    place.stage = steps % stages;
    place.parity = steps / stages & 1;
    return place;
  }

  // Tells those who bring them that stages have been read.
  BITFAST_GPU void tell(int read, int weights_read) const {
    if (lane != 0) return;
    if (read != none) gpu::arrive(barriers.empty(read));
    if (weights_read == none) return;
    gpu::arrive(barriers.weights_empty(weights_read));
    if (a.cluster > 1) gpu::arrive_remote(barriers.weights_empty(weights_read), gpu::cluster_rank() ^ 1);
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  // A unit of a tile, and where a lane's rows of it lie.
  struct Unit {
    bool exists;
    Patch patch;
    int64_t first_result;
    int first_row;  // positions of the patch, of this warp's first row

    BITFAST_GPU Unit(const Multiplier& m, const Tile& tile, int i)
        : exists(tile.first_patch + (m.unit_of(i) >> m.a.patches.units_log2) < m.a.patches.count),
          patch(m.a.patches, exists ? tile.first_patch + (m.unit_of(i) >> m.a.patches.units_log2) : 0) {
      first_result = patch.first_result(m.a.patches);
      first_row = (m.unit_of(i) & ((1 << m.a.patches.units_log2) - 1)) * unit_pixels + m.warp * warp_pixels;
    }
    // The result of the warp's row, counted from the patch's first; -1 if there is none.
    BITFAST_GPU int result_at(const Multiplier& m, int row) const {
      return exists ? patch.result_at(m.a.patches, first_row + row) : -1;
    }
  };

  BITFAST_GPU bool adds(const Tile& tile) const { return a.residual != nullptr && !tile.is_second; }

  // The row that the lane copies 16 bytes of, and which.
  BITFAST_GPU int copied_row(int copy) const { return copy * rows_at_once + lane / planes; }
  BITFAST_GPU int copied_channel() const { return lane % planes * 8; }

  BITFAST_GPU void find_results(int (&results)[copies], const Unit& unit) const {
#pragma unroll
    for (int copy = 0; copy < copies; ++copy) results[copy] = unit.result_at(*this, copied_row(copy));
  }

  // One of the warp's buffers.
  BITFAST_GPU unsigned char* buffer_at(int number) const {
    return gpu::shared_memory() + a.shared.buffers + ((group * 4 + warp) * a.buffers + number) * buffer_bytes;
  }

  // Of 64 channels, from `channel` on.
  BITFAST_GPU void fetch_residual(const Unit& unit, const int (&results)[copies], int channel, int to) const {
    const int channels = a.outputs[0].channels;
    channel += copied_channel();
    if (channel < channels) {
      const uint16_t* from = a.residual + unit.first_result * channels + channel;
#pragma unroll
      for (int copy = 0; copy < copies; ++copy) {
        if (results[copy] < 0) continue;
        gpu::copy_16_async(
            buffer_at(to) + copied_row(copy) * buffer_row_bytes + copied_channel() * 2,
            from + static_cast<int64_t>(results[copy]) * channels);
      }
    }
    gpu::commit_copies();
  }

  BITFAST_GPU void fetch_first_residual(const Tile& tile, int i, int to) const {
    const Unit unit(*this, tile, i);
    int results[copies];
    find_results(results, unit);
    fetch_residual(unit, results, tile.column, to);
  }

  template <bool adds>
  BITFAST_GPU void write(const Sums& sums, const Tile& tile) {
    const bool measures = a.partials != nullptr && !tile.is_second;
    const Output& output = a.outputs[tile.is_second];
    const int count = min(pieces, (output.channels - tile.column + piece_channels - 1) / piece_channels);
#pragma unroll
    for (int i = 0; i < units; ++i) {
      lane = gpu::not_before_here(lane);  // or what follows from it would be held in registers for all tiles
      const Unit unit(*this, tile, i);
      int results[copies];
      find_results(results, unit);
      const Merging merging(unit.result_at(*this, lane / 4) >= 0, unit.result_at(*this, lane / 4 + 8) >= 0);
      if (measures && lane == 0) unit_moments().pixels[warp] = merging.pixels();
#pragma unroll
      for (int piece = 0; piece < pieces; ++piece) {
        if (piece >= count) break;
        const int channel = tile.column + piece * piece_channels;
        if (adds) {
          if (piece + 1 < count) {
            fetch_residual(unit, results, channel + piece_channels, buffer ^ 1);
          } else if (i + 1 < units) {
            fetch_first_residual(tile, i + 1, buffer ^ 1);
          } else {
            gpu::commit_copies();
          }
          gpu::wait_copies<1>();
          gpu::sync_warp();
        }
        Moments pairs[piece_vectors / 2];
        pack_results<adds>(pairs, merging, sums[i], piece, measures);
        if (measures) {
          const UnitMoments shared = unit_moments();
          Moments* cells = shared.cells + warp * shared.count + (piece * piece_channels >> a.cell_log2);
          leave_cells(merging, pairs, lane, a.cell_log2, cells);
        }
        gpu::sync_warp();
        store_results(output, unit, results, channel);
        gpu::sync_warp();  // before anything is written there
        if (a.buffers > 1) buffer ^= 1;
      }
      if (measures && unit.exists) write_partials(tile, unit);
    }
  }

  // Rounds 64 channels of the warp's rows, with the residual that lies in the buffer added, leaves them there, and
  // begins to measure them.
  template <bool adds>
  BITFAST_GPU void pack_results(
      Moments (&pairs)[piece_vectors / 2], const Merging& merging, const float (&sums)[vectors][4], int piece,
      bool measures) const {
    unsigned char* at = buffer_at(buffer) + lane % 16 * buffer_row_bytes + lane / 16 * vector_bytes;
#pragma unroll
    for (int j = 0; j < piece_vectors / 2; ++j) {
      uint32_t residual[4] = {}, result[4];
      if (adds) gpu::load_matrices(residual, at + j * 2 * vector_bytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* pair = &sums[piece * piece_vectors + 2 * j + k / 2][k % 2 * 2];
        if (adds) {
          result[k] = gpu::pack_two<T>(
              pair[0] + gpu::low_number<T>(residual[k]), pair[1] + gpu::high_number<T>(residual[k]));
        } else {
          result[k] = gpu::pack_two<T>(pair[0], pair[1]);
        }
      }
      gpu::store_matrices(at + j * 2 * vector_bytes, result);
      if (measures) pairs[j] = moments_of_pair<T>(merging, lane, result);
    }
  }

  BITFAST_GPU void store_results(
      const Output& output, const Unit& unit, const int (&results)[copies], int channel) const {
    const unsigned char* from = buffer_at(buffer) + copied_channel() * 2;
    if (channel + copied_channel() >= output.channels) return;
    uint16_t* to = output.result + unit.first_result * output.channels + channel + copied_channel();
#pragma unroll
    for (int copy = 0; copy < copies; ++copy) {
      if (results[copy] < 0) continue;
      const uint4 v = gpu::load_shared_16(from + copied_row(copy) * buffer_row_bytes);
      gpu::store_16(to + static_cast<int64_t>(results[copy]) * output.channels, v);
    }
  }

  // Two in turns, so that a warp may go on to the next unit while others still read.
  BITFAST_GPU UnitMoments unit_moments() const {
    const int at = a.shared.moments + (group * 2 + moments) * a.unit_moments_bytes;
    return {gpu::shared_memory() + at, columns >> a.cell_log2};
  }

  // Writes what the group's warps have left of a unit.
  BITFAST_GPU void write_partials(const Tile& tile, const Unit& unit) {
    gpu::sync_some(1 + group, 128);
    const UnitMoments shared = unit_moments();
    moments ^= 1;
    const int strip = (unit.patch.number << a.patches.units_log2) + unit.first_row / unit_pixels;
    float* of_strip = a.partials + (static_cast<int64_t>(unit.patch.image) * a.strips + strip) * (1 + a.cells) * 2;
    const int cell = warp * 32 + lane, first = tile.column >> a.cell_log2;
    if (cell < shared.count && first + cell < a.cells) {
      const Moments all = shared.merged_cell(cell, 1 << a.cell_log2);
      gpu::store_8(of_strip + (1 + first + cell) * 2, make_uint2(gpu::bits_of(all.mean), gpu::bits_of(all.squares)));
    }
    if (first == 0 && warp == 0 && lane == 0) {
      const float pixels = (shared.pixels[0] + shared.pixels[1]) + (shared.pixels[2] + shared.pixels[3]);
      gpu::store_8(of_strip, make_uint2(gpu::bits_of(pixels), 0));
    }
  }
};

}  // namespace bitfast::norm_convolution
