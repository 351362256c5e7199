// The Python boundary: checks, allocation and dispatch. The only file that knows torch.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/neuron.h"

namespace atsnn {
namespace {

using at::Tensor;

// The instruction set PyTorch itself chose (it follows ATEN_CPU_CAPABILITY), so that the two
// never disagree within a process.
enum class Level { portable, avx2, avx512 };

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

#if defined(__x86_64__)
#define ATSNN_AT_LEVEL(call) \
  (level() == Level::avx512 ? avx512::call : level() == Level::avx2 ? avx2::call : portable::call)
#else
#define ATSNN_AT_LEVEL(call) (portable::call)
#endif

// ---- from torch's types to the kernels'
// -----------------------------------------------------------

template <class S>
struct Storage {
  using type = S;
};

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

at::ScalarType arithmetic_dtype(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* write(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// [T, ...] as T rows of contiguous columns, `stride` apart; copied only if the columns are strided.
struct Rows {
  Tensor storage;
  int64_t stride = 0;
};

Rows as_rows(const Tensor& x) {
  if (x.size(0) == 0 || x.select(0, 0).is_contiguous()) return {x, x.stride(0)};
  Tensor dense = x.contiguous();
  return {dense, dense.stride(0)};
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- neuron
// ---------------------------------------------------------------------------------------

Surrogate surrogate_of(c10::string_view name) {
  if (name == "sigmoid") return Surrogate::sigmoid;
  if (name == "atan") return Surrogate::atan;
  if (name == "piecewise_quadratic") return Surrogate::piecewise_quadratic;
  if (name == "piecewise_exp") return Surrogate::piecewise_exp;
  if (name == "soft_sign") return Surrogate::soft_sign;
  if (name == "super_spike") return Surrogate::super_spike;
  if (name == "erf") return Surrogate::erf;
  TORCH_CHECK_VALUE(false, "neuron: unknown surrogate '", std::string(name), "'");
}

NeuronParams neuron_params(const std::optional<Tensor>& inv_tau, c10::string_view kind, double tau,
                           double v_threshold, std::optional<double> v_reset, bool decay_input,
                           bool detach_reset, c10::string_view surrogate, double alpha) {
  NeuronParams p;
  p.v_threshold = v_threshold;
  p.v_reset = v_reset.value_or(0.0);
  p.hard_reset = v_reset.has_value();
  p.detach_reset = detach_reset;
  p.surrogate = surrogate_of(surrogate);
  p.alpha = alpha;
  p.charge = kind == "if" ? Charge::integrate : decay_input ? Charge::decay : Charge::no_decay;
  if (kind == "plif") {
    TORCH_CHECK_VALUE(inv_tau.has_value(), "neuron: kind='plif' needs inv_tau");
    p.multiply = true;
    p.factor = inv_tau->item<double>();
  } else {
    int exponent;
    // Where 1/tau is exact the product and the quotient are the same bits, and a product is faster.
    p.multiply = std::frexp(tau, &exponent) == 0.5;
    p.factor = p.multiply ? 1.0 / tau : tau;
  }
  return p;
}

void check_state(const char* name, const Tensor& v, const Tensor& x) {
  const auto dtype = arithmetic_dtype(x.scalar_type());
  TORCH_CHECK_VALUE(v.sizes() == x.sizes().slice(1), "neuron: ", name, " must have shape ",
                    x.sizes().slice(1), ", got ", v.sizes());
  TORCH_CHECK_TYPE(v.scalar_type() == dtype, "neuron: ", name, " must be ", dtype, ", got ",
                   v.scalar_type());
}

std::tuple<Tensor, Tensor> neuron(const Tensor& x, const std::optional<Tensor>& v,
                                  const std::optional<Tensor>& inv_tau, c10::string_view kind,
                                  double tau, double v_threshold, std::optional<double> v_reset,
                                  bool decay_input, bool detach_reset, c10::string_view surrogate,
                                  double alpha) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "neuron: x must have shape [T, ...], got a 0-d tensor");
  if (v) check_state("v", *v, x);
  const auto p = neuron_params(inv_tau, kind, tau, v_threshold, v_reset, decay_input, detach_reset,
                               surrogate, alpha);
  const auto state = x.options().dtype(arithmetic_dtype(x.scalar_type()));
  Tensor spikes = at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
  Tensor v_final = at::empty(x.sizes().slice(1), state);
  const Rows in = as_rows(x);
  const Tensor v_init = v ? v->contiguous() : Tensor();
  with_storage("neuron", x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    NeuronForward<S> a;
    a.x = read<S>(in.storage);
    a.x_stride = in.stride;
    a.v_init = v ? read<A>(v_init) : nullptr;
    a.spikes = write<S>(spikes);
    a.v_final = write<A>(v_final);
    a.T = x.size(0);
    a.M = v_final.numel();
    a.stream = can_stream(a.spikes, a.T, a.M);
    const int64_t tiles = divide_up(a.M, neuron_forward_tile);
    at::parallel_for(0, tiles, 8, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(neuron_forward<S>(a, p, begin, end));
    });
  });
  return {spikes, v_final};
}

std::tuple<Tensor, Tensor, Tensor> neuron_backward(
    const std::optional<Tensor>& grad_spikes, const std::optional<Tensor>& grad_v, const Tensor& x,
    const std::optional<Tensor>& v, const std::optional<Tensor>& inv_tau, c10::string_view kind,
    double tau, double v_threshold, std::optional<double> v_reset, bool decay_input,
    bool detach_reset, c10::string_view surrogate, double alpha) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "neuron_backward: x must have shape [T, ...], got a 0-d tensor");
  if (v) check_state("v", *v, x);
  if (grad_v) check_state("grad_v", *grad_v, x);
  if (grad_spikes) {
    TORCH_CHECK_VALUE(grad_spikes->sizes() == x.sizes(), "neuron_backward: grad_spikes must have ",
                      "shape ", x.sizes(), ", got ", grad_spikes->sizes());
    TORCH_CHECK_TYPE(grad_spikes->scalar_type() == x.scalar_type(),
                     "neuron_backward: grad_spikes must be ", x.scalar_type(), ", got ",
                     grad_spikes->scalar_type());
  }
  const auto p = neuron_params(inv_tau, kind, tau, v_threshold, v_reset, decay_input, detach_reset,
                               surrogate, alpha);
  const auto state = x.options().dtype(arithmetic_dtype(x.scalar_type()));
  Tensor grad_x = at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
  Tensor grad_v_init = v ? at::empty(x.sizes().slice(1), state) : at::empty({0}, state);
  const int64_t T = x.size(0);
  const int64_t M = c10::multiply_integers(x.sizes().slice(1));
  const int64_t tiles = divide_up(M, neuron_backward_tile);
  const bool want_factor = kind == "plif";
  Tensor partial = at::empty({want_factor ? tiles : 0}, x.options().dtype(at::kDouble));
  const Rows in = as_rows(x);
  const Rows grad = grad_spikes ? as_rows(*grad_spikes) : Rows{};
  const Tensor v_init = v ? v->contiguous() : Tensor();
  const Tensor grad_state = grad_v ? grad_v->contiguous() : Tensor();
  with_storage("neuron_backward", x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    NeuronBackward<S> a;
    a.x = read<S>(in.storage);
    a.x_stride = in.stride;
    a.v_init = v ? read<A>(v_init) : nullptr;
    a.grad_spikes = grad_spikes ? read<S>(grad.storage) : nullptr;
    a.grad_stride = grad.stride;
    a.grad_v = grad_v ? read<A>(grad_state) : nullptr;
    a.grad_x = write<S>(grad_x);
    a.grad_v_init = v ? write<A>(grad_v_init) : nullptr;
    a.grad_factor = want_factor ? write<double>(partial) : nullptr;
    a.T = T;
    a.M = M;
    a.stream = can_stream(a.grad_x, T, M);
    at::parallel_for(0, tiles, 8, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<A[]> scratch(new A[neuron_backward_scratch(T, want_factor)]);
      ATSNN_AT_LEVEL(neuron_backward<S>(a, p, scratch.get(), begin, end));
    });
  });
  Tensor grad_inv_tau = want_factor
                            ? partial.sum().to(inv_tau->scalar_type()).view(inv_tau->sizes())
                            : at::empty({0}, state);
  return {grad_x, grad_v_init, grad_inv_tau};
}

}  // namespace
}  // namespace atsnn

// The schemas are defined in Python (atsnn/ops.py), which loads this library first.
TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("neuron", &atsnn::neuron);
  m.impl("neuron_backward", &atsnn::neuron_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native kernels of atsnn; the operations live in torch.ops.atsnn.";
  m.def("level", &atsnn::level_name, "Instruction set in use: 'avx512', 'avx2' or 'portable'.");
}
