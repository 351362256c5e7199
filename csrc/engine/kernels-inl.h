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

// `n` vectors of outputs of `rows` rows from `o` on, whose sums stay in registers. Factors are
// floats, so their products are exact, fused or not.
template <int rows, int n>
void head_outputs(const Head& a, int64_t row, int64_t o) {
  constexpr int64_t width = Simd<double>::width;
  vec<double> sum[rows][n] = {};
  const double* x = a.x + row * a.inputs;
  const double* weight = a.weight + o;
  for (int64_t i = 0; i < a.inputs; ++i, ++x, weight += a.outputs) {
    for (int j = 0; j < n; ++j) {
      const vec<double> w = load(weight + j * width);
      for (int r = 0; r < rows; ++r)
        sum[r][j] = fused(vec<double>{} + x[r * a.inputs], w, sum[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* const out = a.out + (row + r) * a.outputs + o;
    for (int j = 0; j < n; ++j) {
      const vec<double> y = sum[r][j] + load(a.bias + o + j * width);
      for (int i = 0; i < width; ++i) out[j * width + i] = static_cast<float>(y[i]);
    }
  }
}

template <int rows>
void head_rows(const Head& a, int64_t row) {
  constexpr int64_t width = Simd<double>::width;
  int64_t o = 0;
  for (; o + 4 * width <= a.outputs; o += 4 * width) head_outputs<rows, 4>(a, row, o);
  for (; o + width <= a.outputs; o += width) head_outputs<rows, 1>(a, row, o);
  for (; o < a.outputs; ++o) {
    for (int r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < a.inputs; ++i) {
        sum += a.x[(row + r) * a.inputs + i] * a.weight[i * a.outputs + o];
      }
      a.out[(row + r) * a.outputs + o] = static_cast<float>(sum + a.bias[o]);
    }
  }
}

void head(const Head& a, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) head_rows<4>(a, row);
  for (; row < end; ++row) head_rows<1>(a, row);
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
