// The operator that names the instruction set which the CPU kernels use on this machine,
// for `bitfast env` and the tests.
#include "errors.h"

#include "instruction_sets.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace bitfast {
namespace {

std::string name_of_instruction_set() {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bitfast, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bitfast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&name_of_instruction_set));
}

}  // namespace bitfast
