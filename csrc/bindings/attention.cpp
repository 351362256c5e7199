// spiking_attention and spike_driven_attention over dense [T, B, N, C] or packed rows [R, C].
#include "../cpu/attention.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../cpu/rows.h"
#include "common.h"
#include "neuron.h"

namespace atsnn {
namespace {

// q, k, v and what goes with them, checked.
struct HeldTokens {
  HeldLayout layout;
  Tensor q, k, v;
  OptionalTensor sizes;
  int64_t C;

  HeldTokens(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_,
             const OptionalTensor& sizes_, const OptionalTensor& token,
             const OptionalTensor& offsets)
      : layout(HeldLayout::of(op, q_, token, offsets)),
        q(q_.contiguous()),
        k(k_.contiguous()),
        v(v_.contiguous()) {
    TORCH_CHECK_VALUE(q.dim() == (token ? 2 : 4), op,
                      ": q must have shape [T, B, N, C] or, packed, [R, C], got ", q.sizes());
    check_like(op, "k", k, q);
    check_like(op, "v", v, q);
    C = q.size(-1);
    if (sizes_) {
      check_shape(op, "sizes", *sizes_, {layout.view.B, layout.view.N});
      sizes = sizes_->to(at::kFloat).contiguous();
    }
  }

  // Most rows of a (t, b).
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t b = 0; layout.view.T > 0 && b < layout.view.B; ++b) {
      most = std::max(most, layout.view.count(0, b));
    }
    return most;
  }
};

// ---- spiking attention --------------------------------------------------------------------------

void check_heads(const char* op, int64_t C, int64_t num_heads) {
  TORCH_CHECK_VALUE(num_heads >= 1 && C % num_heads == 0, op, ": num_heads must divide the ", C,
                    " channels, got ", num_heads);
}

// (run, head) pairs a thread takes at a time.
constexpr int64_t items_a_chunk = 4;

Tensor spiking_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                         const OptionalTensor& sizes, const OptionalTensor& token,
                         const OptionalTensor& offsets, int64_t num_heads, double scale) {
  const char* op = "spiking_attention";
  const HeldTokens held(op, q, k, v, sizes, token, offsets);
  check_heads(op, held.C, num_heads);
  Tensor out = new_empty(q, q.sizes());
  if (q.numel() == 0) return out;
  with_storage(op, q.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const AttentionForward<S> a{read<S>(held.q),
                                read<S>(held.k),
                                read<S>(held.v),
                                write<S>(out),
                                read_or_null<float>(held.sizes),
                                held.layout.view,
                                held.C,
                                num_heads,
                                scale};
    const size_t bytes = attention_scratch<S>(held.longest(), held.C / num_heads, false);
    at::parallel_for(0, a.layout.runs() * num_heads, items_a_chunk,
                     [&](int64_t begin, int64_t end) {
                       const Scratch scratch(bytes);
                       ATSNN_AT_LEVEL(attention_forward<S>(a, scratch.as<void>(), begin, end));
                     });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> spiking_attention_backward(const Tensor& grad, const Tensor& q,
                                                              const Tensor& k, const Tensor& v,
                                                              const OptionalTensor& sizes,
                                                              const OptionalTensor& token,
                                                              const OptionalTensor& offsets,
                                                              int64_t num_heads, double scale) {
  const char* op = "spiking_attention_backward";
  const HeldTokens held(op, q, k, v, sizes, token, offsets);
  check_heads(op, held.C, num_heads);
  check_like(op, "grad", grad, q);
  const Tensor g = grad.contiguous();
  Tensor grad_q = new_empty(q, q.sizes()), grad_k = new_empty(q, q.sizes());
  Tensor grad_v = new_empty(q, q.sizes());
  if (q.numel() == 0) return {grad_q, grad_k, grad_v};
  with_storage(op, q.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const AttentionBackward<S> a{
        read<S>(held.q),  read<S>(held.k),  read<S>(held.v),  read<S>(g),
        write<S>(grad_q), write<S>(grad_k), write<S>(grad_v), read_or_null<float>(held.sizes),
        held.layout.view, held.C,           num_heads,        scale};
    const size_t bytes = attention_scratch<S>(held.longest(), held.C / num_heads, true);
    at::parallel_for(0, a.layout.runs() * num_heads, items_a_chunk,
                     [&](int64_t begin, int64_t end) {
                       const Scratch scratch(bytes);
                       ATSNN_AT_LEVEL(attention_backward<S>(a, scratch.as<void>(), begin, end));
                     });
  });
  return {grad_q, grad_k, grad_v};
}

// ---- spike-driven attention ---------------------------------------------------------------------

// The LIF on the sums over tokens, one potential an image and channel: [T, B * C] as one image.
struct Gate {
  HeldLayout layout;
  NeuronParams p;
  int64_t C;

  Gate(const char* op, const HeldTokens& held, const OptionalTensor& state, double v_threshold,
       double tau, c10::string_view surrogate, double alpha)
      : layout(held.layout.view.T, 1, 1),
        p(neuron_params(std::nullopt, "lif", tau, v_threshold, 0.0, true, true, surrogate, alpha)),
        C(held.layout.view.B * held.C) {
    if (!state) return;
    check_shape(op, "state", *state, {held.layout.view.B, 1, held.C});
    check_dtype(op, "state", *state, arithmetic_dtype(held.q.scalar_type()));
  }
};

// The sums over tokens of size * x * y, [T, B, C].
template <class S>
void sum_tokens(const S* x, const S* y, const float* sizes, const Layout& layout, int64_t C,
                arithmetic_t<S>* out) {
  const SumProducts<S> a{x, y, sizes, out, layout, C};
  at::parallel_for(0, layout.runs() * channel_tiles(C), 1, [&](int64_t begin, int64_t end) {
    ATSNN_AT_LEVEL(sum_products<S>(a, begin, end));
  });
}

template <class S>
void scale_tokens(const S* x, const arithmetic_t<S>* factor, const float* sizes,
                  const Layout& layout, int64_t C, S* out) {
  const ScaleRows<S> a{x, factor, sizes, out, layout, C};
  at::parallel_for(0, layout.runs(), 1, [&](int64_t begin, int64_t end) {
    ATSNN_AT_LEVEL(scale_rows<S>(a, begin, end));
  });
}

template <class A>
void fire(const Gate& gate, const A* x, const A* v_init, A* spikes, A* v_final) {
  NeuronForward<A> a;
  a.x = x;
  a.x_stride = a.C = gate.C;
  a.v_init = v_init;
  a.spikes = spikes;
  a.v_final = v_final;
  a.stream = false;
  a.layout = gate.layout.view;
  ATSNN_AT_LEVEL(neuron_forward<A>(a, gate.p, 0, neuron_tiles(a.layout, a.C, neuron_forward_tile)));
}

std::tuple<Tensor, Tensor> spike_driven_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& state,
    const OptionalTensor& sizes, const OptionalTensor& token, const OptionalTensor& offsets,
    double v_threshold, double tau, c10::string_view surrogate, double alpha) {
  const char* op = "spike_driven_attention";
  const HeldTokens held(op, q, k, v, sizes, token, offsets);
  const Gate gate(op, held, state, v_threshold, tau, surrogate, alpha);
  const auto [T, B, N, ignored_offsets, ignored_token] = held.layout.view;
  const auto options = q.options().dtype(arithmetic_dtype(q.scalar_type()));
  Tensor out = new_empty(q, q.sizes());
  Tensor sums = at::empty({T, B, held.C}, options), gates = at::empty({T, B, held.C}, options);
  Tensor v_final = at::empty({B, 1, held.C}, options);
  const OptionalTensor v_init = contiguous(state);
  with_storage(op, q.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    sum_tokens<S>(read<S>(held.k), read<S>(held.v), read_or_null<float>(held.sizes),
                  held.layout.view, held.C, write<A>(sums));
    fire<A>(gate, read<A>(sums), read_or_null<A>(v_init), write<A>(gates), write<A>(v_final));
    scale_tokens<S>(read<S>(held.q), read<A>(gates), nullptr, held.layout.view, held.C,
                    write<S>(out));
  });
  return {out, v_final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spike_driven_attention_backward(
    const OptionalTensor& grad, const OptionalTensor& grad_state, const Tensor& q, const Tensor& k,
    const Tensor& v, const OptionalTensor& state, const OptionalTensor& sizes,
    const OptionalTensor& token, const OptionalTensor& offsets, double v_threshold, double tau,
    c10::string_view surrogate, double alpha) {
  const char* op = "spike_driven_attention_backward";
  const HeldTokens held(op, q, k, v, sizes, token, offsets);
  const Gate gate(op, held, state, v_threshold, tau, surrogate, alpha);
  const auto [T, B, N, ignored_offsets, ignored_token] = held.layout.view;
  const auto options = q.options().dtype(arithmetic_dtype(q.scalar_type()));
  if (grad) check_like(op, "grad", *grad, q);
  if (grad_state) {
    check_shape(op, "grad_state", *grad_state, {B, 1, held.C});
    check_dtype(op, "grad_state", *grad_state, arithmetic_dtype(q.scalar_type()));
  }
  Tensor grad_q = grad ? new_empty(q, q.sizes()) : at::zeros(q.sizes(), q.options());
  Tensor grad_k = new_empty(q, q.sizes()), grad_v = new_empty(q, q.sizes());
  Tensor grad_v_init =
      at::empty(state ? at::IntArrayRef({B, 1, held.C}) : at::IntArrayRef({0}), options);
  const auto room = [&] { return at::empty({T, B, held.C}, options); };
  const Tensor sums = room(), gates = room(), grad_gates = room(), grad_sums = room();
  const Tensor unused = at::empty({B, 1, held.C}, options);
  const OptionalTensor g = contiguous(grad), gs = contiguous(grad_state),
                       v_init = contiguous(state);
  with_storage(op, q.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = arithmetic_t<S>;
    const Layout& layout = held.layout.view;
    const float* size = read_or_null<float>(held.sizes);
    const int64_t C = held.C;
    sum_tokens<S>(read<S>(held.k), read<S>(held.v), size, layout, C, write<A>(sums));
    if (grad) {
      fire<A>(gate, read<A>(sums), read_or_null<A>(v_init), write<A>(gates), write<A>(unused));
      sum_tokens<S>(read<S>(*g), read<S>(held.q), nullptr, layout, C, write<A>(grad_gates));
      scale_tokens<S>(read<S>(*g), read<A>(gates), nullptr, layout, C, write<S>(grad_q));
    }
    NeuronBackward<A> a;
    a.x = read<A>(sums);
    a.x_stride = a.grad_stride = a.C = gate.C;
    a.v_init = read_or_null<A>(v_init);
    a.grad_spikes = grad ? read<A>(grad_gates) : nullptr;
    a.grad_v = read_or_null<A>(gs);
    a.grad_x = write<A>(grad_sums);
    a.stream = false;
    a.grad_v_init = state ? write<A>(grad_v_init) : nullptr;
    a.grad_factor = nullptr;
    a.layout = gate.layout.view;
    const Scratch scratch(neuron_backward_scratch(T, false) * sizeof(A));
    ATSNN_AT_LEVEL(neuron_backward<A>(a, gate.p, scratch.as<A>(), 0,
                                      neuron_tiles(a.layout, a.C, neuron_backward_tile)));
    scale_tokens<S>(read<S>(held.v), read<A>(grad_sums), size, layout, C, write<S>(grad_k));
    scale_tokens<S>(read<S>(held.k), read<A>(grad_sums), size, layout, C, write<S>(grad_v));
  });
  return {grad_q, grad_k, grad_v, grad_v_init};
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("spiking_attention", &atsnn::spiking_attention);
  m.impl("spiking_attention_backward", &atsnn::spiking_attention_backward);
  m.impl("spike_driven_attention", &atsnn::spike_driven_attention);
  m.impl("spike_driven_attention_backward", &atsnn::spike_driven_attention_backward);
}
