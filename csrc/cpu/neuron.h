// Spiking neurons (LIF, IF, PLIF) over the timesteps of active rows: declarations.
//
// The formula's home is `neuron` in src/atsnn/reference.py:
//   charge   integrate:  u = v + x
//            decay:      u = v + (x - (v - v_reset)) / tau
//            no decay:   u = v - (v - v_reset) / tau + x
//   fire     s = 1 if u >= v_threshold else 0
//   reset    hard: v = v_reset where s, else u        soft: v = u - s * v_threshold
// Each operation is rounded once, in this order, so every level gives the same bits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "layout.h"
#include "storage.h"

namespace atsnn {

enum class Charge { integrate, decay, no_decay };

enum class Surrogate {
  sigmoid,
  atan,
  piecewise_quadratic,
  piecewise_exp,
  soft_sign,
  super_spike,
  erf,
};

struct NeuronParams {
  Charge charge;
  bool multiply;  // `factor` is 1/tau and is multiplied by; otherwise it is tau and divided by
  double factor;
  double v_threshold;
  double v_reset;  // 0 under a soft reset
  bool hard_reset;
  bool detach_reset;
  Surrogate surrogate;
  double alpha;
};

// Settings of the forward. The charge is divided by `tau`, or multiplied by `inv_tau` if given.
inline NeuronParams neuron_settings(Charge charge, double tau, std::optional<double> inv_tau,
                                    double v_threshold, std::optional<double> v_reset) {
  NeuronParams p{};
  p.charge = charge;
  p.v_threshold = v_threshold;
  p.v_reset = v_reset.value_or(0.0);
  p.hard_reset = v_reset.has_value();
  int exponent;
  // Where 1/tau is exact the product and the quotient are the same bits, and a product is faster.
  p.multiply = inv_tau || std::frexp(tau, &exponent) == 0.5;
  p.factor = inv_tau ? *inv_tau : p.multiply ? 1.0 / tau : tau;
  return p;
}

// Tokens keep their rank through time, so the rows of an image are columns, N * C at most, of which
// the first count(t, b) * C exist at timestep t. A dense [T, ...] tensor is one image of one token.
template <class S>
struct NeuronForward {
  const S* x;                     // [R, C]
  int64_t x_stride;               // between rows; not C only where an image has one token
  const arithmetic_t<S>* v_init;  // [B, N, C] in token order, or null: v_reset
  S* spikes;                      // [R, C]
  bool stream;                    // spikes pass the caches by; see can_stream
  arithmetic_t<S>* v_final;       // [B, N, C] in token order
  Layout layout;
  int64_t C;
};

template <class S>
struct NeuronBackward {
  const S* x;  // [R, C], rows `x_stride` apart
  int64_t x_stride;
  const arithmetic_t<S>* v_init;  // [B, N, C], or null: v_reset
  const S* grad_spikes;           // [R, C], rows `grad_stride` apart, or null: zero
  int64_t grad_stride;
  const arithmetic_t<S>* grad_v;  // [B, N, C], or null: zero
  S* grad_x;                      // [R, C]
  bool stream;                    // grad_x passes the caches by; see can_stream
  arithmetic_t<S>* grad_v_init;   // [B, N, C], or null: not wanted
  double* grad_factor;            // one partial sum a tile, or null: not wanted
  Layout layout;
  int64_t C;
};

// Columns of a forward or backward tile, the unit of work of a thread. They are constants, so the
// partial sums of `grad_factor`, and with them the result, do not depend on the number of threads.
constexpr int64_t neuron_forward_tile = 1024;
constexpr int64_t neuron_backward_tile = 512;
constexpr int64_t neuron_tiles(const Layout& layout, int64_t C, int64_t tile) {
  return layout.B * ((layout.N * C + tile - 1) / tile);
}
// Elements of arithmetic_t<S> a thread needs beside it in the backward: the potentials of a block
// of at most 64 columns, and one row of their gradients or, for `grad_factor`, all of them.
constexpr int64_t neuron_backward_scratch(int64_t T, bool factor) {
  return (T + (factor ? T : 1)) * 64;
}

// Whether [R, C] at `p` is worth writing past the caches (it is larger than what stays in them
// until it is read) and can be: every vector of a tile must be aligned.
template <class S>
bool can_stream(const S* p, int64_t R, int64_t C) {
  constexpr int64_t worth = 8 << 20, line = 64;
  return std::is_same<S, arithmetic_t<S>>::value && R * C * int64_t(sizeof(S)) >= worth &&
         reinterpret_cast<uintptr_t>(p) % line == 0 && C * int64_t(sizeof(S)) % line == 0;
}

#define ATSNN_DECLARE_NEURON(LEVEL)                                                             \
  namespace LEVEL {                                                                             \
  template <class S>                                                                            \
  void neuron_forward(const NeuronForward<S>&, const NeuronParams&, int64_t tile_begin,         \
                      int64_t tile_end);                                                        \
  template <class S>                                                                            \
  void neuron_backward(const NeuronBackward<S>&, const NeuronParams&, arithmetic_t<S>* scratch, \
                       int64_t tile_begin, int64_t tile_end);                                   \
  }
ATSNN_DECLARE_NEURON(portable)
ATSNN_DECLARE_NEURON(avx2)
ATSNN_DECLARE_NEURON(avx512)
#undef ATSNN_DECLARE_NEURON

}  // namespace atsnn
