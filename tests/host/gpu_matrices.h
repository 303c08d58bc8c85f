// Matrices, by warps and by groups of four warps (wgmma): the part of gpu_emulation.h that multiplies.
//
// A product of shared memory is computed warp by warp: by the last lane that waits for it, or, by chance, as soon as
// all lanes have committed it.
#pragma once

#include "gpu_machine.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace bitfast::gpu {

// ---- by a warp ------------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  emulation::check_shared(row, 16, "a matrix's row");
  emulation::check_aligned(row, 16, "a matrix's row");
  auto& w = emulation::warp();
  w.slots[emulation::lane()] = reinterpret_cast<uint64_t>(row);
  w.results[emulation::lane()] = fragment;
  emulation::meet_and(w.meeting, emulation::warp_size, [&w] {
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      auto* words = static_cast<uint32_t*>(w.results[lane]);
      for (int i = 0; i < 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(w.slots[i * 8 + lane / 4])[lane % 4];
    }
  });
}

// The inverse of load_matrices.
inline void store_matrices(void* row, const uint32_t (&fragment)[4]) {
  emulation::check_shared(row, 16, "a matrix's row");
  emulation::check_aligned(row, 16, "a matrix's row");
  emulation::remember_write(row, 16);
  auto& w = emulation::warp();
  w.slots[emulation::lane()] = reinterpret_cast<uint64_t>(row);
  memcpy(w.fragments[emulation::lane()], fragment, sizeof fragment);
  emulation::meet_and(w.meeting, emulation::warp_size, [&w] {
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      for (int i = 0; i < 4; ++i) {
        reinterpret_cast<uint32_t*>(w.slots[i * 8 + lane / 4])[lane % 4] = w.fragments[lane][i];
      }
    }
  });
}

template <typename T>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& w = emulation::warp();
  uint32_t* mine = w.fragments[emulation::lane()];
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  w.results[emulation::lane()] = c;
  emulation::meet_and(w.meeting, emulation::warp_size, [&w] {
    float left[16][16], right[16][8], sums[16][8];
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      const uint32_t* words = w.fragments[lane];
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        left[row][k] = low_number<T>(words[i]);
        left[row][k + 1] = high_number<T>(words[i]);
        sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = static_cast<float*>(w.results[lane])[i];
      }
      for (int i = 0; i < 2; ++i) {
        right[lane % 4 * 2 + i * 8][lane / 4] = low_number<T>(words[4 + i]);
        right[lane % 4 * 2 + i * 8 + 1][lane / 4] = high_number<T>(words[4 + i]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < emulation::warp_size; ++lane) {
      for (int i = 0; i < 4; ++i) {
        static_cast<float*>(w.results[lane])[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
    }
  });
}

// ---- in shared memory, by four warps --------------------------------------------------------------------------------

using MatrixPlace = uint64_t;  // the fields of the hardware's descriptor; addresses count from the block's memory

inline MatrixPlace matrix_at(const void* shared, int k_step, int row_step) {
  emulation::check_shared(shared, 128, "a matrix");
  emulation::check_aligned(shared, 16, "a matrix");
  if ((k_step | row_step) % 16 != 0 || k_step < 0 || row_step < 0 || k_step >= 1 << 18 || row_step >= 1 << 18) {
    emulation::fault("steps of %d and %d bytes do not fit a matrix", k_step, row_step);
  }
  const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(shared) - shared_memory());
  return address >> 4 | static_cast<uint64_t>(k_step >> 4) << 16 | static_cast<uint64_t>(row_step >> 4) << 32;
}

inline MatrixPlace moved(MatrixPlace place, int bytes) {
  if (bytes % 16 != 0) emulation::fault("a matrix cannot be moved by %d bytes", bytes);
  const int64_t address = static_cast<int64_t>(place & 0x3fff) * 16 + bytes;
  if (address < 0 || address >= static_cast<int64_t>(emulation::block().shared_bytes)) {
    emulation::fault("a matrix is moved out of shared memory");
  }
  return (place & ~static_cast<MatrixPlace>(0x3fff)) | static_cast<MatrixPlace>(address >> 4);
}

namespace emulation {

// The part with rows 8 * row_part to 8 * row_part + 7, of each the numbers 8 * k_part to 8 * k_part + 7: 128 bytes.
inline const unsigned char* matrix_part(MatrixPlace place, int row_part, int k_part) {
  const auto field = [place](int bit) { return static_cast<int>(place >> bit & 0x3fff) << 4; };
  return shared_memory() + field(0) + k_part * field(16) + row_part * field(32);
}

inline void check_matrix(MatrixPlace place, int row_parts) {
  const unsigned char* first = matrix_part(place, 0, 0);
  const unsigned char* last = matrix_part(place, row_parts - 1, 1);
  check_shared(first, static_cast<size_t>(last + 128 - first), "a matrix");
  for (int k_part = 0; k_part < 2; ++k_part) {
    for (int i = 0; i < row_parts; ++i) check_fenced(matrix_part(place, i, k_part), 128, "a product");
  }
}

// Eight numbers of a row, in float32.
template <typename T>
void read_eight(const unsigned char* from, float* numbers) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    _mm256_storeu_ps(numbers, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
    return;
  }
#endif
  const auto* those = reinterpret_cast<const T*>(from);
  for (int i = 0; i < 8; ++i) numbers[i] = to_float(those[i]);
}

template <typename T>
void read_part(MatrixPlace place, int row_part, float (&rows)[8][16]) {
  for (int k_part = 0; k_part < 2; ++k_part) {
    const unsigned char* part = matrix_part(place, row_part, k_part);
    for (int row = 0; row < 8; ++row) read_eight<T>(part + 16 * row, rows[row] + 8 * k_part);
  }
}

using Column = float __attribute__((vector_size(64)));  // the sixteen rows of a warp

// Calls function(number, row, column) for the numbers of a fragment of 16 x 8 sums: number % 4 of lane number / 4.
template <typename Function>
void for_each_sum(const Function& function) {
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int i = 0; i < 4; ++i) function(4 * lane + i, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
  }
}

constexpr int most_products_at_once = 8;

// A warp's part of products that add to the same sums, one after the other.
template <typename T, int parts>
void multiply(const Product* const* products, int count, int warp) {
  float rows[8][16];
  Column left[most_products_at_once][16];  // column by column
  for (int p = 0; p < count; ++p) {
    for (int half = 0; half < 2; ++half) {
      read_part<T>(products[p]->factors.left, 2 * warp + half, rows);
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 8; ++row) left[p][k][8 * half + row] = rows[row][k];
      }
    }
  }
  float* const* sums = products[0]->sums + warp * warp_size;
  for (int j = 0; j < parts; ++j) {
    Column columns[8];
    for_each_sum([&](int i, int row, int column) { columns[column][row] = sums[i / 4][4 * j + i % 4]; });
    for (int p = 0; p < count; ++p) {
      read_part<T>(products[p]->factors.right, j, rows);
      if (!products[p]->factors.adds) {
        for (Column& column : columns) column = Column{};
      }
      for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 8
        for (int column = 0; column < 8; ++column) columns[column] += left[p][k] * rows[column][k];
      }
    }
    for_each_sum([&](int i, int row, int column) { sums[i / 4][4 * j + i % 4] = columns[column][row]; });
  }
}

// Multiplies what a warp has begun, up to a product's number.
inline void finish_products(WarpGroup& group, int warp, unsigned end) {
  const Product* together[most_products_at_once];
  while (group.done[warp] < end) {
    int count = 0;
    while (count < most_products_at_once && group.done[warp] < end) {
      const Product& next = group.products[group.done[warp] - group.dropped];
      const auto same_sums = [&] {
        const int first = warp * warp_size;
        return std::equal(next.sums + first, next.sums + first + warp_size, together[0]->sums + first);
      };
      if (count > 0 && (next.factors.multiply != together[0]->factors.multiply || !same_sums())) break;
      together[count++] = &next;
      ++group.done[warp];
    }
    together[0]->factors.multiply(together, count, warp);
  }
  const unsigned done_by_all = *std::min_element(group.done, group.done + warps_per_group);
  for (; group.dropped < done_by_all; ++group.dropped) group.products.pop_front();
}

inline int warp_in_group() { return static_cast<int>(threadIdx.x) / warp_size % warps_per_group; }

// The threads of a warpgroup must begin the same products in the same order.
inline void begin_product(const Factors& factors, float* sums, int right_parts) {
  if (machine.device.capability != 90) fault("this GPU has no products of shared memory");
  if (!self().may_multiply) fault("a product without begin_products");
  if (lane() == 0) {
    check_matrix(factors.left, 8);
    check_matrix(factors.right, right_parts);
  }
  WarpGroup& group = warp_group();
  const unsigned at = self().products_begun++ - group.dropped;
  if (at == group.products.size()) group.products.push_back({factors, {}, {}});
  Product& ours = group.products[at];
  if (!(ours.factors == factors)) fault("the threads of a warpgroup multiply different matrices");
  ours.sums[threadIdx.x % (warps_per_group * warp_size)] = sums;
  ++ours.lanes_begun[warp_in_group()];
}

// Whether all lanes of the warp have begun the products that this one has, and some are not yet done.
inline bool is_last_lane() {
  const WarpGroup& group = warp_group();
  const unsigned begun = self().products_begun;
  const int warp = warp_in_group();
  return group.done[warp] < begun && group.products[begun - 1 - group.dropped].lanes_begun[warp] == warp_size;
}

inline void wait_for_groups(size_t groups) {
  Fiber& fiber = self();
  while (fiber.product_groups.size() > groups) {
    fiber.products_awaited = fiber.product_groups.front();
    fiber.product_groups.pop_front();
  }
  Warp& w = warp();
  w.slots[lane()] = fiber.products_awaited;
  meet_and(w.meeting, warp_size, [&] {
    for (const uint64_t awaited : w.slots) {
      if (awaited != fiber.products_awaited) fault("the threads of a warp wait for different products");
    }
    finish_products(warp_group(), warp_in_group(), fiber.products_awaited);
  });
}

}  // namespace emulation

template <int units, int parts>
void keep_sums(float (&)[units][parts][4]) {}

template <int units, int parts>
void begin_products(float (&)[units][parts][4]) {
  emulation::self().may_multiply = true;
}

inline void continue_products() {}

template <typename T, int parts>
void multiply_add_64xNx16(float (&c)[parts][4], MatrixPlace a, MatrixPlace b, bool adds) {
  static_assert(parts == 8 || parts == 16 || parts == 32);
  emulation::begin_product({a, b, adds, emulation::multiply<T, parts>}, c[0], parts);
}

inline void commit_products() {
  auto& fiber = emulation::self();
  fiber.product_groups.push_back(fiber.products_begun);
  if (emulation::is_last_lane() && emulation::machine.toss()) {
    emulation::finish_products(emulation::warp_group(), emulation::warp_in_group(), fiber.products_begun);
  }
}

template <int groups>
void wait_product_groups() {
  emulation::wait_for_groups(groups);
}

template <int units, int parts>
void wait_products(float (&)[units][parts][4]) {
  emulation::wait_for_groups(0);
  emulation::self().may_multiply = false;
}

}  // namespace bitfast::gpu
