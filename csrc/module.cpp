// The extension: its kernels register themselves (csrc/bindings) for the schemas that
// src/atsnn/ops defines in Python before it loads this library.
#include <pybind11/pybind11.h>

#include "bindings/common.h"
#include "bindings/engine.h"

namespace atsnn {
namespace {

std::string level_name() {
  switch (level()) {
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace
}  // namespace atsnn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native kernels of atsnn; the operations live in torch.ops.atsnn.";
  m.def("level", &atsnn::level_name, "Instruction set in use: 'avx512', 'avx2' or 'portable'.");
  atsnn::bind_engine(m);
}
