// weight_standardization on CUDA GPUs: all weights of a model in one launch, forward and backward.
//
// Persistent blocks take pieces of the weights in turn (weight_standardization_pieces.h), each from a stage of shared
// memory, while the next one is on its way to another stage. So memory sees each weight once; only filters that are
// longer than a stage are read twice, the second time from the L2 cache. The copies are cp.async, by all threads: the
// same code for all GPUs from sm_80 on, and any rows of 16 bytes. What keeps memory busy are the bytes on their way,
// four to eight blocks' stages of 9 to 37 KB on each multiprocessor; for that they need no copy engine.
#include "weight_standardization_cuda.h"

#include "weight_standardization_pieces.h"

namespace bitfast::weight_standardization {
namespace {

constexpr int stages = 2;

// ---- forward --------------------------------------------------------------------------------------------------------

// Variances do not cancel: they are taken around the mean (of a filter in chunks: around the mean of its first chunk,
// which is at most as many standard deviations away as the root of the number of chunks). What rounding left over of
// the mean, which matters where it is many standard deviations, is subtracted afterwards.
template <typename T>
struct Forward {
  struct Arguments {
    void* results;
    float *means, *rstds;
    float eps;
    Dtype result_dtype;
    int items;
    Table table;
  };
  static constexpr int threads = weight_standardization::threads;
  static constexpr int min_blocks = 8;
  static constexpr int capability = 80;
  static constexpr int vector = vector_size<T>;

  static int stage_bytes(Dtype) { return stage_elements * static_cast<int>(sizeof(T)); }
  static constexpr int scratch_numbers = 3 * warps;

  // What is known of this thread's filter. A filter in chunks becomes known step by step.
  struct Statistics {
    float shift, offset, rstd;  // the mean is shift + offset
    float offsets, squares;     // sums of x - shift and of its square
  };

  static BITFAST_GPU void run(const Arguments& a) {
    constexpr int bytes = stage_elements * static_cast<int>(sizeof(T));
    unsigned char* memory = shared_memory();
    auto* scratch = reinterpret_cast<float*>(memory + stages * bytes);
    Pieces pieces(a.table, a.items);
    auto begin_next = [&](int stage) {
      const Piece piece = pieces.next();
      if (piece.exists()) begin_copy_of_weights<T>(a.table, piece, memory + stage * bytes);
      commit_copies();
      return piece;
    };
    Piece now = begin_next(0);
    Statistics s{};
    for (int stage = 0; now.exists(); stage ^= 1) {
      wait_copies<0>();
      sync_block();  // the piece is there, and nobody needs the one before any more
      const Piece next = begin_next(stage ^ 1);
      const T* weights = reinterpret_cast<const T*>(memory + stage * bytes);
      const Filters& f = a.table.filters[now.weight];
      if (f.form == Form::any) {
        standardize_any(a, now, scratch);
      } else if (f.taps == 1) {
        standardize<false>(a, now, weights, s, scratch);
      } else {
        standardize<true>(a, now, weights, s, scratch);
      }
      now = next;
    }
    wait_copies<0>();
  }

  template <bool is_turned>
  static BITFAST_GPU void standardize(
      const Arguments& a, const Piece& piece, const T* weights, Statistics& s, float* scratch) {
    const Extent e = extent_of(a.table, piece);
    const Lanes lanes(a.table.filters[piece.weight]);
    const T* filter = weights + lanes.row * e.row_elements();
    if (piece.is_measured()) measure(a, piece, e, lanes, filter, s, scratch);
    if (piece.is_written()) write<is_turned>(a, piece, e, lanes, filter, s);
  }

  static BITFAST_GPU void finish(
      const Arguments& a, const Piece& piece, const Lanes& lanes, bool has_row, Statistics& s) {
    const Filters& f = a.table.filters[piece.weight];
    const float fan_in = static_cast<float>(f.fan_in);
    s.offset = s.offsets / fan_in;
    const float variance = s.squares / fan_in - s.offset * s.offset;
    s.rstd = reciprocal_sqrt((variance < 0.0f ? 0.0f : variance) + a.eps);  // a NaN stays one
    if (has_row && lanes.lane == 0) {
      const int64_t row = static_cast<int64_t>(f.first_filter) + piece.filter + lanes.row;
      a.means[row] = s.shift + s.offset;
      a.rstds[row] = s.rstd;
    }
  }

  static BITFAST_GPU void measure(
      const Arguments& a, const Piece& piece, const Extent& e, const Lanes& lanes, const T* filter, Statistics& s,
      float* scratch) {
    const bool has_row = lanes.row < e.rows;
    const int vectors = has_row ? e.row_elements() / vector : 0;
    if (piece.step == 0) {
      float sum[1] = {0.0f};
      for (int v = lanes.lane; v < vectors; v += lanes.count) {
        float x[vector];
        unpack<T>(load_shared_16(filter + v * vector), x);
        sum[0] += sum_of<vector>(x);
      }
      sum_over_lanes(sum, lanes, scratch);
      s = {sum[0] / static_cast<float>(e.row_elements()), 0.0f, 0.0f, 0.0f, 0.0f};
    }
    for (int v = lanes.lane; v < vectors; v += lanes.count) {
      float x[vector];
      unpack<T>(load_shared_16(filter + v * vector), x);
#pragma unroll
      for (int i = 0; i < vector; ++i) x[i] -= s.shift;
      s.offsets += sum_of<vector>(x);
      s.squares += dot<vector>(x, x);
    }
    if (piece.is_last_measured()) {
      float sums[2] = {s.offsets, s.squares};
      sum_over_lanes(sums, lanes, scratch + warps);
      s.offsets = sums[0];
      s.squares = sums[1];
      finish(a, piece, lanes, has_row, s);
    }
  }

  template <bool is_turned>
  static BITFAST_GPU void write(
      const Arguments& a, const Piece& piece, const Extent& e, const Lanes& lanes, const T* filter,
      const Statistics& s) {
    const Filters& f = a.table.filters[piece.weight];
    const int64_t begin = static_cast<int64_t>(f.start) * start_unit +
                          static_cast<int64_t>(piece.filter + lanes.row) * f.fan_in + e.first_channel;
    for_each_vector<vector, is_turned>(e, lanes, [&](const Place& place) {
      float x[vector];
      read_weights<T, is_turned>(filter, place, e.taps, x);
#pragma unroll
      for (int i = 0; i < vector; ++i) x[i] = (x[i] - s.shift - s.offset) * s.rstd;
      store_numbers(a.results, begin + place.tap * e.all_channels + place.channel, a.result_dtype, x);
    });
  }

  static BITFAST_GPU void standardize_any(const Arguments& a, const Piece& piece, float* scratch) {
    const Filters& f = a.table.filters[piece.weight];
    const Extent e = extent_of(a.table, piece);
    const Lanes lanes(f);
    const int filter = piece.filter + lanes.row, fan_in = static_cast<int>(f.fan_in);
    const int count = lanes.row < e.rows ? fan_in : 0;
    const T* weights = static_cast<const T*>(a.table.weights[piece.weight]) + static_cast<int64_t>(filter) * fan_in;
    float sum[1] = {0.0f};
    for (int i = lanes.lane; i < count; i += lanes.count) sum[0] += to_float(weights[i]);
    sum_over_lanes(sum, lanes, scratch);
    Statistics s{sum[0] / static_cast<float>(fan_in), 0.0f, 0.0f, 0.0f, 0.0f};
    float sums[2] = {0.0f, 0.0f};
    for (int i = lanes.lane; i < count; i += lanes.count) {
      const float d = to_float(weights[i]) - s.shift;
      sums[0] += d;
      sums[1] = fused_multiply_add(d, d, sums[1]);
    }
    sum_over_lanes(sums, lanes, scratch + warps);
    s.offsets = sums[0];
    s.squares = sums[1];
    finish(a, piece, lanes, lanes.row < e.rows, s);
    const int64_t begin = static_cast<int64_t>(f.start) * start_unit + static_cast<int64_t>(filter) * fan_in;
    for (int i = lanes.lane; i < count; i += lanes.count) {
      const int from = f.taps == 1 ? i : i % e.channels * f.taps + i / e.channels;
      const float y = (to_float(weights[from]) - s.shift - s.offset) * s.rstd;
      set_number_at(a.results, begin + i, a.result_dtype, y);
    }
  }
};

// ---- backward -------------------------------------------------------------------------------------------------------

// With h = (w - mean) rstd and the gradient g of the result: dw = rstd (g - mean(g) - h mean(g h)), the means over a
// filter. g lies in the order of the result, dw in that of the weight. A weight whose result got no gradient gets
// zeros.
template <typename T>
struct Backward {
  struct Arguments {
    void* weight_gradients;
    const float *means, *rstds;
    Dtype gradient_dtype;
    int gradient_bytes;  // of a number
    int items;
    const void* gradients[most_weights];
    Table table;
  };
  static constexpr int threads = weight_standardization::threads;
  static constexpr int min_blocks = 6;
  static constexpr int capability = 80;
  static constexpr int vector = vector_size<T>;

  static int stage_bytes(Dtype gradients) {
    return stage_elements * static_cast<int>(sizeof(T) + (gradients == Dtype::float32 ? 4 : 2));
  }
  static constexpr int scratch_numbers = 2 * warps;

  struct Loaded {
    Piece piece;
    float mean, rstd;  // of this thread's filter
  };
  struct Sums {
    float g, gh;  // of g and of g h, and then their means
  };

  static BITFAST_GPU void run(const Arguments& a) {
    constexpr int weight_bytes = stage_elements * static_cast<int>(sizeof(T));
    const int bytes = weight_bytes + stage_elements * a.gradient_bytes;
    unsigned char* memory = shared_memory();
    auto* scratch = reinterpret_cast<float*>(memory + stages * bytes);
    Pieces pieces(a.table, a.items);
    auto begin_next = [&](int stage) {
      Loaded loaded{pieces.next(), 0.0f, 0.0f};
      if (loaded.piece.exists()) {
        load_statistics(a, loaded);
        begin_copy_of_weights<T>(a.table, loaded.piece, memory + stage * bytes);
        begin_copy_of_gradients(a, loaded.piece, memory + stage * bytes + weight_bytes);
      }
      commit_copies();
      return loaded;
    };
    Loaded now = begin_next(0);
    Sums sums{};
    for (int stage = 0; now.piece.exists(); stage ^= 1) {
      wait_copies<0>();
      sync_block();  // the piece is there, and nobody needs the one before any more
      const Loaded next = begin_next(stage ^ 1);
      const Filters& f = a.table.filters[now.piece.weight];
      T* weights = reinterpret_cast<T*>(memory + stage * bytes);
      const void* gradients = memory + stage * bytes + weight_bytes;
      if (f.form == Form::any) {
        differentiate_any(a, now, scratch);
      } else if (f.taps == 1) {
        differentiate<false>(a, now, weights, gradients, sums, scratch);
      } else {
        differentiate<true>(a, now, weights, gradients, sums, scratch);
      }
      now = next;
    }
    wait_copies<0>();
  }

  static BITFAST_GPU void load_statistics(const Arguments& a, Loaded& loaded) {
    const Filters& f = a.table.filters[loaded.piece.weight];
    const int64_t row = static_cast<int64_t>(f.first_filter) + loaded.piece.filter + Lanes(f).row;
    if (row < static_cast<int64_t>(a.table.filters[loaded.piece.weight + 1].first_filter)) {
      loaded.mean = float_from_bits(load_4(a.means + row));
      loaded.rstd = float_from_bits(load_4(a.rstds + row));
    }
  }

  static BITFAST_GPU void begin_copy_of_gradients(const Arguments& a, const Piece& piece, unsigned char* stage) {
    const Filters& f = a.table.filters[piece.weight];
    if (f.form == Form::any) return;
    const Extent e = extent_of(a.table, piece);
    const auto* gradients = static_cast<const unsigned char*>(a.gradients[piece.weight]) +
                            static_cast<int64_t>(piece.filter) * f.fan_in * a.gradient_bytes;
    if (e.channels == e.all_channels || e.taps == 1) {
      begin_copy(
          stage, gradients + static_cast<int64_t>(e.first_channel) * a.gradient_bytes,
          e.rows * e.row_elements() * a.gradient_bytes);
      return;
    }
    for (int tap = 0; tap < e.taps; ++tap) {
      begin_copy(
          stage + tap * e.channels * a.gradient_bytes,
          gradients + (static_cast<int64_t>(tap) * e.all_channels + e.first_channel) * a.gradient_bytes,
          e.channels * a.gradient_bytes);
    }
  }

  template <bool is_turned>
  static BITFAST_GPU void differentiate(
      const Arguments& a, const Loaded& now, T* weights, const void* gradients, Sums& sums, float* scratch) {
    const Filters& f = a.table.filters[now.piece.weight];
    const Extent e = extent_of(a.table, now.piece);
    const Lanes lanes(f);
    const int row = lanes.row * e.row_elements();
    if (now.piece.is_measured()) {
      if (now.piece.step == 0) sums = {0.0f, 0.0f};
      for_each_vector<vector, is_turned>(e, lanes, [&](const Place& place) {
        float x[vector], g[vector];
        read_weights<T, is_turned>(weights + row, place, e.taps, x);
        load_shared_numbers(gradients, row + place.tap * e.channels + place.channel, a.gradient_dtype, g);
#pragma unroll
        for (int i = 0; i < vector; ++i) x[i] = (x[i] - now.mean) * now.rstd;
        sums.g += sum_of<vector>(g);
        sums.gh += dot<vector>(g, x);
      });
      if (now.piece.is_last_measured()) average(f, lanes, sums, scratch);
    }
    if (!now.piece.is_written()) return;
    T* out = static_cast<T*>(a.weight_gradients);
    out += static_cast<int64_t>(f.start) * start_unit + e.begin(now.piece.filter);
    for_each_vector<vector, is_turned>(e, lanes, [&](const Place& place) {
      float x[vector], g[vector];
      read_weights<T, is_turned>(weights + row, place, e.taps, x);
      load_shared_numbers(gradients, row + place.tap * e.channels + place.channel, a.gradient_dtype, g);
#pragma unroll
      for (int i = 0; i < vector; ++i) x[i] = gradient(x[i], g[i], now, sums);
      if constexpr (is_turned) {  // over the weights, each of which only this thread has read
#pragma unroll
        for (int i = 0; i < vector; ++i) weights[row + (place.channel + i) * e.taps + place.tap] = rounded<T>(x[i]);
      } else {
        store_16(out + row + place.channel, pack<T>(x));
      }
    });
    if constexpr (is_turned) {
      sync_block();
      for (int i = threadIdx.x * vector; i < e.rows * e.row_elements(); i += threads * vector) {
        store_16(out + i, load_shared_16(weights + i));
      }
    }
  }

  static BITFAST_GPU float gradient(float x, float g, const Loaded& now, const Sums& means) {
    const float h = (x - now.mean) * now.rstd;
    return now.rstd * fused_multiply_add(-h, means.gh, g - means.g);
  }

  static BITFAST_GPU void average(const Filters& f, const Lanes& lanes, Sums& sums, float* scratch) {
    float both[2] = {sums.g, sums.gh};
    sum_over_lanes(both, lanes, scratch);
    sums = {both[0] / static_cast<float>(f.fan_in), both[1] / static_cast<float>(f.fan_in)};
  }

  static BITFAST_GPU void differentiate_any(const Arguments& a, const Loaded& now, float* scratch) {
    const Filters& f = a.table.filters[now.piece.weight];
    const Extent e = extent_of(a.table, now.piece);
    const Lanes lanes(f);
    const int fan_in = static_cast<int>(f.fan_in), count = lanes.row < e.rows ? fan_in : 0;
    const int64_t begin = static_cast<int64_t>(now.piece.filter + lanes.row) * fan_in;
    const T* weights = static_cast<const T*>(a.table.weights[now.piece.weight]) + begin;
    const void* gradients = a.gradients[now.piece.weight];
    T* out = static_cast<T*>(a.weight_gradients) + static_cast<int64_t>(f.start) * start_unit + begin;
    if (gradients == nullptr) {
      for (int i = lanes.lane; i < count; i += lanes.count) out[i] = T{};
      return;
    }
    auto gradient_of = [&](int i) {
      const int at = f.taps == 1 ? i : i % f.taps * e.channels + i / f.taps;
      return number_at(gradients, begin + at, a.gradient_dtype);
    };
    Sums sums{0.0f, 0.0f};
    for (int i = lanes.lane; i < count; i += lanes.count) {
      const float g = gradient_of(i);
      sums.g += g;
      sums.gh = fused_multiply_add(g, (to_float(weights[i]) - now.mean) * now.rstd, sums.gh);
    }
    average(f, lanes, sums, scratch);
    for (int i = lanes.lane; i < count; i += lanes.count) {
      out[i] = rounded<T>(gradient(to_float(weights[i]), gradient_of(i), now, sums));
    }
  }
};

// ---- launches -------------------------------------------------------------------------------------------------------

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// How a weight is computed. Filters of whole items share the threads so that each has as many numbers as it can hold,
// or more than half as many.
Filters filters_of(const Weight& weight, bool is_aligned) {
  Filters f{};
  f.start = static_cast<uint32_t>(weight.start / start_unit);
  f.fan_in = static_cast<uint32_t>(weight.channels * weight.taps);
  f.taps = static_cast<uint16_t>(weight.taps);
  const bool fits_vectors = is_aligned && weight.channels % 8 == 0;
  if (fits_vectors && f.fan_in <= stage_elements) {
    f.form = Form::whole;
    while (static_cast<uint32_t>(elements_per_thread) << f.lanes_log2 < f.fan_in) ++f.lanes_log2;
  } else if (fits_vectors && weight.taps * 8 <= stage_elements) {
    f.form = Form::in_chunks;
    f.lanes_log2 = 7;
  } else {
    f.form = Form::any;
    f.lanes_log2 = f.fan_in <= 2048 ? 5 : 7;
  }
  return f;
}

// As many blocks as work at a time, or so many fewer that all get the same number of items.
template <typename Kernel>
const char* shape_of(int64_t items, Dtype dtype, LaunchShape& shape) {
  shape.shared_bytes =
      stages * Kernel::stage_bytes(dtype) + Kernel::scratch_numbers * static_cast<int>(sizeof(float));
  int64_t resident = 0;
  if (const char* error = resident_clusters<Kernel>(shape, resident)) return error;
  const int64_t rounds = (items + resident - 1) / resident;
  shape.blocks = rounds == 0 ? 0 : (items + rounds - 1) / rounds;
  return nullptr;
}

const char* check(const Weight& weight) {
  if (weight.taps > UINT16_MAX) return "a kernel of more than 65535 pixels is not supported";
  if (weight.channels * weight.taps > INT32_MAX || weight.filters > INT32_MAX) return "a weight is too large";
  if (weight.start % start_unit != 0) return "a weight begins at no multiple of 64 elements";
  return nullptr;
}

// Launches a kernel over all weights, or, if there are more than a launch takes, over as many at a time.
// aligned(number): whether what belongs to the weight beside itself is aligned. set(arguments, first, count): the rest.
template <typename Kernel, typename Aligned, typename Set>
const char* launch_over(
    const Call& call, const void* const* weights, void* stream, const Aligned& aligned, const Set& set) {
  typename Kernel::Arguments arguments;
  static_assert(sizeof arguments <= 4096);
  int64_t filters = 0;
  for (int first = 0; first < call.count; first += most_weights) {
    const int count = call.count - first < most_weights ? call.count - first : most_weights;
    Table& table = arguments.table;
    int64_t items = 0;
    for (int i = 0; i < count; ++i) {
      const Weight& weight = call.weights[first + i];
      if (const char* error = check(weight)) return error;
      Filters& f = table.filters[i];
      table.weights[i] = weights[first + i];
      f = filters_of(weight, is_aligned(table.weights[i]) && aligned(first + i));
      f.first_item = static_cast<uint32_t>(items);
      f.first_filter = static_cast<uint32_t>(filters);
      const int per_item = threads >> f.lanes_log2;
      items += (weight.filters + per_item - 1) / per_item;
      filters += weight.filters;
      if (items > INT32_MAX || filters > INT32_MAX) return "the weights have too many filters";
    }
    table.filters[count].first_item = static_cast<uint32_t>(items);
    table.filters[count].first_filter = static_cast<uint32_t>(filters);
    arguments.items = static_cast<int>(items);
    set(arguments, first, count);
    LaunchShape shape{};
    if (const char* error = shape_of<Kernel>(items, static_cast<Dtype>(call.result_dtype), shape)) return error;
    if (const char* error = launch<Kernel>(shape, arguments, stream)) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace bitfast::weight_standardization

BITFAST_ENTRY const char* bitfast_weight_standardization_forward(
    const bitfast::weight_standardization::Call* call, void* stream, const void* const* weights, void* results,
    float* means, float* rstds) {
  using namespace bitfast::weight_standardization;
  return dispatch(static_cast<Dtype>(call->weight_dtype), [&](auto zero) {
    using Kernel = Forward<decltype(zero)>;
    const bool results_are_aligned = is_aligned(results);
    return launch_over<Kernel>(
        *call, weights, stream, [&](int) { return results_are_aligned; },
        [&](typename Kernel::Arguments& a, int, int) {
          a.results = results;
          a.means = means;
          a.rstds = rstds;
          a.eps = call->eps;
          a.result_dtype = static_cast<Dtype>(call->result_dtype);
        });
  });
}

BITFAST_ENTRY const char* bitfast_weight_standardization_backward(
    const bitfast::weight_standardization::Call* call, void* stream, const void* const* weights,
    const void* const* gradients, const float* means, const float* rstds, void* weight_gradients) {
  using namespace bitfast::weight_standardization;
  return dispatch(static_cast<Dtype>(call->weight_dtype), [&](auto zero) {
    using Kernel = Backward<decltype(zero)>;
    const bool results_are_aligned = is_aligned(weight_gradients);
    return launch_over<Kernel>(
        *call, weights, stream,
        [&](int number) {
          return results_are_aligned && gradients[number] != nullptr && is_aligned(gradients[number]);
        },
        [&](typename Kernel::Arguments& a, int first, int count) {
          a.weight_gradients = weight_gradients;
          a.means = means;
          a.rstds = rstds;
          a.gradient_dtype = static_cast<Dtype>(call->result_dtype);
          a.gradient_bytes = a.gradient_dtype == Dtype::float32 ? 4 : 2;
          for (int i = 0; i < count; ++i) a.gradients[i] = gradients[first + i];
        });
  });
}
