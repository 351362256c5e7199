// neuron: LIF, IF, PLIF over dense [T, ...] or packed rows [R, C].
#include "neuron.h"

namespace atsnn {
namespace {

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

}  // namespace

NeuronParams neuron_params(const std::optional<Tensor>& inv_tau, c10::string_view kind, double tau,
                           double v_threshold, std::optional<double> v_reset, bool decay_input,
                           bool detach_reset, c10::string_view surrogate, double alpha) {
  TORCH_CHECK_VALUE(kind == "lif" || kind == "if" || kind == "plif", "neuron: unknown kind '",
                    std::string(kind), "', must be 'lif', 'if' or 'plif'");
  TORCH_CHECK_VALUE(kind != "plif" || inv_tau, "neuron: kind='plif' needs inv_tau");
  const Charge charge = charge_of(std::string_view(kind.data(), kind.size()), decay_input);
  const auto factor =
      kind == "plif" ? std::optional<double>(inv_tau->item<double>()) : std::nullopt;
  NeuronParams p = neuron_settings(charge, tau, factor, v_threshold, v_reset);
  p.detach_reset = detach_reset;
  p.surrogate = surrogate_of(surrogate);
  p.alpha = alpha;
  return p;
}

namespace {

// What both directions are given, as the kernels see it.
struct NeuronShape {
  HeldLayout layout;
  int64_t C;
  std::vector<int64_t> state;  // the shape of the membrane

  // Dense x [T, ...] is one image of one token, whose channels are all that is not time.
  NeuronShape(const char* op, const Tensor& x, const OptionalTensor& token,
              const OptionalTensor& offsets)
      : layout(token || offsets ? HeldLayout::of(op, x, token, offsets) : dense(op, x)) {
    if (token) {
      TORCH_CHECK_VALUE(x.dim() == 2, op, ": packed x must have shape [R, C], got ", x.sizes());
      C = x.size(1);
      state = {layout.view.B, layout.view.N, C};
    } else {
      state = x.sizes().slice(1).vec();
      C = c10::multiply_integers(state);
    }
  }

 private:
  static HeldLayout dense(const char* op, const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have shape [T, ...], got a 0-d tensor");
    return HeldLayout(x.size(0), 1, 1);
  }
};

void check_state(const char* op, const char* name, const OptionalTensor& v, const Tensor& x,
                 const NeuronShape& shape) {
  if (!v) return;
  check_shape(op, name, *v, shape.state);
  check_dtype(op, name, *v, arithmetic_dtype(x.scalar_type()));
}

// Rows of contiguous elements, `stride` apart; copied only where that is not how they lie. The rows
// of an image must follow each other, so only rows that are a timestep each may be apart.
struct Rows {
  Tensor storage;
  int64_t stride = 0;
};

Rows as_rows(const Tensor& x, bool packed) {
  if (x.dim() > 0 && !packed && (x.size(0) == 0 || x.select(0, 0).is_contiguous())) {
    return {x, x.stride(0)};
  }
  Tensor dense = x.contiguous();
  return {dense, dense.stride(0)};
}

std::tuple<Tensor, Tensor> neuron(const Tensor& x, const OptionalTensor& v,
                                  const OptionalTensor& inv_tau, const OptionalTensor& token,
                                  const OptionalTensor& offsets, c10::string_view kind, double tau,
                                  double v_threshold, std::optional<double> v_reset,
                                  bool decay_input, bool detach_reset, c10::string_view surrogate,
                                  double alpha) {
  const NeuronShape shape("neuron", x, token, offsets);
  check_state("neuron", "v", v, x, shape);
  const auto p = neuron_params(inv_tau, kind, tau, v_threshold, v_reset, decay_input, detach_reset,
                               surrogate, alpha);
  Tensor spikes = new_empty(x, x.sizes());
  Tensor v_final = at::empty(shape.state, x.options().dtype(arithmetic_dtype(x.scalar_type())));
  const Rows in = as_rows(x, token.has_value());
  const OptionalTensor v_init = contiguous(v);
  with_storage("neuron", x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    NeuronForward<S> a;
    a.x = read<S>(in.storage);
    a.x_stride = in.stride;
    a.v_init = read_or_null<A>(v_init);
    a.spikes = write<S>(spikes);
    a.v_final = write<A>(v_final);
    a.layout = shape.layout.view;
    a.C = shape.C;
    a.stream = can_stream(a.spikes, a.layout.rows(), a.C);
    const int64_t tiles = neuron_tiles(a.layout, a.C, neuron_forward_tile);
    at::parallel_for(0, tiles, 8, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(neuron_forward<S>(a, p, begin, end));
    });
  });
  return {spikes, v_final};
}

std::tuple<Tensor, Tensor, Tensor> neuron_backward(
    const OptionalTensor& grad_spikes, const OptionalTensor& grad_v, const Tensor& x,
    const OptionalTensor& v, const OptionalTensor& inv_tau, const OptionalTensor& token,
    const OptionalTensor& offsets, c10::string_view kind, double tau, double v_threshold,
    std::optional<double> v_reset, bool decay_input, bool detach_reset, c10::string_view surrogate,
    double alpha) {
  const char* op = "neuron_backward";
  const NeuronShape shape(op, x, token, offsets);
  check_state(op, "v", v, x, shape);
  check_state(op, "grad_v", grad_v, x, shape);
  if (grad_spikes) check_like(op, "grad_spikes", *grad_spikes, x);
  const auto p = neuron_params(inv_tau, kind, tau, v_threshold, v_reset, decay_input, detach_reset,
                               surrogate, alpha);
  const auto options = x.options().dtype(arithmetic_dtype(x.scalar_type()));
  const bool want_factor = kind == "plif", packed = token.has_value();
  const int64_t tiles = neuron_tiles(shape.layout.view, shape.C, neuron_backward_tile);
  Tensor grad_x = new_empty(x, x.sizes());
  Tensor grad_v_init = v ? at::empty(shape.state, options) : at::empty({0}, options);
  Tensor partial = at::empty({want_factor ? tiles : 0}, x.options().dtype(at::kDouble));
  const Rows in = as_rows(x, packed);
  const Rows grad = grad_spikes ? as_rows(*grad_spikes, packed) : Rows{};
  const OptionalTensor v_init = contiguous(v), grad_state = contiguous(grad_v);
  with_storage(op, x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    NeuronBackward<S> a;
    a.x = read<S>(in.storage);
    a.x_stride = in.stride;
    a.v_init = read_or_null<A>(v_init);
    a.grad_spikes = grad_spikes ? read<S>(grad.storage) : nullptr;
    a.grad_stride = grad.stride;
    a.grad_v = read_or_null<A>(grad_state);
    a.grad_x = write<S>(grad_x);
    a.grad_v_init = v ? write<A>(grad_v_init) : nullptr;
    a.grad_factor = want_factor ? write<double>(partial) : nullptr;
    a.layout = shape.layout.view;
    a.C = shape.C;
    a.stream = can_stream(a.grad_x, a.layout.rows(), a.C);
    at::parallel_for(0, tiles, 8, [&](int64_t begin, int64_t end) {
      const Scratch scratch(neuron_backward_scratch(a.layout.T, want_factor) * sizeof(A));
      ATSNN_AT_LEVEL(neuron_backward<S>(a, p, scratch.as<A>(), begin, end));
    });
  });
  Tensor grad_inv_tau = want_factor
                            ? partial.sum().to(inv_tau->scalar_type()).view(inv_tau->sizes())
                            : at::empty({0}, options);
  return {grad_x, grad_v_init, grad_inv_tau};
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("neuron", &atsnn::neuron);
  m.impl("neuron_backward", &atsnn::neuron_backward);
}
