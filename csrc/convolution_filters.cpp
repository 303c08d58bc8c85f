// pack_norm_convolution: filters as the kernels of norm_convolution read them.
#include "errors.h"

#include "convolution_filters.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "convolution_checks.h"
#include "instruction_sets.h"
#include "kernel_dtypes.h"
#include "memory_format.h"

#define BITFAST_LOOPS "convolution_filters_loops.h"
#define BITFAST_OP convolution_filters
#define BITFAST_SETS BITFAST_AVX512
#include "each_instruction_set.h"

namespace bitfast::convolution_filters {
namespace {

// Words of packed weights that are worth another thread.
constexpr int64_t words_per_task = 1 << 14;

// Panels of 32 output channels; for 3x3 filters each has its 16 positions one after the other. Turned filters are those
// of the gradient of the convolution's input: they lead from its output channels to its input channels.
Tensor pack(const Tensor& weight, ScalarType dtype, bool turned) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::BFloat16),
      "weight must be float32 or bfloat16, of shape (out, in, height, width)");
  const bool is_pointwise = weight.size(2) == 1 && weight.size(3) == 1;
  STD_TORCH_CHECK(
      is_pointwise || (weight.size(2) == 3 && weight.size(3) == 3 && dtype == ScalarType::Float),
      "weights are packed for 1x1 convolutions, and in float32 for 3x3 convolutions");
  const std::string problem = convolution_problem(false);
  STD_TORCH_CHECK(problem.empty(), "weights cannot be packed here: ", problem);
  Tensor dense = weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype);
  if (!(is_pointwise ? dense.is_contiguous() : is_channels_last(dense) || weight.size(1) == 1)) {
    dense = torch::stable::contiguous(dense, is_pointwise ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
  }
  Tensor packed;
#if BITFAST_X86
  dispatch_kernel_dtype("norm_convolution", dtype, [&](auto zero) {
    using T = decltype(zero);
    Filters<T> filters{static_cast<const T*>(dense.const_data_ptr()), weight.size(0), weight.size(1), turned, nullptr};
    const int64_t parts = is_pointwise ? 1 : positions;
    const int64_t panel_elements = parts * filters.panel_words() * 4 / static_cast<int64_t>(sizeof(T));
    packed = torch::stable::new_empty(weight, {filters.panels() * panel_elements}, dtype);
    filters.target = static_cast<float*>(packed.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, words_per_task / std::max<int64_t>(1, filters.panel_words()));
    torch::stable::parallel_for(0, filters.panels(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        if constexpr (sizeof(T) == 4) {
          if (!is_pointwise) {
            avx512::pack_squares_panel(filters, panel);
            continue;
          }
        }
        avx512::pack_pointwise_panel(filters, panel);
      }
    });
  });
#endif
  return packed;
}

Tensor pack_norm_convolution(const Tensor& weight, bool as_bfloat16, bool turned) {
  return pack(weight, as_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, turned);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("pack_norm_convolution.native(Tensor weight, bool as_bfloat16, bool turned=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CPU, m) {
  m.impl("pack_norm_convolution.native", TORCH_BOX(&pack_norm_convolution));
}

}  // namespace bitfast::convolution_filters
