// norm_convolution: the schemas, and the operators on CPUs with AVX-512, which divide the work and call the loops.
// bitfast/ops/norm_convolution.py says what each takes and returns.
#include "errors.h"

#include "norm_convolution.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "convolution_checks.h"
#include "float_data.h"
#include "group_statistics.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "norm_convolution_loops.h"
#define BITFAST_OP norm_convolution
#define BITFAST_SETS BITFAST_AVX512 + BITFAST_AVX512_BF16
#include "each_instruction_set.h"

namespace bitfast::norm_convolution {
namespace {

// The packed input of a task (and, for 1x1 filters, its result) should leave room in a core's own cache (1 MiB) for
// the weights that stream through it; but weights should be streamed for no fewer rows than few_rows.
constexpr int64_t task_bytes = 256 * 1024, few_rows = 4 * tile_rows;
// A task of fewer multiplications than this is not worth another thread.
constexpr int64_t multiplications_per_task = 1 << 18;

// ---- the norm of the input ---------------------------------------------------------------------------

// (x - center) * scale + shift, for each image and channel.
struct Coefficients {
  std::vector<float> center, scale, shift;
};

// A norm as the operators take it; none without a weight.
struct Norm {
  std::optional<Tensor> moments, weight, bias;
  int64_t groups;
  double eps;
  Activation activation;
};

Coefficients coefficients_of(const Norm& norm, const Tensor& x) {
  check_moments(*norm.moments, x);
  const int64_t images = x.size(0), channels = x.size(1);
  const double* means = static_cast<const double*>(norm.moments->const_data_ptr());
  const double* variances = means + images * channels;
  const FloatData weight(*norm.weight), bias(*norm.bias);
  Coefficients result;
  for (std::vector<float>* numbers : {&result.center, &result.scale, &result.shift}) {
    numbers->resize(images * channels);
  }
  const int64_t size = channels / norm.groups;
  for (int64_t first = 0; first < images * channels; first += size) {
    const GroupStatistics group = statistics_of_group(means + first, variances + first, size, norm.eps);
    const float center = static_cast<float>(group.mean);
    for (int64_t c = first; c < first + size; ++c) {
      const float scale = weight.data()[c % channels] * group.rstd;
      result.center[c] = center;
      result.scale[c] = scale;
      // Corrected by the error of the rounded mean.
      result.shift[c] = bias.data()[c % channels] - static_cast<float>(group.mean - center) * scale;
    }
  }
  return result;
}

// The moments of each image's channels, piece by piece: means, and sums of the squared differences from them.
class PieceMoments {
 public:
  PieceMoments(int64_t images, int64_t pieces, int64_t channels)
      : images_(images), pieces_(pieces), channels_(channels), numbers_(2 * images * pieces * channels) {}

  double* means() { return numbers_.data(); }
  double* squares() { return numbers_.data() + numbers_.size() / 2; }

  // Writes the mean and the variance of each image's channels, of shape (2, N, C). The last piece of an image may have
  // fewer pixels than the others.
  void join_into(const Tensor& result, int64_t pixels, int64_t pixels_per_piece) {
    const int64_t pieces = pieces_, channels = channels_;
    const double *means = this->means(), *squares = this->squares();
    double* mean = static_cast<double*>(result.mutable_data_ptr());
    double* variance = mean + images_ * channels;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, pieces * channels));
    torch::stable::parallel_for(0, images_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        double *m = mean + image * channels, *v = variance + image * channels;
        std::fill_n(m, channels, 0.0);
        std::fill_n(v, channels, 0.0);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t at = (image * pieces + piece) * channels, seen = piece * pixels_per_piece;
          const double added = std::min(pixels_per_piece, pixels - seen), part = added / (seen + added);
          for (int64_t c = 0; c < channels; ++c) {
            const double difference = means[at + c] - m[c];
            m[c] += difference * part;
            v[c] += squares[at + c] + difference * difference * seen * part;
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          v[c] /= pixels;
        }
      }
    });
  }

 private:
  int64_t images_, pieces_, channels_;
  std::vector<double> numbers_;
};

// ---- the convolution -------------------------------------------------------------------------------

// Cuts the work into tasks.
template <typename T>
void divide(Work<T>& work, int64_t kernel_size) {
  const bool is_pointwise = kernel_size == 1;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_squares = is_pointwise ? 1 : squares_in_row(work.width);
  const int64_t row_bytes = 4 * work.words() * row_squares * (is_pointwise ? 1 : positions);
  work.rows = is_pointwise ? work.height * work.width : ceil_div(work.height, 2);
  const int64_t result_bytes = work.out_channels * static_cast<int64_t>(sizeof(T));
  int64_t pieces = is_pointwise ? ceil_div(work.rows, std::max(few_rows, task_bytes / (row_bytes + result_bytes)))
                                : ceil_div(work.rows * row_bytes, task_bytes);
  // As many as keep all threads equally busy, but none smaller than a tile.
  const int64_t most = std::max<int64_t>(1, work.rows * row_squares / tile_rows);
  const int64_t columns = ceil_div(work.out_channels, panel_columns);
  const int64_t cost = work.rows * row_squares * work.in_channels * work.out_channels * (is_pointwise ? 1 : positions);
  const int64_t worthwhile = std::max<int64_t>(1, work.images * cost / multiplications_per_task);
  const int64_t wanted = std::min(threads, worthwhile);
  while (pieces < most && (work.images * pieces) % wanted != 0 && pieces < 4 * wanted) {
    ++pieces;
  }
  pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, work.rows));
  work.piece = ceil_div(work.rows, pieces);
  work.pieces = ceil_div(work.rows, work.piece);
  int64_t blocks = 1;
  while (blocks < columns && work.images * work.pieces * blocks < wanted) {
    ++blocks;
  }
  work.block = ceil_div(columns, blocks) * panel_columns;
  work.blocks = ceil_div(work.out_channels, work.block);
}

template <typename T>
using Function = void(const Work<T>&, const Task&, float*);

template <typename T>
Function<T>* function_for(int64_t kernel_size) {
#if BITFAST_X86
  if constexpr (sizeof(T) == 4) {
    return kernel_size == 1 ? &avx512::pointwise<T> : &avx512::winograd;
  } else {
    return avx512_bf16::pointwise<T>;
  }
#else
  return nullptr;
#endif
}

template <typename T>
void run_tasks(const Work<T>& work, int64_t kernel_size, const Tensor& like) {
  const int64_t tasks = work.tasks(), workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (tasks == 0) {
    return;
  }
  const int64_t words = ceil_div(scratch_words(work, kernel_size), chunk_words) * chunk_words + 16 * chunk_words;
  Tensor scratch = torch::stable::new_empty(like, {workers * words}, ScalarType::Float);
  float* memory = static_cast<float*>(scratch.mutable_data_ptr());
  Function<T>* function = function_for<T>(kernel_size);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t number = worker * tasks / workers; number < (worker + 1) * tasks / workers; ++number) {
        function(work, task_of(work, number), memory + worker * words);
      }
    }
  });
}

// Filters as the operators take them.
struct PackedFilters {
  const Tensor& packed;
  int64_t kernel_size, stride;
};

template <typename T>
Work<T> work_of(const Tensor& x, const PackedFilters& filters, const Tensor& result) {
  Work<T> work{};
  work.images = x.size(0);
  work.in_channels = x.size(1);
  work.out_channels = result.size(1);
  work.in_height = x.size(2);
  work.in_width = x.size(3);
  work.height = result.size(2);
  work.width = result.size(3);
  work.stride = filters.stride;
  const Tensor& packed = filters.packed;
  const int64_t panels = ceil_div(work.out_channels, panel_columns) * (filters.kernel_size == 1 ? 1 : positions);
  STD_TORCH_CHECK(
      packed.scalar_type() == x.scalar_type() && packed.is_contiguous() &&
          packed.numel() * static_cast<int64_t>(sizeof(T)) == panels * work.panel_words() * 4,
      "the weight was packed for another convolution");
  work.x = static_cast<const T*>(x.const_data_ptr());
  work.weight = static_cast<const float*>(packed.const_data_ptr());
  work.result = static_cast<T*>(result.mutable_data_ptr());
  divide(work, filters.kernel_size);
  return work;
}

// Writes the convolution to the result, added to `addend` if there is one, which may be the result itself. Returns the
// moments of the result, of no images if nobody wants them.
Tensor convolve(
    const Tensor& x, const Norm& norm, const PackedFilters& filters, const Tensor& result,
    const std::optional<Tensor>& addend, bool wants_moments) {
  STD_TORCH_CHECK(
      is_dense_channels_last(x) && is_dense_channels_last(result), "x and the result must be channels_last");
  if (addend.has_value()) {
    STD_TORCH_CHECK(
        addend->scalar_type() == x.scalar_type() && have_same_shape(*addend, result) && is_dense_channels_last(*addend),
        "residual must have the dtype and the shape of the convolution, and be channels_last");
  }
  const std::string problem = convolution_problem(x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(problem.empty(), "norm_convolution cannot run here: ", problem);
  const int64_t images = wants_moments ? x.size(0) : 0;
  Tensor moments = torch::stable::new_empty(result, {2, images, result.size(1)}, ScalarType::Double);
  dispatch_kernel_dtype("norm_convolution", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Work<T> work = work_of<T>(x, filters, result);
    work.activation = norm.activation;
    work.addend = addend.has_value() ? static_cast<const T*>(addend->const_data_ptr()) : nullptr;
    Coefficients coefficients;
    if (norm.weight.has_value()) {
      coefficients = coefficients_of(norm, x);
      work.center = coefficients.center.data();
      work.scale = coefficients.scale.data();
      work.shift = coefficients.shift.data();
    }
    PieceMoments parts(images, work.pieces, work.out_channels);
    if (wants_moments) {
      work.means = parts.means();
      work.squares = parts.squares();
    }
    run_tasks(work, filters.kernel_size, x);
    if (wants_moments) {
      const int64_t pixels_per_piece = filters.kernel_size == 1 ? work.piece : 2 * work.piece * work.width;
      parts.join_into(moments, work.height * work.width, pixels_per_piece);
    }
  });
  return moments;
}

// The mean and the variance of each image's channels, of shape (2, N, C).
Tensor channel_moments(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && is_dense_channels_last(x), "x must be channels_last, of shape (N, C, H, W)");
  const std::string problem = convolution_problem(false);
  STD_TORCH_CHECK(problem.empty(), "channel_moments cannot run here: ", problem);
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  Tensor moments = torch::stable::new_empty(x, {2, images, channels}, ScalarType::Double);
  // Pieces of 64 KiB or so, which a core reads twice.
  const int64_t piece = std::clamp<int64_t>(16384 / std::max<int64_t>(1, channels), 1, std::max<int64_t>(1, pixels));
  const int64_t pieces = ceil_div(pixels, piece);
  PieceMoments parts(images, pieces, channels);
#if BITFAST_X86
  dispatch_kernel_dtype("channel_moments", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x.const_data_ptr());
    torch::stable::parallel_for(0, images * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        const int64_t first = number % pieces * piece;
        avx512::moments_of_pixels<T>(
            source + (number / pieces * pixels + first) * channels, std::min(piece, pixels - first), channels, channels,
            parts.means() + number * channels, parts.squares() + number * channels);
      }
    });
  });
#endif
  parts.join_into(moments, pixels, piece);
  return moments;
}

Norm norm_of(
    const Tensor& x, const std::optional<Tensor>& moments, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, double eps, Activation activation) {
  Norm norm{moments, weight, bias, num_groups, eps, activation};
  if (!weight.has_value()) {
    return norm;
  }
  check_num_groups(x, num_groups);
  STD_TORCH_CHECK(bias.has_value(), "a norm has a weight and a bias");
  for (const std::optional<Tensor>* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(
        (*parameter)->dim() == 1 && (*parameter)->size(0) == x.size(1),
        "the norm's weight and bias must have shape (C,)");
  }
  if (!moments.has_value()) {
    norm.moments = channel_moments(x);
  }
  return norm;
}

void check_convolution(const Tensor& x, int64_t kernel_size, int64_t stride) {
  check_feature_maps(x);
  STD_TORCH_CHECK(
      (kernel_size == 1 && stride >= 1) ||
          (kernel_size == 3 && stride == 1 && x.scalar_type() == ScalarType::Float),
      "norm_convolution is for 1x1 filters, and for 3x3 filters of stride 1 in float32");
}

std::tuple<Tensor, Tensor> norm_convolution(
    const Tensor& x, const std::optional<Tensor>& moments, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, int64_t num_groups, double eps, StringHandle activation,
    const Tensor& packed, int64_t out_channels, int64_t kernel_size, int64_t stride, bool wants_moments,
    const std::optional<Tensor>& residual) {
  check_convolution(x, kernel_size, stride);
  const int64_t height = ceil_div(x.size(2), stride), width = ceil_div(x.size(3), stride);
  const Tensor result =
      empty_4d({x.size(0), out_channels, height, width}, x.scalar_type(), x.device(), MemoryFormat::ChannelsLast);
  const Norm norm = norm_of(x, moments, norm_weight, norm_bias, num_groups, eps, take_activation(activation));
  return {result, convolve(x, norm, {packed, kernel_size, stride}, result, residual, wants_moments)};
}

Tensor norm_convolution_add(
    const Tensor& x, const std::optional<Tensor>& moments, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, int64_t num_groups, double eps, StringHandle activation,
    const Tensor& packed, const Tensor& total, int64_t kernel_size, int64_t stride, bool wants_moments) {
  check_convolution(x, kernel_size, stride);
  STD_TORCH_CHECK(
      total.dim() == 4 && total.scalar_type() == x.scalar_type() && total.size(0) == x.size(0) &&
          total.size(2) == ceil_div(x.size(2), stride) && total.size(3) == ceil_div(x.size(3), stride),
      "total must have the dtype and the shape of the convolution");
  const Norm norm = norm_of(x, moments, norm_weight, norm_bias, num_groups, eps, take_activation(activation));
  return convolve(x, norm, {packed, kernel_size, stride}, total, total, wants_moments);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("norm_convolution_problem(bool bfloat16) -> str");
  m.def("channel_moments.native(Tensor x) -> Tensor");
  m.def(
      "norm_convolution.native(Tensor x, Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, int num_groups, "
      "float eps, str activation, Tensor packed, int out_channels, int kernel_size, int stride, bool wants_moments, "
      "Tensor? residual=None) -> (Tensor, Tensor)");
  m.def(
      "norm_convolution_add_.native(Tensor x, Tensor? moments, Tensor? norm_weight, Tensor? norm_bias, "
      "int num_groups, float eps, str activation, Tensor packed, Tensor(a!) total, int kernel_size, int stride, "
      "bool wants_moments) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CompositeExplicitAutograd, m) {
  m.impl("norm_convolution_problem", TORCH_BOX(&convolution_problem));
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("channel_moments.native", TORCH_BOX(&channel_moments));
  m.impl("norm_convolution.native", TORCH_BOX(&norm_convolution));
  m.impl("norm_convolution_add_.native", TORCH_BOX(&norm_convolution_add));
}

}  // namespace bitfast::norm_convolution
