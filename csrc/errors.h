// The checks of this extension and of torch's headers, with messages that are built without iostreams.
//
// torch's own macros write to a std::ostringstream. Where libstdc++ is linked in statically, parts of two copies of it
// meet in such a stream: messages end at the first number, or the process crashes. Every source file includes this
// one first, so that the headers of torch that follow check with these macros, too.
#pragma once

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace bitfast {

template <typename Part>
void append_to(std::string& message, const Part& part) {
  if constexpr (std::is_integral_v<Part>) {
    message += std::to_string(part);
  } else {
    message += std::string_view(part);
  }
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (append_to(message, parts), ...);
  throw std::runtime_error(message);
}

}  // namespace bitfast

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...)                                                       \
  if (C10_UNLIKELY_OR_CONST(!(condition))) {                                                  \
    ::bitfast::fail(__func__, ", ", __FILE__, ":", __LINE__, ", ", ##__VA_ARGS__);            \
  }

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                                                          \
  if ((call) != TORCH_SUCCESS) {                                                              \
    ::bitfast::fail(#call, " API call failed at ", __FILE__, ", line ", __LINE__);            \
  }
