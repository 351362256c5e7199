// The neuron kernels, written once and compiled for each instruction set (see simd-inl.h).

#include "simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

// ---- the formula, on one vector ---------------------------------------------------------------

template <class A>
struct Constants {
  A factor, v_threshold, v_reset, alpha;
  explicit Constants(const NeuronParams& p)
      : factor(static_cast<A>(p.factor)),
        v_threshold(static_cast<A>(p.v_threshold)),
        v_reset(static_cast<A>(p.v_reset)),
        alpha(static_cast<A>(p.alpha)) {}
};

template <Charge charge_kind, bool multiply, class A>
ATSNN_INLINE vec<A> charge(vec<A> v, vec<A> x, const Constants<A>& c) {
  if constexpr (charge_kind == Charge::integrate) return v + x;
  const vec<A> departure = v - c.v_reset;
  if constexpr (charge_kind == Charge::decay) {
    const vec<A> drive = x - departure;
    return v + (multiply ? drive * c.factor : drive / c.factor);
  } else {
    return (v - (multiply ? departure * c.factor : departure / c.factor)) + x;
  }
}

template <bool hard, class A>
ATSNN_INLINE vec<A> reset(vec<A> u, const Constants<A>& c) {
  const vec<A> at_rest = hard ? vec<A>{} + c.v_reset : u - c.v_threshold;
  return u >= c.v_threshold ? at_rest : u;
}

// Derivative of the surrogate at z = u - v_threshold.
template <Surrogate surrogate, class A>
ATSNN_INLINE vec<A> surrogate_derivative(vec<A> z, A alpha) {
  constexpr A pi = static_cast<A>(3.14159265358979323846);
  if constexpr (surrogate == Surrogate::sigmoid) {
    const vec<A> s = A(1) / (A(1) + exponential(-alpha * z));
    return (A(1) - s) * s * alpha;
  } else if constexpr (surrogate == Surrogate::atan) {
    const vec<A> y = (pi / 2 * alpha) * z;
    return (alpha / 2) / (A(1) + y * y);
  } else if constexpr (surrogate == Surrogate::piecewise_quadratic) {
    const vec<A> a = absolute<A>(z);
    return a > A(1) / alpha ? vec<A>{} : alpha - (alpha * alpha) * a;
  } else if constexpr (surrogate == Surrogate::piecewise_exp) {
    return (alpha / 2) * exponential(-alpha * absolute<A>(z));
  } else if constexpr (surrogate == Surrogate::soft_sign) {
    const vec<A> y = A(1) / alpha + absolute<A>(z);
    return A(1) / ((2 * alpha) * (y * y));
  } else if constexpr (surrogate == Surrogate::super_spike) {
    const vec<A> y = absolute<A>(z) + A(1);
    return alpha / (y * y);
  } else {
    const vec<A> y = alpha * z;
    return exponential(-(y * y)) * (alpha / static_cast<A>(1.77245385090551602730));
  }
}

// ---- tiles ------------------------------------------------------------------------------------

// Calls f(i, n) for every vector of a tile: n is the vector's width but for the last, short one.
template <class A, class F>
ATSNN_INLINE void each_vector(int64_t columns, F f) {
  constexpr int64_t width = Simd<A>::width;
  int64_t i = 0;
  for (; i + width <= columns; i += width) f(i, std::integral_constant<bool, true>{}, width);
  if (i < columns) f(i, std::integral_constant<bool, false>{}, columns - i);
}

template <class Full, class A>
ATSNN_INLINE vec<A> get(const A* p, Full, int64_t n) {
  if constexpr (Full::value) return load(p);
  return load_first(p, n);
}

template <class Full, class A>
ATSNN_INLINE void put(A* p, vec<A> v, Full, int64_t n) {
  if constexpr (Full::value) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// One row of a tile in arithmetic form: the row itself where storage is arithmetic, otherwise a
// widened copy of it in `room`.
template <class S>
ATSNN_INLINE const arithmetic_t<S>* widened(const S* row, arithmetic_t<S>* room, int64_t n) {
  if constexpr (std::is_same<S, arithmetic_t<S>>::value) {
    return row;
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = widen(row[i]);
    return room;
  }
}

template <class S>
ATSNN_INLINE arithmetic_t<S>* writable(S* row, arithmetic_t<S>* room) {
  if constexpr (std::is_same<S, arithmetic_t<S>>::value) {
    return row;
  } else {
    return room;
  }
}

template <class S>
ATSNN_INLINE void narrow_into(S* row, const arithmetic_t<S>* from, int64_t n) {
  if constexpr (!std::is_same<S, arithmetic_t<S>>::value) {
    for (int64_t i = 0; i < n; ++i) row[i] = narrow<S>(from[i]);
  }
}

template <class A>
ATSNN_INLINE void start_state(A* v, const A* v_init, A v_reset, int64_t n) {
  if (v_init) {
    std::memcpy(v, v_init, n * sizeof(A));
  } else {
    for (int64_t i = 0; i < n; ++i) v[i] = v_reset;
  }
}

template <Charge kind, bool multiply, bool hard, class S>
void forward_tile(const NeuronForward<S>& a, const Constants<arithmetic_t<S>>& c, int64_t begin,
                  int64_t n) {
  using A = arithmetic_t<S>;
  A wide[neuron_forward_tile], fired[neuron_forward_tile];
  // v_final is the membrane while the tile runs: it stays in the first-level cache.
  A* v = a.v_final + begin;
  start_state(v, a.v_init ? a.v_init + begin : nullptr, c.v_reset, n);
  for (int64_t t = 0; t < a.T; ++t) {
    const A* x = widened(a.x + t * a.x_stride + begin, wide, n);
    S* row = a.spikes + t * a.M + begin;
    A* s = writable(row, fired);
    each_vector<A>(n, [&](int64_t i, auto full, int64_t k) {
      const vec<A> u = charge<kind, multiply>(get(v + i, full, k), get(x + i, full, k), c);
      put(s + i, u >= c.v_threshold ? vec<A>{} + A(1) : vec<A>{}, full, k);
      put(v + i, reset<hard>(u, c), full, k);
    });
    narrow_into(row, s, n);
  }
}

// u[t] before the reset, for a whole tile: what the backward needs, made again from the input.
template <Charge kind, bool multiply, bool hard, class S>
void recompute_tile(const NeuronBackward<S>& a, const Constants<arithmetic_t<S>>& c,
                    int64_t begin, int64_t n, arithmetic_t<S>* u, int64_t pitch,
                    arithmetic_t<S>* wide, arithmetic_t<S>* v) {
  using A = arithmetic_t<S>;
  start_state(v, a.v_init ? a.v_init + begin : nullptr, c.v_reset, n);
  for (int64_t t = 0; t < a.T; ++t) {
    const A* x = widened(a.x + t * a.x_stride + begin, wide, n);
    A* row = u + t * pitch;
    each_vector<A>(n, [&](int64_t i, auto full, int64_t k) {
      const vec<A> charged = charge<kind, multiply>(get(v + i, full, k), get(x + i, full, k), c);
      put(row + i, charged, full, k);
      put(v + i, reset<hard>(charged, c), full, k);
    });
  }
}

template <Surrogate surrogate, bool hard, bool detach, class S>
void reverse_tile(const NeuronBackward<S>& a, const NeuronParams& p,
                  const Constants<arithmetic_t<S>>& c, int64_t begin, int64_t n,
                  const arithmetic_t<S>* u, int64_t pitch, arithmetic_t<S>* wide,
                  arithmetic_t<S>* wide_grad, arithmetic_t<S>* out, arithmetic_t<S>* grad_v,
                  double* grad_factor) {
  using A = arithmetic_t<S>;
  const A rate = p.multiply ? c.factor : A(1) / c.factor;  // 1/tau
  const A to_x = p.charge == Charge::decay ? rate : A(1);
  const A to_v = p.charge == Charge::integrate ? A(1) : A(1) - rate;
  if (a.grad_v) {
    std::memcpy(grad_v, a.grad_v + begin, n * sizeof(A));
  } else {
    std::fill(grad_v, grad_v + n, A(0));
  }
  for (int64_t t = a.T - 1; t >= 0; --t) {
    const A* potential = u + t * pitch;
    const A* grad_s =
        a.grad_spikes ? widened(a.grad_spikes + t * a.grad_stride + begin, wide_grad, n) : nullptr;
    S* row = a.grad_x + t * a.M + begin;
    A* grad_x = writable(row, out);
    const A* x = grad_factor ? widened(a.x + t * a.x_stride + begin, wide, n) : nullptr;
    each_vector<A>(n, [&](int64_t i, auto full, int64_t k) {
      const vec<A> ut = get(potential + i, full, k);
      const vec<A> slope = surrogate_derivative<surrogate>(ut - c.v_threshold, c.alpha);
      vec<A> through_reset = {};  // dv/du
      if constexpr (hard) {
        through_reset = ut >= c.v_threshold ? vec<A>{} : vec<A>{} + A(1);
        if constexpr (!detach) through_reset += (c.v_reset - ut) * slope;
      } else {
        through_reset += A(1);
        if constexpr (!detach) through_reset -= c.v_threshold * slope;
      }
      vec<A> grad_u = get(grad_v + i, full, k) * through_reset;
      if (grad_s) grad_u += get(grad_s + i, full, k) * slope;
      put(grad_x + i, grad_u * to_x, full, k);
      put(grad_v + i, grad_u * to_v, full, k);
      if (grad_factor) {
        // du/d(1/tau) = [decay: x] - (v - v_reset), v the membrane this step began with.
        vec<A> v;
        if (t > 0) {
          v = reset<hard>(get(potential - pitch + i, full, k), c);
        } else if (a.v_init) {
          v = get(a.v_init + begin + i, full, k);
        } else {
          v = vec<A>{} + c.v_reset;
        }
        vec<A> drive = c.v_reset - v;
        if (p.charge == Charge::decay) drive += get(x + i, full, k);
        const vec<A> term = grad_u * drive;
        for (int64_t j = 0; j < k; ++j) grad_factor[i + j] += static_cast<double>(term[j]);
      }
    });
    narrow_into(row, grad_x, n);
  }
}

// ---- from run-time settings to template arguments -----------------------------------------------

template <class F>
void with_charge(const NeuronParams& p, F f) {
  using std::integral_constant;
  const auto hard = [&](auto kind, auto multiply) {
    if (p.hard_reset) {
      f(kind, multiply, integral_constant<bool, true>{});
    } else {
      f(kind, multiply, integral_constant<bool, false>{});
    }
  };
  const auto factor = [&](auto kind) {
    if (p.multiply) {
      hard(kind, integral_constant<bool, true>{});
    } else {
      hard(kind, integral_constant<bool, false>{});
    }
  };
  switch (p.charge) {
    case Charge::integrate:
      return hard(integral_constant<Charge, Charge::integrate>{}, integral_constant<bool, true>{});
    case Charge::decay:
      return factor(integral_constant<Charge, Charge::decay>{});
    case Charge::no_decay:
      return factor(integral_constant<Charge, Charge::no_decay>{});
  }
}

template <class F>
void with_surrogate(const NeuronParams& p, F f) {
  using std::integral_constant;
  const auto detach = [&](auto surrogate, auto hard) {
    if (p.detach_reset) {
      f(surrogate, hard, integral_constant<bool, true>{});
    } else {
      f(surrogate, hard, integral_constant<bool, false>{});
    }
  };
  const auto reset = [&](auto surrogate) {
    if (p.hard_reset) {
      detach(surrogate, integral_constant<bool, true>{});
    } else {
      detach(surrogate, integral_constant<bool, false>{});
    }
  };
  switch (p.surrogate) {
#define ATSNN_CASE(NAME)   \
  case Surrogate::NAME:    \
    return reset(integral_constant<Surrogate, Surrogate::NAME>{});
    ATSNN_CASE(sigmoid)
    ATSNN_CASE(atan)
    ATSNN_CASE(piecewise_quadratic)
    ATSNN_CASE(piecewise_exp)
    ATSNN_CASE(soft_sign)
    ATSNN_CASE(super_spike)
    ATSNN_CASE(erf)
#undef ATSNN_CASE
  }
}

// ---- what neuron.h declares ----------------------------------------------------------------------

template <class S>
void neuron_forward(const NeuronForward<S>& a, const NeuronParams& p, int64_t tile_begin,
                    int64_t tile_end) {
  const Constants<arithmetic_t<S>> c(p);
  with_charge(p, [&](auto kind, auto multiply, auto hard) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t begin = tile * neuron_forward_tile;
      forward_tile<kind.value, multiply.value, hard.value>(
          a, c, begin, std::min(neuron_forward_tile, a.M - begin));
    }
  });
}

template <class S>
void neuron_backward(const NeuronBackward<S>& a, const NeuronParams& p, arithmetic_t<S>* scratch,
                     int64_t tile_begin, int64_t tile_end) {
  using A = arithmetic_t<S>;
  const Constants<A> c(p);
  const int64_t width = neuron_backward_tile(a.T);
  A* const u = scratch;
  A* const wide = u + a.T * width;
  A* const wide_grad = wide + width;
  A* const out = wide_grad + width;
  A* const grad_v = out + width;
  A* const v = grad_v + width;
  double by_column[1024];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t begin = tile * width;
    const int64_t n = std::min(width, a.M - begin);
    with_charge(p, [&](auto kind, auto multiply, auto hard) {
      recompute_tile<kind.value, multiply.value, hard.value>(a, c, begin, n, u, width, wide, v);
    });
    double* const factor = a.grad_factor ? by_column : nullptr;
    if (factor) std::fill(factor, factor + n, 0.0);
    with_surrogate(p, [&](auto surrogate, auto hard, auto detach) {
      reverse_tile<surrogate.value, hard.value, detach.value>(a, p, c, begin, n, u, width, wide,
                                                              wide_grad, out, grad_v, factor);
    });
    if (factor) a.grad_factor[tile] = std::accumulate(factor, factor + n, 0.0);
    if (a.grad_v_init) std::memcpy(a.grad_v_init + begin, grad_v, n * sizeof(A));
  }
}

#define ATSNN_INSTANTIATE(S)                                                                     \
  template void neuron_forward<S>(const NeuronForward<S>&, const NeuronParams&, int64_t, int64_t); \
  template void neuron_backward<S>(const NeuronBackward<S>&, const NeuronParams&,                \
                                   arithmetic_t<S>*, int64_t, int64_t);
ATSNN_INSTANTIATE(float)
ATSNN_INSTANTIATE(double)
ATSNN_INSTANTIATE(bfloat16)
ATSNN_INSTANTIATE(float16)
#undef ATSNN_INSTANTIATE

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
