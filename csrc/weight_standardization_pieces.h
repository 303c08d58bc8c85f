// How the CUDA kernels of weight_standardization divide the work: weights into items, items into pieces.
//
// An item is what a block takes at a time: as many whole filters as its threads can hold, at most stage_elements
// numbers, which are adjacent in memory. A filter that is longer is an item of its own, of several chunks, which the
// block reads twice: to measure it, and to write it. A piece is what lies in shared memory at a time: an item, or a
// chunk. Items go to blocks in turn.
//
// All that a launch knows of its weights comes as an argument of the kernel: nothing is copied to the GPU beforehand,
// and a CUDA graph can record it.
#pragma once

#include "gpu.h"

namespace bitfast::weight_standardization {

using namespace bitfast::gpu;

constexpr int threads = 128;
constexpr int warps = threads / 32;
constexpr int elements_per_thread = 36;  // so that a 3x3 kernel of 64, 128, ... channels uses all threads
constexpr int stage_elements = threads * elements_per_thread;
constexpr int most_weights = 108;  // of a launch: its arguments take 4 KB at most. ResNet-101 has 104
constexpr int start_unit = 64;     // weights begin at multiples of so many elements in the buffer of results

enum class Form : uint8_t {
  whole,      // whole filters in shared memory
  in_chunks,  // one filter after the other, chunk by chunk
  any,        // read where it lies, number by number: no alignment is asked for
};

// A weight, as the kernels see it.
struct Filters {
  uint32_t first_item;    // among those of the launch
  uint32_t first_filter;  // among those of all weights
  uint32_t start;         // in the buffer of results, in units
  uint32_t fan_in;
  uint16_t taps;  // see Weight
  Form form;
  uint8_t lanes_log2;  // of the threads that share a filter: an item is threads >> lanes_log2 filters
};
static_assert(sizeof(Filters) == 20, "as small as can be, since arguments take 4 KB at most");

struct Table {
  const void* weights[most_weights];
  Filters filters[most_weights + 1];  // the last one says where the items and filters of the others end
};

struct Piece {
  int weight;  // -1: there are no more
  int filter;  // the first, in its weight
  int step;    // chunks are measured in order, then written in order
  int chunks;

  BITFAST_GPU bool exists() const { return weight >= 0; }
  BITFAST_GPU int chunk() const { return step < chunks ? step : step - chunks; }
  BITFAST_GPU bool is_measured() const { return step < chunks; }
  BITFAST_GPU bool is_last_measured() const { return step == chunks - 1; }
  BITFAST_GPU bool is_written() const { return chunks == 1 || step >= chunks; }
};

// Channels of a chunk: as many as fit, with those of a group (see Order) kept together. 0 if none fit.
BITFAST_GPU int channels_per_chunk(int taps) {
  const int most = stage_elements / taps;
  return most >= 32 ? most / 32 * 32 : most / 8 * 8;
}

BITFAST_GPU int channels_of(const Filters& f) {
  return static_cast<int>(f.taps == 1 ? f.fan_in : f.fan_in / f.taps);
}

// The pieces of a block, in order.
class Pieces {
 public:
  BITFAST_GPU Pieces(const Table& table, int items) : table_(table), items_(items), item_(blockIdx.x) {}

  BITFAST_GPU Piece next() {
    if (item_ >= items_) return {-1, 0, 0, 1};
    while (item_ >= static_cast<int64_t>(table_.filters[weight_ + 1].first_item)) ++weight_;
    const Filters& f = table_.filters[weight_];
    Piece piece{weight_, static_cast<int>(item_ - f.first_item) * (threads >> f.lanes_log2), step_, 1};
    int steps = 1;
    if (f.form == Form::in_chunks) {
      const int each = channels_per_chunk(f.taps);
      piece.chunks = (channels_of(f) + each - 1) / each;
      steps = 2 * piece.chunks;
    }
    if (++step_ == steps) {
      step_ = 0;
      item_ += gridDim.x;
    }
    return piece;
  }

 private:
  const Table& table_;
  int64_t items_, item_;
  int weight_ = 0, step_ = 0;
};

// The part of a weight that a piece is: some filters, of each some channels with all their taps.
struct Extent {
  int rows, channels, taps;
  int first_channel, all_channels;

  BITFAST_GPU int row_elements() const { return channels * taps; }
  // Where the piece begins in its weight, in the weight's order.
  BITFAST_GPU int64_t begin(int filter) const {
    return static_cast<int64_t>(filter) * all_channels * taps + first_channel * taps;
  }
};

BITFAST_GPU Extent extent_of(const Table& table, const Piece& piece) {
  const Filters& f = table.filters[piece.weight];
  const int filters = static_cast<int>(table.filters[piece.weight + 1].first_filter - f.first_filter);
  const int channels = channels_of(f);
  Extent e{min(threads >> f.lanes_log2, filters - piece.filter), channels, f.taps, 0, channels};
  if (f.form == Form::in_chunks) {
    const int each = channels_per_chunk(f.taps);
    e.first_channel = piece.chunk() * each;
    e.channels = min(each, channels - e.first_channel);
  }
  return e;
}

// The threads that share a filter, and this one's number among them.
struct Lanes {
  int log2, count, lane, row;

  BITFAST_GPU explicit Lanes(const Filters& f)
      : log2(f.lanes_log2), count(1 << log2), lane(threadIdx.x & (count - 1)), row(threadIdx.x >> log2) {}
};

// Sums over the threads that share a filter; all of them get the totals. All threads of the block call it.
// scratch: `count` numbers for each warp, which nobody uses for anything else until the next barrier of the block.
template <int count>
BITFAST_GPU void sum_over_lanes(float (&sums)[count], const Lanes& lanes, float* scratch) {
  for (int mask = 1; mask < lanes.count && mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] += shuffle_xor(sums[i], mask);
  }
  if (lanes.count > 32) {
    const int warp = threadIdx.x / 32, warps_of_filter = lanes.count / 32;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) scratch[warp * count + i] = sums[i];
    }
    sync_block();
    const int first = warp / warps_of_filter * warps_of_filter;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      sums[i] = 0.0f;
      for (int w = 0; w < warps_of_filter; ++w) sums[i] += scratch[(first + w) * count + i];
    }
  }
}

// Sums of a vector's numbers and products by halves: rounding errors stay smaller than one after the other.
template <int count>
BITFAST_GPU float sum_of(const float* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    return sum_of<count / 2>(x) + sum_of<count / 2>(x + count / 2);
  }
}
template <int count>
BITFAST_GPU float dot(const float* x, const float* y) {
  if constexpr (count == 1) {
    return x[0] * y[0];
  } else if constexpr (count == 2) {
    return fused_multiply_add(x[0], y[0], x[1] * y[1]);
  } else {
    return dot<count / 2>(x, y) + dot<count / 2>(x + count / 2, y + count / 2);
  }
}

// All threads of the block begin to copy; a multiple of 16 bytes.
BITFAST_GPU void begin_copy(void* shared, const void* global, int bytes) {
  auto* to = static_cast<unsigned char*>(shared);
  auto* from = static_cast<const unsigned char*>(global);
  for (int at = static_cast<int>(threadIdx.x) * 16; at < bytes; at += threads * 16) copy_16_async(to + at, from + at);
}

template <typename T>
BITFAST_GPU void begin_copy_of_weights(const Table& table, const Piece& piece, void* stage) {
  if (table.filters[piece.weight].form == Form::any) return;
  const Extent e = extent_of(table, piece);
  const T* weights = static_cast<const T*>(table.weights[piece.weight]) + e.begin(piece.filter);
  begin_copy(stage, weights, e.rows * e.row_elements() * static_cast<int>(sizeof(T)));
}

// The order in which the vectors of a result that is turned ([taps][channels], the weight being [channels][taps]) go to
// lanes. 32 lanes take 32 channels of as many taps as a vector has numbers, so that, the number of taps being odd, each
// reads another bank of shared memory; taps that are left over come last, one after the other.
struct Place {
  int tap, channel;
};

template <int vector>
class Order {
 public:
  BITFAST_GPU explicit Order(const Extent& e)
      : taps_in_groups_(e.channels % 32 == 0 ? e.taps / vector * vector : 0),
        grouped_(taps_in_groups_ * (e.channels / vector)),
        groups_(e.channels / 32),
        vectors_(e.channels / vector),
        groups_inverse_(1.0f / static_cast<float>(max(groups_, 1))),
        vectors_inverse_(1.0f / static_cast<float>(vectors_)) {}

  BITFAST_GPU Place at(int number) const {
    if (number < grouped_) {
      const int group = number / 32, lane = number % 32;
      const int tap_group = quotient(group, groups_inverse_);
      constexpr int across = 32 / vector;
      return {tap_group * vector + lane / across, (group - tap_group * groups_) * 32 + lane % across * vector};
    }
    const int rest = number - grouped_;
    const int tap = quotient(rest, vectors_inverse_);
    return {taps_in_groups_ + tap, (rest - tap * vectors_) * vector};
  }

 private:
  // Exact for numbers below a million.
  static BITFAST_GPU int quotient(int number, float inverse) {
    return static_cast<int>((static_cast<float>(number) + 0.5f) * inverse);
  }

  int taps_in_groups_, grouped_, groups_, vectors_;
  float groups_inverse_, vectors_inverse_;
};

// ---- numbers of which the dtype is known at run time ----------------------------------------------------------------

template <typename T, int count>
BITFAST_GPU void store_16_bit(void* data, int64_t index, const float (&numbers)[count]) {
  T* to = static_cast<T*>(data) + index;
  if constexpr (count == 4) {
    store_8(to, make_uint2(pack_two<T>(numbers[0], numbers[1]), pack_two<T>(numbers[2], numbers[3])));
  } else {
    store_16(to, pack<T>(numbers));
  }
}

BITFAST_GPU uint4 words_of(const float* numbers) {
  return make_uint4(bits_of(numbers[0]), bits_of(numbers[1]), bits_of(numbers[2]), bits_of(numbers[3]));
}

// Four or eight adjacent numbers, aligned to as many.
template <int count>
BITFAST_GPU void store_numbers(void* data, int64_t index, Dtype dtype, const float (&numbers)[count]) {
  if (dtype == Dtype::bfloat16) {
    store_16_bit<BFloat16>(data, index, numbers);
  } else if (dtype == Dtype::float16) {
    store_16_bit<Half>(data, index, numbers);
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4) store_16(static_cast<float*>(data) + index + i, words_of(numbers + i));
  }
}

template <typename T, int count>
BITFAST_GPU void load_shared_16_bit(const void* data, int index, float (&numbers)[count]) {
  const T* from = static_cast<const T*>(data) + index;
  if constexpr (count == 4) {
    const uint2 words = load_shared_8(from);
    numbers[0] = low_number<T>(words.x);
    numbers[1] = high_number<T>(words.x);
    numbers[2] = low_number<T>(words.y);
    numbers[3] = high_number<T>(words.y);
  } else {
    unpack<T>(load_shared_16(from), numbers);
  }
}

template <int count>
BITFAST_GPU void load_shared_numbers(const void* data, int index, Dtype dtype, float (&numbers)[count]) {
  if (dtype == Dtype::bfloat16) {
    load_shared_16_bit<BFloat16>(data, index, numbers);
  } else if (dtype == Dtype::float16) {
    load_shared_16_bit<Half>(data, index, numbers);
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const uint4 words = load_shared_16(static_cast<const float*>(data) + index + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) numbers[i + j] = float_from_bits(word_of(words, j));
    }
  }
}

// A vector of a weight's filter in shared memory, in the order of the result.
template <typename T, bool is_turned>
BITFAST_GPU void read_weights(const T* filter, const Place& place, int taps, float (&numbers)[vector_size<T>]) {
  if constexpr (is_turned) {
#pragma unroll
    for (int i = 0; i < vector_size<T>; ++i) numbers[i] = to_float(filter[(place.channel + i) * taps + place.tap]);
  } else {
    unpack<T>(load_shared_16(filter + place.channel), numbers);
  }
}

// Calls step(place) for each vector of a row that this lane works on.
template <int vector, bool is_turned, typename Step>
BITFAST_GPU void for_each_vector(const Extent& e, const Lanes& lanes, const Step& step) {
  const int count = lanes.row < e.rows ? e.row_elements() / vector : 0;
  if constexpr (is_turned) {
    const Order<vector> order(e);
    for (int v = lanes.lane; v < count; v += lanes.count) step(order.at(v));
  } else {
    for (int v = lanes.lane; v < count; v += lanes.count) step(Place{0, v * vector});
  }
}

}  // namespace bitfast::weight_standardization
