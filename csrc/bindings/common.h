// From torch's types to the kernels': dispatch, checks, layouts. Only csrc/bindings knows torch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/layout.h"
#include "../cpu/storage.h"

namespace atsnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The instruction set PyTorch itself chose (it follows ATEN_CPU_CAPABILITY), so that the two never
// disagree within a process.
enum class Level { portable, avx2, avx512 };
Level level();

#if defined(__x86_64__)
#define ATSNN_AT_LEVEL(call) \
  (level() == Level::avx512 ? avx512::call : level() == Level::avx2 ? avx2::call : portable::call)
#else
#define ATSNN_AT_LEVEL(call) (portable::call)
#endif

template <class S>
struct Storage {
  using type = S;
};

// Calls f(Storage<S>{}) for the kernels' type of a tensor's elements.
template <class F>
void with_storage(const char* op, at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat:
      return f(Storage<float>{});
    case at::kDouble:
      return f(Storage<double>{});
    case at::kBFloat16:
      return f(Storage<bfloat16>{});
    case at::kHalf:
      return f(Storage<float16>{});
    default:
      TORCH_CHECK_TYPE(false, op, ": x must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

inline at::ScalarType arithmetic_dtype(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
const S* read_or_null(const OptionalTensor& t) {
  return t ? read<S>(*t) : nullptr;
}
template <class S>
S* write(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

inline Tensor new_empty(const Tensor& like, at::IntArrayRef shape) {
  return at::empty(shape, like.options(), at::MemoryFormat::Contiguous);
}

void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape);
void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType dtype);
// The shape and dtype of another tensor.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& other);

// A layout that was checked against its rows, and what it points into. `token [B, N]` and
// `offsets [T * B + 1]` are those of a TokenLayout.
class HeldLayout {
 public:
  HeldLayout(const char* op, const Tensor& token, const Tensor& offsets, int64_t rows);
  // Every cell of T timesteps of B images of N tokens is active.
  HeldLayout(int64_t T, int64_t B, int64_t N);
  // The layout given, or that of a dense x [T, B, N, ...].
  static HeldLayout of(const char* op, const Tensor& x, const OptionalTensor& token,
                       const OptionalTensor& offsets);

  // The same, of as many rows as the offsets say: for layouts whose rows are not at hand.
  HeldLayout(const char* op, const OptionalTensor& token, const OptionalTensor& offsets);
  // The view points into what is held: it may move with it, not be copied.
  HeldLayout(HeldLayout&&) = default;
  HeldLayout(const HeldLayout&) = delete;

  Layout view;
  bool packed = false;  // whether it was given: an empty token has no address to tell it by

 private:
  Tensor token_, offsets_;
  std::vector<int64_t> dense_;
};

// Memory for a thread's scratch, aligned to a line.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : p_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (!p_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(p_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(p_);
  }

 private:
  void* p_;
};

}  // namespace atsnn
