// Packs images of any sizes and strides one after the other, for one journey to another device:
// bitfast/ops/staging.py, which says where each goes.
#include "errors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ceil_div.h"
#include "in_parallel.h"
#include "instruction_sets.h"
#include "memory_format.h"

namespace bitfast::image_packing {}  // the loops use its names

#define BITFAST_LOOPS "image_packing_loops.h"
#define BITFAST_OP image_packing
#include "each_instruction_set.h"

namespace bitfast::image_packing {
namespace {

// Bytes that a thread packs at a time.
constexpr int64_t block_bytes = 1 << 18;

// The dimensions of a tensor, the one with the largest stride first.
std::vector<int64_t> outermost_first(const Tensor& tensor) {
  std::vector<int64_t> dimensions(tensor.dim());
  std::iota(dimensions.begin(), dimensions.end(), 0);
  const auto strides = tensor.strides();
  std::stable_sort(
      dimensions.begin(), dimensions.end(), [&](int64_t i, int64_t j) { return strides[i] > strides[j]; });
  return dimensions;
}

// ---- one image ----------------------------------------------------------------------------------------------

// Elements of a tensor as they are packed: runs of bytes that lie side by side, in nested loops.
class Source {
 public:
  explicit Source(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())), run_(tensor.element_size()) {
    size_ = run_;
    std::vector<int64_t> dimensions = outermost_first(tensor);
    std::reverse(dimensions.begin(), dimensions.end());
    for (const int64_t dimension : dimensions) {
      const int64_t count = tensor.size(dimension), stride = tensor.stride(dimension) * tensor.element_size();
      size_ *= count;
      if (count != 1) {
        add_loop(count, stride);
      }
    }
  }

  int64_t size() const { return size_; }

  // Copies the packed bytes from `first` to `last` to `target`.
  void copy(int64_t first, int64_t last, char* target) const {
    while (first < last) {
      const int64_t index = first / run_, within = first % run_;
      const char* source = data_ + offset_of(index);
      int64_t bytes = std::min(run_ - within, last - first);
      if (within == 0 && bytes == run_ && !loops_.empty()) {
        const Loop& inner = loops_.front();
        const int64_t count = std::min((last - first) / run_, inner.count - index % inner.count);
        copy_runs(source, inner.stride, count, target);
        bytes = count * run_;
      } else {
        std::memcpy(target, source + within, bytes);
      }
      target += bytes;
      first += bytes;
    }
  }

 private:
  struct Loop {
    int64_t count, stride;
  };

  // Loops come from the innermost to the outermost.
  void add_loop(int64_t count, int64_t stride) {
    if (loops_.empty() && stride == run_) {
      run_ *= count;
    } else if (!loops_.empty() && stride == loops_.back().count * loops_.back().stride) {
      loops_.back().count *= count;
    } else {
      loops_.push_back({count, stride});
    }
  }

  int64_t offset_of(int64_t run) const {
    int64_t offset = 0;
    for (const Loop& loop : loops_) {
      offset += run % loop.count * loop.stride;
      run /= loop.count;
    }
    return offset;
  }

  template <int64_t bytes>
  static void copy_short_runs(const char* source, int64_t stride, int64_t count, char* target) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(target + i * bytes, source + i * stride, bytes);
    }
  }

  void copy_runs(const char* source, int64_t stride, int64_t count, char* target) const {
    switch (run_) {
      case 1:
        return copy_short_runs<1>(source, stride, count, target);
      case 3:
        if (stride == 4) {
          return choose(BITFAST_EACH(drop_fourth_bytes))(source, count, target);
        }
        return copy_short_runs<3>(source, stride, count, target);
      case 4:
        return copy_short_runs<4>(source, stride, count, target);
      case 8:
        return copy_short_runs<8>(source, stride, count, target);
      default:
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(target + i * run_, source + i * stride, run_);
        }
    }
  }

  const char* data_;
  int64_t run_, size_;
  std::vector<Loop> loops_;
};

// ---- operators ------------------------------------------------------------------------------------------------

void check_images(const std::vector<Tensor>& images) {
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.is_cpu(), "images must be on the CPU");
  }
}

// Where each image goes: the byte at which it begins, a multiple of `alignment`, and its strides in elements there,
// dense and in the order of its own; last, the bytes of all together.
std::vector<int64_t> packed_places(const std::vector<Tensor>& images, int64_t alignment) {
  check_images(images);
  STD_TORCH_CHECK(alignment >= 1, "alignment must be at least 1");
  std::vector<int64_t> places;
  int64_t start = 0, end = 0;
  for (const Tensor& image : images) {
    places.push_back(start);
    const size_t at = places.size();
    places.resize(at + image.dim());
    const std::vector<int64_t> dimensions = outermost_first(image);
    int64_t count = 1;
    for (auto dimension = dimensions.rbegin(); dimension != dimensions.rend(); ++dimension) {
      places[at + *dimension] = count;
      count *= image.size(*dimension);
    }
    end = start + count * static_cast<int64_t>(image.element_size());
    start = ceil_div(end, alignment) * alignment;
  }
  places.push_back(end);
  return places;
}

// Fills `piece` with the bytes from `first` on of a packed batch in which the images begin at `starts`.
void pack_images(const std::vector<Tensor>& images, const std::vector<int64_t>& starts, int64_t first, Tensor piece) {
  check_images(images);
  STD_TORCH_CHECK(images.size() == starts.size(), "starts must hold one number for each image");
  STD_TORCH_CHECK(
      piece.is_cpu() && piece.is_contiguous() && piece.scalar_type() == ScalarType::Byte,
      "piece must be uint8, contiguous, on the CPU");
  const std::vector<Source> sources(images.begin(), images.end());
  char* data = static_cast<char*>(piece.mutable_data_ptr());
  const int64_t size = piece.numel();
  in_parallel(ceil_div(size, block_bytes), [&](int64_t block) {
    const int64_t begin = first + block * block_bytes;
    const int64_t end = std::min(begin + block_bytes, first + size);
    // From the last image that begins at or before the block's first byte.
    const auto after = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin();
    for (size_t i = std::max<int64_t>(after - 1, 0); i < starts.size() && starts[i] < end; ++i) {
      const int64_t from = std::max(begin, starts[i]), to = std::min(end, starts[i] + sources[i].size());
      if (from < to) {
        sources[i].copy(from - starts[i], to - starts[i], data + (from - first));
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("packed_places.native(Tensor[] images, int alignment) -> int[]");
  m.def("pack_images.native(Tensor[] images, int[] starts, int first, Tensor(a!) piece) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CompositeExplicitAutograd, m) {
  m.impl("packed_places.native", TORCH_BOX(&packed_places));
  m.impl("pack_images.native", TORCH_BOX(&pack_images));
}

}  // namespace bitfast::image_packing
