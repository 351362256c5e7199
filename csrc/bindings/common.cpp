#include "common.h"

#include <ATen/Version.h>

namespace atsnn {

Level level() {
  static const Level chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Level::avx512;
    if (capability == "AVX2") return Level::avx2;
#endif
    return Level::portable;
  }();
  return chosen;
}

void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ",
                    t.sizes());
}

void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ",
                   t.scalar_type());
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& other) {
  check_shape(op, name, t, other.sizes());
  check_dtype(op, name, t, other.scalar_type());
}

namespace {

// A layout of as many rows as its offsets say.
HeldLayout with_own_rows(const char* op, const OptionalTensor& token,
                         const OptionalTensor& offsets) {
  TORCH_CHECK_VALUE(token && offsets, op, ": a layout needs both token and offsets");
  check_dtype(op, "the layout's offsets", *offsets, at::kLong);
  TORCH_CHECK_VALUE(offsets->dim() == 1 && offsets->numel() > 0, op,
                    ": the layout's offsets must have shape [T * B + 1], got ", offsets->sizes());
  const int64_t rows = read<int64_t>(*offsets)[(offsets->numel() - 1) * offsets->stride(0)];
  return HeldLayout(op, *token, *offsets, rows);
}

}  // namespace

HeldLayout::HeldLayout(const char* op, const OptionalTensor& token, const OptionalTensor& offsets)
    : HeldLayout(with_own_rows(op, token, offsets)) {}

HeldLayout::HeldLayout(const char* op, const Tensor& token, const Tensor& offsets, int64_t rows) {
  check_dtype(op, "the layout's token", token, at::kLong);
  check_dtype(op, "the layout's offsets", offsets, at::kLong);
  TORCH_CHECK_VALUE(token.dim() == 2, op, ": the layout's token must have shape [B, N], got ",
                    token.sizes());
  const int64_t B = token.size(0), N = token.size(1);
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() >= 1 &&
                        (B == 0 ? offsets.numel() == 1 : (offsets.numel() - 1) % B == 0),
                    op, ": the layout's offsets must have shape [T * B + 1] with B = ", B, ", got ",
                    offsets.sizes());
  const int64_t T = B == 0 ? 0 : (offsets.numel() - 1) / B;
  packed = true;
  token_ = token.contiguous();
  offsets_ = offsets.contiguous();
  view = {T, B, N, read<int64_t>(offsets_), read<int64_t>(token_)};
  const Scratch scratch(N * sizeof(int64_t));
  const std::string error = layout_error(view, rows, scratch.as<int64_t>());
  TORCH_CHECK_VALUE(error.empty(), op, ": the layout does not fit: ", error);
}

HeldLayout::HeldLayout(int64_t T, int64_t B, int64_t N) : dense_(T * B + 1) {
  for (int64_t i = 0; i <= T * B; ++i) dense_[i] = i * N;
  view = {T, B, N, dense_.data(), nullptr};
}

HeldLayout HeldLayout::of(const char* op, const Tensor& x, const OptionalTensor& token,
                          const OptionalTensor& offsets) {
  TORCH_CHECK_VALUE(token.has_value() == offsets.has_value(), op,
                    ": a layout needs both token and offsets");
  if (token) {
    TORCH_CHECK_VALUE(x.dim() >= 1, op, ": packed rows must have shape [R, ...], got a 0-d tensor");
    return HeldLayout(op, *token, *offsets, x.size(0));
  }
  TORCH_CHECK_VALUE(x.dim() >= 3, op, ": x must have shape [T, B, N, ...], got ", x.sizes());
  return HeldLayout(x.size(0), x.size(1), x.size(2));
}

}  // namespace atsnn
