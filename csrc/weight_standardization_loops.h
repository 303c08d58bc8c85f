// The loops of weight_standardization and its backward pass.
// Included once per instruction set, inside its namespace.
#include "vectors.h"
#include "moments.h"

// (w - mean) / std, rounded about once: the mean and 1/std are each kept as a float32 and the error of that float32,
// and what the difference loses when it is rounded is added again.
struct Standardization {
  float center, rstd, rstd_rest, shift;

  explicit Standardization(double mean, double exact_rstd)
      : center(static_cast<float>(mean)),
        rstd(static_cast<float>(exact_rstd)),
        rstd_rest(static_cast<float>(exact_rstd - rstd)),
        shift(static_cast<float>((center - mean) * exact_rstd)) {}

  template <typename Value>
  BITFAST_INLINE Value operator()(Value w) const {
    const Value difference = w - center;
    const Value lost = (w - difference) - center;
    return difference * rstd + (lost * rstd + (difference * rstd_rest + shift));
  }
};

// Standardizes the filters from `first` up to `last`.
template <typename T, typename Result>
void standardize(const Forward<T, Result>& work, int64_t first, int64_t last) {
  const Filters& filters = work.filters;
  const int64_t size = filters.size();
  for (int64_t f = first; f < last; ++f) {
    const T* weight = work.weight + f * size;
    Result* result = work.result + f * size;
    const Moments moments = moments_of(weight, size);
    const Standardization standardized(moments.mean, 1.0 / std::sqrt(moments.squares / size + work.eps));
    work.mean[f] = standardized.center;
    work.rstd[f] = standardized.rstd;
    if (filters.transposes) {
      for (int64_t k = 0; k < filters.taps; ++k) {
        for (int64_t c = 0; c < filters.channels; ++c) {
          const float w = static_cast<float>(weight[c * filters.taps + k]);
          result[k * filters.channels + c] = static_cast<Result>(standardized(w));
        }
      }
      continue;
    }
    for_each_vector(size, [&](int64_t i, auto count) {
      store_up_to(result + i, standardized(load_up_to(weight + i, count)), count);
    });
  }
}

// With h the standardized weight: grad_weight = rstd (grad - mean(grad) - h mean(grad h)).
template <typename T, typename Grad>
void standardize_backward(const Backward<T, Grad>& work, int64_t first, int64_t last) {
  const Filters& filters = work.filters;
  const int64_t size = filters.size();
  constexpr int64_t piece = 32 * lanes;
  std::vector<Grad> in_order(filters.transposes ? size : 0);
  for (int64_t f = first; f < last; ++f) {
    const T* weight = work.weight + f * size;
    const Grad* grad = work.grad + f * size;
    if (filters.transposes) {
      for (int64_t c = 0; c < filters.channels; ++c) {
        for (int64_t k = 0; k < filters.taps; ++k) {
          in_order[c * filters.taps + k] = grad[k * filters.channels + c];
        }
      }
      grad = in_order.data();
    }
    const float mean = work.mean[f], rstd = work.rstd[f];
    double total = 0, products = 0;
    for (int64_t start = 0; start < size; start += piece) {
      Vector sum{}, product{};
      for_each_vector(std::min(piece, size - start), [&](int64_t i, auto count) {
        const Vector g = load_up_to(grad + start + i, count);
        sum += g;
        product += g * ((load_up_to(weight + start + i, count) - mean) * rstd);
      });
      total += sum_of(sum);
      products += sum_of(product);
    }
    const float offset = static_cast<float>(total / size), projection = static_cast<float>(products / size);
    for_each_vector(size, [&](int64_t i, auto count) {
      const Vector h = (load_up_to(weight + i, count) - mean) * rstd;
      const Vector g = load_up_to(grad + i, count);
      store_up_to(work.grad_weight + f * size + i, (g - offset - h * projection) * rstd, count);
    });
  }
}
