// The engine's kernels, written once and compiled for each instruction set (see simd-inl.h): the
// head here, the others in files of their own.

#include "attend-inl.h"
#include "fire-inl.h"
#include "linear-inl.h"
#include "lists-inl.h"
#include "narrow-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// `n` outputs of a row from `o` on, whose sums stay in registers.
template <int n>
void head_outputs(const Head& a, int64_t row, int64_t o) {
  double sum[n] = {};
  for (int64_t i = 0; i < a.inputs; ++i) {
    const double x = a.x[row * a.inputs + i];
    const double* weight = a.weight + i * a.outputs + o;
    for (int j = 0; j < n; ++j) sum[j] += x * weight[j];
  }
  float* out = a.out + row * a.outputs + o;
  for (int j = 0; j < n; ++j) out[j] = static_cast<float>(sum[j] + a.bias[o + j]);
}

void head(const Head& a, int64_t begin, int64_t end) {
  constexpr int most = 4 * ATSNN_VECTOR_BYTES / sizeof(double);
  for (int64_t row = begin; row < end; ++row) {
    int64_t o = 0;
    for (; o + most <= a.outputs; o += most) head_outputs<most>(a, row, o);
    for (; o + 4 <= a.outputs; o += 4) head_outputs<4>(a, row, o);
    for (; o < a.outputs; ++o) head_outputs<1>(a, row, o);
  }
}

}  // namespace

#define ATSNN_KERNELS_(LEVEL) LEVEL##_kernels
#define ATSNN_KERNELS(LEVEL) ATSNN_KERNELS_(LEVEL)
#define ATSNN_NAME_(LEVEL) #LEVEL
#define ATSNN_NAME(LEVEL) ATSNN_NAME_(LEVEL)

}  // namespace ATSNN_LEVEL

const Kernels ATSNN_KERNELS(ATSNN_LEVEL) = {
    ATSNN_NAME(ATSNN_LEVEL),
    ATSNN_LEVEL::add_rows,
    ATSNN_LEVEL::add_groups,
    ATSNN_LEVEL::list_groups,
    ATSNN_LEVEL::fire,
    ATSNN_LEVEL::conv_narrow,
    ATSNN_LEVEL::attend,
    ATSNN_LEVEL::head,
    ATSNN_LEVEL::count,
    ATSNN_LEVEL::list_bits,
    ATSNN_LEVEL::list_bytes,
    ATSNN_LEVEL::list_floats,
    ATSNN_LEVEL::pack,
    ATSNN_LEVEL::unpack,
    ATSNN_LEVEL::pack_pixels,
    ATSNN_LEVEL::unpack_pixels,
    ATSNN_LEVEL::scores_forward<float>,
    ATSNN_LEVEL::scores_forward<uint8_t>,
    ATSNN_LEVEL::readout_forward<float>,
    ATSNN_LEVEL::readout_forward<uint8_t>,
    ATSNN_LEVEL::combine_rows<float>,
    ATSNN_LEVEL::dots<float>,
};

}  // namespace atsnn
