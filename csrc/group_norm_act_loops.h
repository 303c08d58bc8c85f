// The loops of group_norm_act: moments, normalization, gradients.
// Included once per instruction set, inside its namespace.
#include "vectors.h"
#include "activation_vectors.h"
#include "moments.h"

// Adjacent vectors whose sums stay in registers.
constexpr int strip = 4;

// Calls function(vectors, first channel, count) for the channels of a task: strips of whole vectors, and then
// single vectors of up to `count` channels.
template <typename Function>
BITFAST_INLINE void for_each_strip(int64_t channels, const Function& function) {
  int64_t c = 0;
  for (; c + strip * lanes <= channels; c += strip * lanes) {
    function(std::integral_constant<int, strip>{}, c, All{});
  }
  for_each_vector(channels - c, [&](int64_t i, auto count) {
    function(std::integral_constant<int, 1>{}, c + i, count);
  });
}

// ---- forward: moments ------------------------------------------------------------------------------

template <typename T, bool adds>
void channels_last_moments(const Forward<T>& work, const Task& task, ChannelPairs moments) {
  const int64_t stride = work.division.channels;
  const int64_t start = offset_of(work.division, task);
  for (int64_t p = 0; p < task.pixels; p += few_pixels) {
    const int64_t pixels = std::min(few_pixels, task.pixels - p);
    for_each_strip(task.channels, [&](auto vectors, int64_t c, auto count) {
      const int64_t at = start + p * stride + c;
      strip_moments<T, adds, vectors>(
          work.x + at, adds ? work.residual + at : nullptr, adds ? work.total + at : nullptr, stride, pixels,
          count, p, moments.first + c, moments.second + c);
    });
  }
}

template <typename T>
void add_rows(const T* x, const T* residual, T* total, int64_t length) {
  for_each_vector(length, [&](int64_t i, auto count) {
    store_up_to(total + i, load_up_to(x + i, count) + load_up_to(residual + i, count), count);
  });
}

template <typename T>
void contiguous_moments(const Forward<T>& work, const Task& task, ChannelPairs moments) {
  const Division& division = work.division;
  // Where the channels of a group adjoin, they are one row.
  const int64_t channels = division.pieces == 1 ? division.group_size() : 1;
  for (int64_t c = 0; c < task.channels; c += channels) {
    const int64_t at = offset_of(division, task) + c * division.pixels;
    const int64_t length = channels * task.pixels;
    const T* source = work.x + at;
    if (work.residual != nullptr) {
      add_rows(work.x + at, work.residual + at, work.total + at, length);
      source = work.total + at;
    }
    const Moments m = moments_of(source, length);
    std::fill_n(moments.first + c, channels, m.mean);
    std::fill_n(moments.second + c, channels, m.squares / channels);
  }
}

template <typename T>
void forward_moments(const Forward<T>& work, const Task& task) {
  const ChannelPairs moments = pairs_of(work.division, work.moments, task, task.piece);
  if (!work.division.channels_last) {
    return contiguous_moments(work, task, moments);
  }
  std::fill_n(moments.first, task.channels, 0.0);
  std::fill_n(moments.second, task.channels, 0.0);
  if (work.residual != nullptr) {
    channels_last_moments<T, true>(work, task, moments);
  } else {
    channels_last_moments<T, false>(work, task, moments);
  }
}

// ---- forward: normalize ----------------------------------------------------------------------------

// result = activation((x - center) * scale + shift), per channel.
struct Coefficients {
  std::vector<float> center, scale, shift;
  explicit Coefficients(int64_t channels) : center(channels), scale(channels), shift(channels) {}
};

// Joins the moments of all pieces and channels of each of a task's groups.
template <typename T>
void coefficients_of(const Forward<T>& work, const Task& task, Coefficients& coefficients) {
  const Division& division = work.division;
  const int64_t size = division.group_size();
  const double values = static_cast<double>(size) * division.pixels;
  for (int64_t first = 0; first < task.channels; first += size) {
    double mean = 0, squares = 0;
    const auto for_each_part = [&](const auto& function) {
      if (work.known_means != nullptr) {
        const int64_t at = task.image * division.channels + task.first_channel;
        for (int64_t c = at + first; c < at + first + size; ++c) {
          function(work.known_means[c], work.known_variances[c] * division.pixels, division.pixels);
        }
        return;
      }
      for (int64_t piece = 0; piece < division.pieces; ++piece) {
        const ChannelPairs part = pairs_of(division, work.moments, task, piece);
        const double pixels = std::min(division.piece, division.pixels - piece * division.piece);
        for (int64_t c = first; c < first + size; ++c) {
          function(part.first[c], part.second[c], pixels);
        }
      }
    };
    for_each_part([&](double m, double, double pixels) { mean += m * pixels; });
    mean /= values;
    for_each_part([&](double m, double s, double pixels) { squares += s + pixels * (m - mean) * (m - mean); });
    const float rstd = static_cast<float>(1.0 / std::sqrt(squares / values + work.eps));
    const float center = static_cast<float>(mean);
    if (task.piece == 0 && work.mean != nullptr) {
      const int64_t group = task.image * division.groups + (task.first_channel + first) / size;
      work.mean[group] = center;
      work.rstd[group] = rstd;
    }
    for (int64_t c = first; c < first + size; ++c) {
      const float scale = work.weight[task.first_channel + c] * rstd;
      coefficients.center[c] = center;
      coefficients.scale[c] = scale;
      // Corrected by the error of the rounded mean.
      coefficients.shift[c] = work.bias[task.first_channel + c] - static_cast<float>(mean - center) * scale;
    }
  }
}

template <typename T, Activation activation, bool adds, int vectors, typename Count>
void normalize_strip(
    const T* x, const T* shortcut, T* result, int64_t stride, int64_t pixels, Count count, const float* center,
    const float* scale, const float* shift) {
  Vector m[vectors], a[vectors], b[vectors];
  for (int v = 0; v < vectors; ++v) {
    m[v] = load_up_to(center + v * lanes, count);
    a[v] = load_up_to(scale + v * lanes, count);
    b[v] = load_up_to(shift + v * lanes, count);
  }
  for (int64_t i = 0; i < pixels; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = i * stride + v * lanes;
      Vector value = (load_up_to(x + at, count) - m[v]) * a[v] + b[v];
      if constexpr (adds) {
        value += load_up_to(shortcut + at, count);
      }
      store_up_to(result + at, activated<activation>(value), count);
    }
  }
}

template <typename T, Activation activation, bool adds>
void normalize_row(
    const T* x, const T* shortcut, T* result, int64_t length, float center, float scale, float shift) {
  for_each_vector(length, [&](int64_t i, auto count) {
    Vector value = (load_up_to(x + i, count) - center) * scale + shift;
    if constexpr (adds) {
      value += load_up_to(shortcut + i, count);
    }
    store_up_to(result + i, activated<activation>(value), count);
  });
}

template <typename T, Activation activation, bool adds>
void normalize(const Forward<T>& work, const Task& task, const Coefficients& coefficients) {
  const float *center = coefficients.center.data(), *scale = coefficients.scale.data(),
              *shift = coefficients.shift.data();
  const Division& division = work.division;
  const int64_t start = offset_of(division, task);
  const T* source = (work.residual == nullptr ? work.x : work.total) + start;
  const T* shortcut = adds ? work.shortcut + start : source;
  T* result = work.result + start;
  if (!division.channels_last) {
    for (int64_t c = 0; c < task.channels; ++c) {
      const int64_t at = c * division.pixels;
      normalize_row<T, activation, adds>(
          source + at, shortcut + at, result + at, task.pixels, center[c], scale[c], shift[c]);
    }
    return;
  }
  for_each_strip(task.channels, [&](auto vectors, int64_t c, auto count) {
    normalize_strip<T, activation, adds, vectors>(
        source + c, shortcut + c, result + c, division.channels, task.pixels, count, center + c, scale + c, shift + c);
  });
}

template <typename T>
void forward_normalize(const Forward<T>& work, const Task& task) {
  Coefficients coefficients(task.channels);
  coefficients_of(work, task, coefficients);
  dispatch_activation(work.activation, [&](auto activation) {
    if (work.shortcut == nullptr) {
      normalize<T, activation, false>(work, task, coefficients);
    } else {
      normalize<T, activation, true>(work, task, coefficients);
    }
  });
}

template <typename T>
void forward(const Forward<T>& work, const Task& task) {
  forward_moments(work, task);
  forward_normalize(work, task);
}

// ---- backward --------------------------------------------------------------------------------------

// With h = (x - mean) rstd, the gradient before the activation is grad * activation'(h weight + bias).
struct Channel {
  Vector mean, rstd, weight, bias;

  BITFAST_INLINE Vector normalized(Vector x) const { return (x - mean) * rstd; }

  template <Activation activation>
  BITFAST_INLINE Vector before(Vector grad, Vector h) const {
    return activation == Activation::none ? grad : grad * derivative_at<activation>(h * weight + bias);
  }

  template <Activation activation>
  BITFAST_INLINE Vector result(Vector h) const {
    return activated<activation>(h * weight + bias);
  }
};

// 1/std of a group. That of a group of one value counts as 0: its result is constant, and its gradient 0.
template <typename T>
BITFAST_INLINE float rstd_of(const Backward<T>& work, int64_t group) {
  return work.division.group_size() * work.division.pixels == 1 ? 0.0f : work.rstd[group];
}

// Float32 sums of more terms than this lose digits: sums of that many are summed in turn, and those sums in
// float64.
constexpr int64_t short_sum = 8;

// Pixels of a channels_last task that are gone through for one strip of channels before the next: few where they are
// wide, so that memory is read in order, more or less.
template <typename T>
BITFAST_INLINE int64_t pixels_at_once(const Backward<T>& work) {
  constexpr int64_t nearest_bytes = 16 * 1024;
  const int64_t pixel_bytes = work.division.channels * static_cast<int64_t>(sizeof(T));
  return std::clamp<int64_t>(nearest_bytes / pixel_bytes, 2 * short_sum, short_sum * short_sum);
}

// A number of each of a task's channels.
struct ChannelNumbers {
  std::vector<float> mean, rstd, weight, bias;

  template <typename T>
  ChannelNumbers(const Backward<T>& work, const Task& task)
      : mean(task.channels), rstd(task.channels), weight(task.channels), bias(task.channels) {
    const int64_t size = work.division.group_size();
    for (int64_t c = 0; c < task.channels; ++c) {
      const int64_t group = task.image * work.division.groups + (task.first_channel + c) / size;
      mean[c] = work.mean[group];
      rstd[c] = rstd_of(work, group);
      weight[c] = work.weight[task.first_channel + c];
      bias[c] = work.bias[task.first_channel + c];
    }
  }

  // The vector of `count` channels from `channel`.
  template <typename Count>
  BITFAST_INLINE Channel from(int64_t channel, Count count) const {
    return {
        load_up_to(mean.data() + channel, count), load_up_to(rstd.data() + channel, count),
        load_up_to(weight.data() + channel, count), load_up_to(bias.data() + channel, count)};
  }
};

// One channel in all lanes.
template <typename T>
BITFAST_INLINE Channel channel_at(const Backward<T>& work, const Task& task, int64_t channel) {
  const int64_t c = task.first_channel + channel;
  const int64_t group = task.image * work.division.groups + c / work.division.group_size();
  return {all(work.mean[group]), all(rstd_of(work, group)), all(work.weight[c]), all(work.bias[c])};
}

typedef double Doubles __attribute__((vector_size(2 * vector_bytes)));

template <typename Count>
BITFAST_INLINE void add_to(double* sums, Vector more, Count count) {
  if constexpr (std::is_same_v<Count, All>) {
    Doubles sum;
    std::memcpy(&sum, sums, sizeof sum);
    sum += __builtin_convertvector(more, Doubles);
    std::memcpy(sums, &sum, sizeof sum);
  } else {
    for (int64_t c = 0; c < std::min<int64_t>(count, lanes); ++c) {
      sums[c] += more[c];
    }
  }
}

// Brings what is read a few pixels later.
template <typename T>
BITFAST_INLINE void prefetch_later(const Backward<T>& work, int64_t at) {
  const int64_t later = at + 2 * short_sum * work.division.channels;
  __builtin_prefetch(work.x + later);
  __builtin_prefetch(work.grad + later);
}

// Adds to the sums of a strip of channels, from element `start` on, those of a few more pixels.
template <typename T, Activation activation, int vectors, typename Count>
BITFAST_INLINE void strip_sums(
    const Backward<T>& work, const Channel (&channels)[vectors], int64_t start, int64_t pixels, Count count,
    ChannelPairs sums) {
  Vector sum[vectors] = {}, product[vectors] = {};
  for (int64_t first = 0; first < pixels; first += short_sum) {
    Vector few[vectors] = {}, few_products[vectors] = {};
    for (int64_t i = first; i < std::min(first + short_sum, pixels); ++i) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = start + i * work.division.channels + v * lanes;
        prefetch_later(work, at);
        const Vector h = channels[v].normalized(load_up_to(work.x + at, count));
        const Vector g = channels[v].template before<activation>(load_up_to(work.grad + at, count), h);
        few[v] += g;
        few_products[v] += g * h;
      }
    }
    for (int v = 0; v < vectors; ++v) {
      sum[v] += few[v];
      product[v] += few_products[v];
    }
  }
  for (int v = 0; v < vectors; ++v) {
    add_to(sums.first + v * lanes, sum[v], count);
    add_to(sums.second + v * lanes, product[v], count);
  }
}

// Calls function(channels, first channel, start, pixels, count) for each strip of a few pixels of a channels_last task,
// whose first element is `start`.
template <typename T, typename Function>
BITFAST_INLINE void for_each_strip_of_pixels(const Backward<T>& work, const Task& task, const Function& function) {
  const ChannelNumbers numbers(work, task);
  const int64_t at_once = pixels_at_once(work);
  for (int64_t p = 0; p < task.pixels; p += at_once) {
    const int64_t pixels = std::min(at_once, task.pixels - p);
    for_each_strip(task.channels, [&](auto vectors, int64_t c, auto count) {
      Channel channels[vectors];
      for (int v = 0; v < vectors; ++v) {
        channels[v] = numbers.from(c + v * lanes, count);
      }
      function(channels, c, offset_of(work.division, task) + p * work.division.channels + c, pixels, count);
    });
  }
}

template <typename T, Activation activation>
void row_sums(const Backward<T>& work, const Task& task, int64_t channel, ChannelPairs sums) {
  const int64_t start = offset_of(work.division, task) + channel * work.division.pixels;
  const Channel c = channel_at(work, task, channel);
  constexpr int64_t few = few_pixels * lanes;
  double total = 0, products = 0;
  for (int64_t p = 0; p < task.pixels; p += few) {
    Vector sum{}, product{};
    for_each_vector(std::min(few, task.pixels - p), [&](int64_t i, auto count) {
      const int64_t at = start + p + i;
      const Vector h = c.normalized(load_up_to(work.x + at, count));
      const Vector g = c.template before<activation>(load_up_to(work.grad + at, count), h);
      sum += g;  // where nothing was loaded, the gradient is 0
      product += g * h;
    });
    total += sum_of(sum);
    products += sum_of(product);
  }
  *sums.first = total;
  *sums.second = products;
}

template <typename T>
void backward_sums(const Backward<T>& work, const Task& task) {
  const ChannelPairs sums = pairs_of(work.division, work.sums, task, task.piece);
  dispatch_activation(work.activation, [&](auto activation) {
    if (!work.division.channels_last) {
      for (int64_t c = 0; c < task.channels; ++c) {
        row_sums<T, activation>(work, task, c, {sums.first + c, sums.second + c});
      }
      return;
    }
    std::fill_n(sums.first, task.channels, 0.0);
    std::fill_n(sums.second, task.channels, 0.0);
    for_each_strip_of_pixels(work, task, [&](const auto& channels, int64_t c, int64_t start, int64_t pixels, auto count) {
      strip_sums<T, activation>(work, channels, start, pixels, count, {sums.first + c, sums.second + c});
    });
  });
}

// grad_x = rstd (g weight - offset - h projection), per channel; g is the gradient before the activation.
struct GradCoefficients {
  std::vector<float> offset, projection;
  explicit GradCoefficients(int64_t channels) : offset(channels), projection(channels) {}
};

// The means, over each of a task's groups, of g weight and of g weight h.
template <typename T>
void grad_coefficients_of(const Backward<T>& work, const Task& task, GradCoefficients& coefficients) {
  const Division& division = work.division;
  const int64_t size = division.group_size();
  const double values = static_cast<double>(size) * division.pixels;
  for (int64_t first = 0; first < task.channels; first += size) {
    double sum = 0, product = 0;
    for (int64_t piece = 0; piece < division.pieces; ++piece) {
      const ChannelPairs part = pairs_of(division, work.sums, task, piece);
      for (int64_t c = first; c < first + size; ++c) {
        const double weight = work.weight[task.first_channel + c];
        sum += weight * part.first[c];
        product += weight * part.second[c];
      }
    }
    std::fill_n(coefficients.offset.data() + first, size, static_cast<float>(sum / values));
    std::fill_n(coefficients.projection.data() + first, size, static_cast<float>(product / values));
  }
}

template <typename T, Activation activation, typename Count>
BITFAST_INLINE void grad_at(
    const Backward<T>& work, const Channel& channel, Vector offset, Vector projection, int64_t at, Count count) {
  const Vector h = channel.normalized(load_up_to(work.x + at, count));
  const Vector g = channel.template before<activation>(load_up_to(work.grad + at, count), h);
  Vector result = channel.rstd * (g * channel.weight - offset - h * projection);
  if (work.grad_total != nullptr) {
    result += load_up_to(work.grad_total + at, count);
  }
  store_up_to(work.grad_x + at, result, count);
  if (work.result != nullptr) {
    store_up_to(work.result + at, channel.template result<activation>(h), count);
  }
}

template <typename T>
void backward_grad(const Backward<T>& work, const Task& task) {
  const Division& division = work.division;
  GradCoefficients coefficients(task.channels);
  grad_coefficients_of(work, task, coefficients);
  const int64_t start = offset_of(division, task);
  const float *offset = coefficients.offset.data(), *projection = coefficients.projection.data();
  dispatch_activation(work.activation, [&](auto activation) {
    if (!division.channels_last) {
      for (int64_t c = 0; c < task.channels; ++c) {
        const Channel channel = channel_at(work, task, c);
        for_each_vector(task.pixels, [&](int64_t i, auto count) {
          const int64_t at = start + c * division.pixels + i;
          grad_at<T, activation>(work, channel, all(offset[c]), all(projection[c]), at, count);
        });
      }
      return;
    }
    for_each_strip_of_pixels(work, task, [&](const auto& channels, int64_t c, int64_t start, int64_t pixels, auto count) {
      constexpr int vectors = std::extent_v<std::remove_reference_t<decltype(channels)>>;
      Vector offsets[vectors], projections[vectors];
      for (int v = 0; v < vectors; ++v) {
        offsets[v] = load_up_to(offset + c + v * lanes, count);
        projections[v] = load_up_to(projection + c + v * lanes, count);
      }
      for (int64_t i = 0; i < pixels; ++i) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = start + i * division.channels + v * lanes;
          prefetch_later(work, at);
          grad_at<T, activation>(work, channels[v], offsets[v], projections[v], at, count);
        }
      }
    });
  });
}

template <typename T>
void backward(const Backward<T>& work, const Task& task) {
  backward_sums(work, task);
  backward_grad(work, task);
}
