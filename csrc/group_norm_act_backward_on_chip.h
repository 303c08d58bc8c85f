// group_norm_act, backward: x and grad are read from memory once and stay on the chip until dx is written.
//
// A unit is a slice of an image: all its pixels, `width` of its channels, which are whole groups. The blocks of a
// cluster share its pixels. Blocks stay and take one unit after the other. A thread has the same channels (16 bytes) of
// every `rows`-th pixel of its block's; each such piece is copied to shared memory by the very thread that reads it, so
// the copies need no barrier. With dz, the gradient that the activation let pass:
//   First pass: sums of dz and dz (x - mean) for each channel. dz stays in registers.
//   Then all threads of the block add up, and the groups' sums are sent to all blocks of the cluster.
//   Second pass: dx = scale dz - mean(scale dz) - (x - mean) rstd^2 mean(scale dz (x - mean)); scale = weight rstd.
//   Where the forward pass did not keep its result, that is written beside dx.
// Wherever a piece is used up, the next unit's is copied to its place, so that memory never idles: those of grad in the
// first pass, those of x in the second. With a grad_total, its pieces take the place of grad's in between.
#pragma once

#include "gpu.h"
#include "group_norm_act_backward_plan.h"

namespace bitfast::group_norm_act_backward {

using namespace gpu;

struct OnChipArguments {
  const unsigned char *grad, *grad_total, *x;  // grad_total may be null
  unsigned char* grad_x;
  const void *weight, *bias;
  const float *mean, *rstd;
  float* sums;  // [images * cluster][dz, dz h][channels]
  OnChipPlan plan;
  int units, slices, pixels, channels, groups;
  Dtype weight_dtype, bias_dtype;
  bool is_relu;  // or none
  // Of kernels that recompute, whose threads have no registers for two more addresses: how many bytes the result lies
  // after grad_x, and grad after x; and the least number of the result.
  int64_t result_after, grad_after;
  float least;
};

template <int count>
BITFAST_GPU void load_floats(float (&to)[count], const float* shared) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const uint4 v = load_shared_16(shared + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = float_from_bits(word_of(v, j));
  }
}

template <int count>
BITFAST_GPU void store_floats(float* shared, const float* from) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    store_shared_16(
        shared + i, make_uint4(bits_of(from[i]), bits_of(from[i + 1]), bits_of(from[i + 2]), bits_of(from[i + 3])));
  }
}

// Sixteen bytes of numbers, those that do not pass set to 0.
template <typename T>
BITFAST_GPU uint4 where(const bool (&passes)[vector_size<T>], const uint4& v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = word_of(v, i);
    if constexpr (sizeof(T) == 4) {
      if (!passes[i]) words[i] = 0;
    } else {
      if (!passes[2 * i]) words[i] &= 0xffff0000u;
      if (!passes[2 * i + 1]) words[i] &= 0x0000ffffu;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A parameter as it lies in memory: converted only later, so that nothing waits for it here.
BITFAST_GPU uint32_t raw_number_at(const void* data, int index, Dtype dtype) {
  return dtype == Dtype::float32 ? load_4(static_cast<const float*>(data) + index)
                                 : load_2(static_cast<const uint16_t*>(data) + index);
}

BITFAST_GPU float number_of(uint32_t raw, Dtype dtype) {
  if (dtype == Dtype::float32) return float_from_bits(raw);
  return dtype == Dtype::bfloat16 ? low_number<BFloat16>(raw) : low_number<Half>(raw);
}

// What a thread holds and does.
template <typename T, int threads, bool recomputes>
struct OnChipThread {
  static constexpr int vector = vector_size<T>;
  static constexpr int batch = 2;  // pieces whose loads from shared memory are under way together
  static constexpr int batches = (most_pieces + batch - 1) / batch;
  static constexpr int turns = most_channels_per_thread;
  static constexpr int slot_pitch = threads * 16;  // from a thread's piece to the next, in shared memory

  const OnChipArguments& a;
  const OnChipPlan& plan;
  const int thread, column, row, rank;
  int first_pixel, pieces;                // of the thread
  int pitch;                              // from a piece to the next in memory, in bytes
  unsigned char *x_slots, *grad_slots;    // the thread's pieces
  float *rows_sums, *parameters, *channel_sums, *coefficients, *mailbox;  // in shared memory
  Barrier* barriers;                      // of the mailbox, in even and in odd rounds
  float sums[2 * vector];                 // of dz; of dz (x - mean)
  uint4 dz[most_pieces];
  uint32_t raw_weight[turns], raw_bias[turns];
  float raw_mean[turns], raw_rstd[turns];

  BITFAST_GPU explicit OnChipThread(const OnChipArguments& arguments)
      : a(arguments),
        plan(a.plan),
        thread(static_cast<int>(threadIdx.x)),
        column(thread % plan.vectors),
        row(thread / plan.vectors),
        rank(plan.cluster > 1 ? cluster_rank() : 0) {
    const int begin = static_cast<int>(static_cast<int64_t>(a.pixels) * rank / plan.cluster);
    const int end = static_cast<int>(static_cast<int64_t>(a.pixels) * (rank + 1) / plan.cluster);
    first_pixel = begin + row;
    pieces = row < plan.rows && first_pixel < end ? (end - first_pixel + plan.rows - 1) / plan.rows : 0;
    pitch = plan.rows * a.channels * static_cast<int>(sizeof(T));
    unsigned char* shared = shared_memory();
    x_slots = shared + thread * 16;
    grad_slots = shared + plan.grad_at + thread * 16;
    rows_sums = reinterpret_cast<float*>(shared + plan.rows_sums_at);
    parameters = reinterpret_cast<float*>(shared + plan.parameters_at);
    channel_sums = reinterpret_cast<float*>(shared + plan.channel_sums_at);
    coefficients = reinterpret_cast<float*>(shared + plan.coefficients_at);
    mailbox = reinterpret_cast<float*>(shared + plan.mailbox_at);
    barriers = reinterpret_cast<Barrier*>(shared + plan.barriers_at);
  }

  // Where the thread's first piece of a unit lies in a feature map, in bytes.
  BITFAST_GPU int64_t offset_of(int unit) const {
    const int image = unit / a.slices, slice = unit % a.slices;
    const int64_t pixel = static_cast<int64_t>(image) * a.pixels + first_pixel;
    return (pixel * a.channels + slice * plan.width + column * vector) * static_cast<int64_t>(sizeof(T));
  }

  BITFAST_GPU void copy_piece(unsigned char* slots, const unsigned char* from, int k) const {
    if (k < pieces) copy_16_async(slots + k * slot_pitch, from + static_cast<int64_t>(k) * pitch);
  }

  // Begins to read what belongs to the channels of a unit, one thread for each.
  BITFAST_GPU void read_parameters(int unit) {
    const int image = unit / a.slices, first = unit % a.slices * plan.width;
#pragma unroll
    for (int i = 0; i < turns; ++i) {
      const int channel = first + thread + i * threads;
      if (thread + i * threads < plan.width) {
        const int64_t group = static_cast<int64_t>(image) * a.groups + channel / plan.per_group;
        raw_weight[i] = raw_number_at(a.weight, channel, a.weight_dtype);
        raw_bias[i] = raw_number_at(a.bias, channel, a.bias_dtype);
        raw_mean[i] = a.mean[group];
        raw_rstd[i] = a.rstd[group];
      }
    }
  }

  // Of a unit's channels: [scale, bias, mean, rstd][width].
  BITFAST_GPU float* parameters_of(int round) const { return parameters + (round & 1) * 4 * plan.width; }

  BITFAST_GPU void store_parameters(int round) const {
    float* to = parameters_of(round);
#pragma unroll
    for (int i = 0; i < turns; ++i) {
      const int channel = thread + i * threads;
      if (channel < plan.width) {
        to[channel] = number_of(raw_weight[i], a.weight_dtype) * raw_rstd[i];
        to[plan.width + channel] = number_of(raw_bias[i], a.bias_dtype);
        to[2 * plan.width + channel] = raw_mean[i];
        to[3 * plan.width + channel] = raw_rstd[i];
      }
    }
  }

  BITFAST_GPU void begin(int unit) {
    const int64_t offset = offset_of(unit);
    const unsigned char* x = keep_address(a.x + offset);
    const unsigned char* grad = keep_address(a.grad + offset);
#pragma unroll
    for (int j = 0; j < batches; ++j) {
#pragma unroll
      for (int k = j * batch; k < min(j * batch + batch, most_pieces); ++k) {
        copy_piece(grad_slots, grad, k);
        copy_piece(x_slots, x, k);
      }
      commit_copies();
    }
    read_parameters(unit);
    store_parameters(0);
    if (plan.cluster == 1) {
      sync_block();
      return;
    }
    if (thread == 0) {
      for (int i = 0; i < 2; ++i) init_barrier(barriers + i, 1);
      fence_barrier_init();
      for (int i = 0; i < 2; ++i) arrive_and_expect(barriers + i, mailbox_numbers() * 4);
    }
    sync_cluster();  // all blocks have begun: they can be sent numbers
  }

  // Those of one round.
  BITFAST_GPU int mailbox_numbers() const { return plan.cluster * 2 * (plan.width / plan.per_group); }

  // Takes in x and grad of a unit. `refill` (null: nothing) goes where grad was.
  BITFAST_GPU void first_pass(int round, const unsigned char* refill) {
    const float* channel = parameters_of(round) + column * vector;
    float scale[vector], bias[vector], mean[vector];
    load_floats(scale, channel);
    load_floats(bias, channel + plan.width);
    load_floats(mean, channel + 2 * plan.width);
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    const bool passes_all = !a.is_relu;
#pragma unroll
    for (int j = 0; j < batches; ++j) {
      // Of the groups of copies that were committed so far, the last ones bring what this batch does not need.
      wait_copies<batches - 1>();
      uint4 x[batch], grad[batch];
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int k = j * batch + u;
        if (k < most_pieces && k < pieces) {
          x[u] = load_shared_16(x_slots + k * slot_pitch);
          grad[u] = load_shared_16(grad_slots + k * slot_pitch);
        }
      }
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int k = j * batch + u;
        if (k < most_pieces && k < pieces) {
          float centered[vector], gradient[vector];
          bool passes[vector];
          unpack<T>(x[u], centered);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            centered[i] -= mean[i];
            passes[i] = !(fused_multiply_add(centered[i], scale[i], bias[i]) <= 0.0f) || passes_all;
          }
          uint4 masked = where<T>(passes, grad[u]);
          unpack<T>(masked, gradient);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            sums[i] += gradient[i];
            sums[vector + i] = fused_multiply_add(gradient[i], centered[i], sums[vector + i]);
          }
          keep_packed(masked);
          dz[k < most_pieces ? k : 0] = masked;
          if (refill != nullptr) copy_piece(grad_slots, refill, k);
        }
      }
      commit_copies();
    }
  }

  // Adds the threads' sums up: for each channel of the block, in channel_sums (times scale) and in memory.
  BITFAST_GPU void add_up_channels(int unit, int round) {
    if (plan.halves_warps) {
      // Lanes that differ in bit 4 have the same channels: the lower takes both sums of dz, the upper the others.
      const bool is_upper = thread & 16;
      float kept[vector];
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const float given = is_upper ? sums[i] : sums[vector + i];
        kept[i] = (is_upper ? sums[vector + i] : sums[i]) + shuffle_xor(given, 16);
      }
      const int pair = thread / 32 * (16 / plan.vectors) + thread % 16 / plan.vectors;
      store_floats<vector>(rows_sums + (2 * pair + is_upper) * plan.width + column * vector, kept);
    } else if (row < plan.rows) {
      float* to = rows_sums + 2 * row * plan.width + column * vector;
      store_floats<vector>(to, sums);
      store_floats<vector>(to + plan.width, sums + vector);
    }
    sync_block();
    const float* scale = parameters_of(round);
    const float* rstd = scale + 3 * plan.width;
    const int image = unit / a.slices, first_channel = unit % a.slices * plan.width;
    float* to = a.sums + (static_cast<int64_t>(image) * plan.cluster + rank) * 2 * a.channels + first_channel;
    for (int i = thread; i < 2 * plan.width; i += threads) {
      const int kind = i >= plan.width, channel = i - kind * plan.width;
      float sum = 0.0f;
#pragma unroll 4
      for (int r = 0; r < plan.summed_rows; ++r) sum += rows_sums[2 * r * plan.width + i];
      to[static_cast<int64_t>(kind) * a.channels + channel] = kind ? sum * rstd[channel] : sum;
      channel_sums[i] = sum * scale[channel];
    }
    sync_block();
  }

  // Sends the block's sums of each group to all blocks of the cluster: [sender][kind][group].
  BITFAST_GPU void send_group_sums(int round) const {
    const int groups = plan.width / plan.per_group;
    float* to = mailbox + (round & 1) * mailbox_numbers() + rank * 2 * groups;
    // Eight lanes add up; then each of them sends to one block.
    const int lane = thread % 8;
    for (int first = 0; first < 2 * groups; first += threads / 8) {
      const int item = first + thread / 8;
      float sum = 0.0f;
      if (item < 2 * groups) {
        const float* from = channel_sums + (item >= groups) * plan.width + item % groups * plan.per_group;
#pragma unroll 4
        for (int c = lane; c < plan.per_group; c += 8) sum += from[c];
      }
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (item < 2 * groups && lane < plan.cluster) {
        if (plan.cluster > 1) {
          send_remote(to + item, lane, sum, barriers + (round & 1));
        } else {
          to[item] = sum;
        }
      }
    }
  }

  // Waits for the sums of all blocks. Even and odd rounds have a barrier each: no block is two rounds ahead of another.
  BITFAST_GPU void receive_group_sums(int round) const {
    if (plan.cluster == 1) {
      sync_block();
      return;
    }
    Barrier* barrier = barriers + (round & 1);
    wait_for_remote(barrier, round / 2 % 2);
    if (thread == 0) arrive_and_expect(barrier, mailbox_numbers() * 4);
  }

  // By what the second pass multiplies x - mean, and what it subtracts, of each channel: [2][width].
  BITFAST_GPU void make_coefficients(int round) const {
    const int groups = plan.width / plan.per_group;
    const float* from = mailbox + (round & 1) * mailbox_numbers();
    const float* rstd = parameters_of(round) + 3 * plan.width;
    for (int channel = thread; channel < plan.width; channel += threads) {
      const int group = channel / plan.per_group;
      float sum = 0.0f, product = 0.0f;
#pragma unroll 4
      for (int sender = 0; sender < plan.cluster; ++sender) {
        sum += from[2 * sender * groups + group];
        product += from[(2 * sender + 1) * groups + group];
      }
      coefficients[channel] = -rstd[channel] * rstd[channel] * (product * plan.inverse_count);
      coefficients[plan.width + channel] = sum * plan.inverse_count;
    }
    sync_block();
  }

  // What the activation made of a piece of x. The bias comes from shared memory for each: no register is free for it.
  BITFAST_GPU uint4 activated(
      const uint4& x, const float (&mean)[vector], const float (&scale)[vector], const float* bias_at) const {
    float numbers[vector], bias[vector];
    unpack<T>(x, numbers);
    load_floats(bias, bias_at);
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      const float z = fused_multiply_add(numbers[i] - mean[i], scale[i], bias[i]);
      numbers[i] = z < a.least ? a.least : z;  // NaN stays NaN
    }
    return pack<T>(numbers);
  }

  // Writes dx of a unit, and its result if the kernel recomputes. Where x was, and with a grad_total where grad was,
  // goes what the next unit needs.
  BITFAST_GPU void second_pass(
      int round, unsigned char* grad_x, bool has_next, const unsigned char* next_x, const unsigned char* next_grad) {
    const float* channel = parameters_of(round) + column * vector;
    float scale[vector], mean[vector], factor[vector], subtracted[vector];
    load_floats(scale, channel);
    load_floats(mean, channel + 2 * plan.width);
    load_floats(factor, coefficients + column * vector);
    load_floats(subtracted, coefficients + plan.width + column * vector);
    const bool has_total = a.grad_total != nullptr;
    const unsigned char* refill = recomputes ? next_x + a.grad_after : next_grad;
#pragma unroll
    for (int j = 0; j < batches; ++j) {
      if (has_total) wait_copies<batches - 1>();
      uint4 x[batch];
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int k = j * batch + u;
        if (k < most_pieces && k < pieces) x[u] = load_shared_16(x_slots + k * slot_pitch);
      }
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        const int k = j * batch + u;
        if (k < most_pieces && k < pieces) {
          float result[vector], gradient[vector];
          unpack<T>(x[u], result);
          uint4 masked = dz[k < most_pieces ? k : 0];
          keep_packed(masked);
          unpack<T>(masked, gradient);
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            const float centered = result[i] - mean[i];
            result[i] = fused_multiply_add(
                scale[i], gradient[i], fused_multiply_add(centered, factor[i], -subtracted[i]));
          }
          if (has_total) {
            float total[vector];
            unpack<T>(load_shared_16(grad_slots + k * slot_pitch), total);
#pragma unroll
            for (int i = 0; i < vector; ++i) result[i] += total[i];
          }
          unsigned char* to = grad_x + static_cast<int64_t>(k) * pitch;
          store_16(to, pack<T>(result));
          if constexpr (recomputes) {
            store_16(to + a.result_after, activated(x[u], mean, scale, channel + plan.width));
          }
          if (has_next) {
            copy_piece(x_slots, next_x, k);
            if (has_total) copy_piece(grad_slots, refill, k);
          }
        }
      }
      commit_copies();
    }
  }

  BITFAST_GPU void work() {
    const int clusters = static_cast<int>(gridDim.x) / plan.cluster;
    int unit = static_cast<int>(blockIdx.x) / plan.cluster;
    if (unit >= a.units) return;
    begin(unit);
    for (int round = 0; unit < a.units; unit += clusters, ++round) {
      const bool has_next = unit + clusters < a.units;
      const int64_t here = offset_of(unit), there = has_next ? offset_of(unit + clusters) : 0;
      const unsigned char* next_x = keep_address(a.x + there);
      const unsigned char* next_grad = keep_address(a.grad + there);
      const unsigned char* refill = a.grad_total != nullptr ? a.grad_total + here : has_next ? next_grad : nullptr;
      first_pass(round, refill);
      if (has_next) read_parameters(unit + clusters);
      add_up_channels(unit, round);
      send_group_sums(round);
      if (has_next) store_parameters(round + 1);
      receive_group_sums(round);
      make_coefficients(round);
      second_pass(round, keep_address(a.grad_x + here), has_next, next_x, next_grad);
    }
    wait_copies<0>();
  }
};

template <typename T, int block_threads, int blocks_per_multiprocessor, bool recomputes>
struct OnChipBackward {
  using Arguments = OnChipArguments;
  static constexpr int threads = block_threads;
  static constexpr int min_blocks = blocks_per_multiprocessor;
  static constexpr int capability = 90;

  BITFAST_GPU static void run(const Arguments& arguments) { OnChipThread<T, threads, recomputes>(arguments).work(); }
};

}  // namespace bitfast::group_norm_act_backward
