// The neuron kernels, written once and compiled for each instruction set (see simd-inl.h).

#include "neuron_step-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

// Derivative of the surrogate at z = u - v_threshold.
template <Surrogate surrogate, class A>
ATSNN_INLINE vec<A> surrogate_derivative(vec<A> z, A alpha) {
  constexpr A pi = static_cast<A>(3.14159265358979323846);
  const A decay = static_cast<A>(-log2_e) * alpha;  // exp(-alpha a) = 2^(decay a)
  if constexpr (surrogate == Surrogate::sigmoid) {
    // s (1 - s) = e / (1 + e)^2 with e = exp(-|alpha z|), which cannot overflow.
    const vec<A> e = exp2_of_negative(decay * absolute<A>(z));
    return (alpha * e) / ((A(1) + e) * (A(1) + e));
  } else if constexpr (surrogate == Surrogate::atan) {
    const vec<A> y = (pi / 2 * alpha) * z;
    return (alpha / 2) / (A(1) + y * y);
  } else if constexpr (surrogate == Surrogate::piecewise_quadratic) {
    const vec<A> a = absolute<A>(z);
    return a > A(1) / alpha ? vec<A>{} : alpha - (alpha * alpha) * a;
  } else if constexpr (surrogate == Surrogate::piecewise_exp) {
    return (alpha / 2) * exp2_of_negative(decay * absolute<A>(z));
  } else if constexpr (surrogate == Surrogate::soft_sign) {
    const vec<A> y = A(1) / alpha + absolute<A>(z);
    return A(1) / ((2 * alpha) * (y * y));
  } else if constexpr (surrogate == Surrogate::super_spike) {
    const vec<A> y = absolute<A>(z) + A(1);
    return alpha / (y * y);
  } else {
    const vec<A> y = alpha * z;
    return exp2_of_negative(static_cast<A>(-log2_e) * (y * y)) *
           (alpha / static_cast<A>(1.77245385090551602730));
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

// Asks for a row of a tile before it is needed: the hardware does not see that tile after tile
// steps through T distant streams. Nothing is accessed, so the address may lie past the end.
template <class S>
ATSNN_INLINE void fetch_ahead(const S* row, int64_t n) {
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(S)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
  }
}

// A stretch of the columns of one image, which are its tokens in rank order.
struct Span {
  int64_t image, begin, columns;
};

// How many of the columns exist at timestep t.
ATSNN_INLINE int64_t active_columns(const Layout& layout, int64_t C, Span s, int64_t t) {
  return std::clamp<int64_t>(layout.count(t, s.image) * C - s.begin, 0, s.columns);
}

// Calls f(i, at, n) for every piece of a span that is contiguous in a [B, N, C] state in token
// order: n columns, from column i of the span, from element `at` of the state.
template <class F>
ATSNN_INLINE void each_piece(const Layout& layout, int64_t C, Span s, F f) {
  const int64_t first = s.image * layout.N * C;
  if (!layout.token) return f(0, first + s.begin, s.columns);
  for (int64_t i = 0; i < s.columns;) {
    const int64_t rank = (s.begin + i) / C, channel = (s.begin + i) % C;
    const int64_t n = std::min(s.columns - i, C - channel);
    f(i, first + layout.token_at(s.image, rank) * C + channel, n);
    i += n;
  }
}

template <class A>
ATSNN_INLINE void gather_state(A* v, const A* state, A otherwise, const Layout& layout, int64_t C,
                               Span s) {
  if (!state) return std::fill(v, v + s.columns, otherwise);
  each_piece(layout, C, s, [&](int64_t i, int64_t at, int64_t n) {
    std::memcpy(v + i, state + at, n * sizeof(A));
  });
}

template <class A>
ATSNN_INLINE void scatter_state(A* state, const A* v, const Layout& layout, int64_t C, Span s) {
  each_piece(layout, C, s, [&](int64_t i, int64_t at, int64_t n) {
    std::memcpy(state + at, v + i, n * sizeof(A));
  });
}

template <Charge kind, bool multiply, bool hard, bool streams, class S>
void forward_tile(const NeuronForward<S>& a, const Constants<arithmetic_t<S>>& settings, Span s) {
  using A = arithmetic_t<S>;
  const Constants<A> c = settings;  // a copy, which the stores below cannot alias
  A wide[neuron_forward_tile], fired[neuron_forward_tile], state[neuron_forward_tile];
  // Where the columns lie as the state does, the membrane is kept in the result itself.
  A* const v = a.layout.token ? state : a.v_final + s.image * a.layout.N * a.C + s.begin;
  gather_state(v, a.v_init, c.v_reset, a.layout, a.C, s);
  for (int64_t t = 0; t < a.layout.T; ++t) {
    const int64_t n = active_columns(a.layout, a.C, s, t);
    if (n == 0) break;
    const int64_t row = a.layout.start(t, s.image);
    const S* in = a.x + row * a.x_stride + s.begin;
    const A* x = widened(in, wide, n);
    S* out = a.spikes + row * a.C + s.begin;
    A* spikes = writable(out, fired);
    each_vector<A>(n, [&](int64_t i, auto full, int64_t k) {
      const vec<A> u = charge<kind, multiply>(get(v + i, full, k), get(x + i, full, k), c);
      const vec<A> fire = u >= c.v_threshold ? vec<A>{} + A(1) : vec<A>{};
      if constexpr (streams && full.value) {
        stream(spikes + i, fire);
      } else {
        put(spikes + i, fire, full, k);
      }
      put(v + i, reset<hard>(u, c), full, k);
    });
    narrow_into(out, spikes, n);
  }
  if (a.layout.token) scatter_state(a.v_final, v, a.layout, a.C, s);
}

// The backward goes over the columns in blocks of a few vectors, so that what travels through time
// (v on the way up, its gradient on the way down) stays in registers.
constexpr int block_vectors = 4;
template <class A>
constexpr int64_t block_width = block_vectors * Simd<A>::width;

// Whether all columns of a block exist at all its timesteps, and how its result is stored.
enum class Columns { some, all, all_streamed };

// One block of columns and the number of timesteps at which any of them exist.
struct Block : Span {
  int64_t steps;
};

template <bool full, class A>
ATSNN_INLINE vec<A> get_at(const A* row, int k, int64_t columns) {
  constexpr int64_t width = Simd<A>::width;
  if constexpr (full) return load(row + k * width);
  const int64_t left = columns - k * width;
  return left <= 0 ? vec<A>{} : load_first(row + k * width, std::min(left, width));
}

template <bool full, class A>
ATSNN_INLINE void put_at(A* row, int k, int64_t columns, vec<A> v) {
  constexpr int64_t width = Simd<A>::width;
  if constexpr (full) return store(row + k * width, v);
  const int64_t left = columns - k * width;
  if (left > 0) store_first(row + k * width, v, std::min(left, width));
}

// `v` with the columns that exist taken from `changed`.
template <bool full, class A>
ATSNN_INLINE vec<A> replaced(vec<A> v, vec<A> changed, int k, int64_t columns) {
  if constexpr (full) return changed;
  const int64_t left = columns - k * Simd<A>::width;
  if (left > 0) std::memcpy(&v, &changed, std::min<int64_t>(left, Simd<A>::width) * sizeof(A));
  return v;
}

#define ATSNN_EACH_VECTOR(k) _Pragma("GCC unroll 4") for (int k = 0; k < block_vectors; ++k)

// u[t] before the reset: what the backward needs, made again from the input.
template <Charge kind, bool multiply, bool hard, bool full, class S>
ATSNN_NOINLINE void recompute_block(const NeuronBackward<S>& a,
                                    const Constants<arithmetic_t<S>>& settings, Block b,
                                    arithmetic_t<S>* u) {
  using A = arithmetic_t<S>;
  const Constants<A> c = settings;  // a copy, which the stores below cannot alias
  constexpr int64_t width = Simd<A>::width;
  A wide[block_width<A>], start[block_width<A>];
  gather_state(start, a.v_init, c.v_reset, a.layout, a.C, b);
  vec<A> v[block_vectors];
  ATSNN_EACH_VECTOR(k) { v[k] = get_at<full>(start, k, b.columns); }
  for (int64_t t = 0; t < b.steps; ++t) {
    const int64_t row = a.layout.start(t, b.image);
    const int64_t columns = full ? block_width<A> : active_columns(a.layout, a.C, b, t);
    const S* in = a.x + row * a.x_stride + b.begin;
    const A* x = widened(in, wide, columns);
    A* charged = u + t * block_width<A>;
    fetch_ahead(in + block_width<A>, block_width<A>);
    if (a.grad_spikes) {
      fetch_ahead(a.grad_spikes + row * a.grad_stride + b.begin + block_width<A>, block_width<A>);
    }
    ATSNN_EACH_VECTOR(k) {
      const vec<A> ut = charge<kind, multiply>(v[k], get_at<full>(x, k, columns), c);
      store(charged + k * width, ut);
      v[k] = reset<hard>(ut, c);
    }
  }
}

// `grad_u` keeps the gradient of each potential, rows `keep` apart: 0 where nobody wants it, so
// that the loop has no branch and the compiler can interleave the vectors of a block.
template <Surrogate surrogate, bool hard, bool detach, Columns columns, class S>
ATSNN_NOINLINE void reverse_block(const NeuronBackward<S>& a, const NeuronParams& p,
                                  const Constants<arithmetic_t<S>>& settings, Block b,
                                  const arithmetic_t<S>* u, arithmetic_t<S>* grad_u, int64_t keep) {
  using A = arithmetic_t<S>;
  const Constants<A> c = settings;  // a copy, which the stores below cannot alias
  constexpr int64_t width = Simd<A>::width;
  constexpr bool full = columns != Columns::some;
  const A rate = p.multiply ? c.factor : A(1) / c.factor;  // 1/tau
  const A to_x = p.charge == Charge::decay ? rate : A(1);
  const A to_v = p.charge == Charge::integrate ? A(1) : A(1) - rate;
  A wide_grad[block_width<A>] = {}, out[block_width<A>], state[block_width<A>];
  gather_state(state, a.grad_v, A(0), a.layout, a.C, b);
  vec<A> grad_v[block_vectors];
  ATSNN_EACH_VECTOR(k) { grad_v[k] = get_at<full>(state, k, b.columns); }
  for (int64_t t = b.steps - 1; t >= 0; --t) {
    const int64_t first = a.layout.start(t, b.image);
    const int64_t existing = full ? block_width<A> : active_columns(a.layout, a.C, b, t);
    const A* potential = u + t * block_width<A>;
    const A* grad_s = a.grad_spikes ? widened(a.grad_spikes + first * a.grad_stride + b.begin,
                                              wide_grad, existing)
                                    : wide_grad;
    S* row = a.grad_x + first * a.C + b.begin;
    A* grad_x = writable(row, out);
    A* kept = grad_u + t * keep;
    vec<A> grad[block_vectors];
    ATSNN_EACH_VECTOR(k) {
      const vec<A> ut = load(potential + k * width);
      const vec<A> slope = surrogate_derivative<surrogate>(ut - c.v_threshold, c.alpha);
      if constexpr (hard) {
        grad[k] = ut >= c.v_threshold ? vec<A>{} : grad_v[k];
        if constexpr (!detach) grad[k] += grad_v[k] * ((c.v_reset - ut) * slope);
      } else {
        grad[k] = grad_v[k];
        if constexpr (!detach) grad[k] -= grad_v[k] * (c.v_threshold * slope);
      }
      grad[k] += get_at<full>(grad_s, k, existing) * slope;
      // A column that does not exist yet on the way down keeps the gradient of its final state.
      grad_v[k] = replaced<full, A>(grad_v[k], grad[k] * to_v, k, existing);
    }
    ATSNN_EACH_VECTOR(k) {
      if constexpr (columns == Columns::all_streamed) {
        stream(grad_x + k * width, grad[k] * to_x);
      } else {
        put_at<full>(grad_x, k, existing, grad[k] * to_x);
      }
      store(kept + k * width, grad[k]);
    }
    narrow_into(row, grad_x, existing);
  }
  if (a.grad_v_init) {
    ATSNN_EACH_VECTOR(k) { put_at<full>(state, k, b.columns, grad_v[k]); }
    scatter_state(a.grad_v_init, state, a.layout, a.C, b);
  }
}

// Adds grad_u * du/d(1/tau) to each column's sum: du/d(1/tau) = [decay: x] - (v - v_reset), v being
// the membrane a step began with.
template <class S>
ATSNN_NOINLINE void factor_block(const NeuronBackward<S>& a, const NeuronParams& p,
                                 const Constants<arithmetic_t<S>>& c, Block b,
                                 const arithmetic_t<S>* u, const arithmetic_t<S>* grad_u,
                                 double* sums) {
  using A = arithmetic_t<S>;
  A start[block_width<A>];
  gather_state(start, a.v_init, c.v_reset, a.layout, a.C, b);
  for (int64_t i = 0; i < b.columns; ++i) {
    A v = start[i];
    for (int64_t t = 0; t < b.steps && i < active_columns(a.layout, a.C, b, t); ++t) {
      A drive = c.v_reset - v;
      if (p.charge == Charge::decay) {
        drive += widen(a.x[a.layout.start(t, b.image) * a.x_stride + b.begin + i]);
      }
      sums[i] += static_cast<double>(grad_u[t * block_width<A> + i] * drive);
      const A potential = u[t * block_width<A> + i];
      v = potential < c.v_threshold ? potential
          : p.hard_reset            ? c.v_reset
                                    : potential - c.v_threshold;
    }
  }
}
#undef ATSNN_EACH_VECTOR

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
#define ATSNN_CASE(NAME) \
  case Surrogate::NAME:  \
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

// ---- what neuron.h declares
// ----------------------------------------------------------------------

// The columns of a tile.
inline Span tile_span(const Layout& layout, int64_t C, int64_t width, int64_t tile) {
  const int64_t columns = layout.N * C, tiles = (columns + width - 1) / width;
  const int64_t begin = tile % tiles * width;
  return {tile / tiles, begin, std::min(width, columns - begin)};
}

template <class S>
void neuron_forward(const NeuronForward<S>& a, const NeuronParams& p, int64_t tile_begin,
                    int64_t tile_end) {
  const Constants<arithmetic_t<S>> c(p);
  with_charge(p, [&](auto kind, auto multiply, auto hard) {
    auto* const run = a.stream ? forward_tile<kind.value, multiply.value, hard.value, true, S>
                               : forward_tile<kind.value, multiply.value, hard.value, false, S>;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      run(a, c, tile_span(a.layout, a.C, neuron_forward_tile, tile));
    }
  });
  if (a.stream) finish_stream();
}

// The block of a tile that begins at its column `i`.
template <class A>
Block block_of(const Layout& layout, int64_t C, Span tile, int64_t i) {
  const Span s{tile.image, tile.begin + i, std::min(block_width<A>, tile.columns - i)};
  int64_t steps = 0;
  while (steps < layout.T && active_columns(layout, C, s, steps) > 0) ++steps;
  return {s, steps};
}

template <class S>
void neuron_backward(const NeuronBackward<S>& a, const NeuronParams& p, arithmetic_t<S>* scratch,
                     int64_t tile_begin, int64_t tile_end) {
  using A = arithmetic_t<S>;
  const Constants<A> c(p);
  double by_column[neuron_backward_tile];
  double* const factor = a.grad_factor ? by_column : nullptr;
  // The two passes are chosen apart: as pairs there would be fourteen times as many kernels.
  decltype(&recompute_block<Charge::decay, true, true, true, S>) recompute, recompute_some;
  with_charge(p, [&](auto kind, auto multiply, auto hard) {
    recompute = recompute_block<kind.value, multiply.value, hard.value, true, S>;
    recompute_some = recompute_block<kind.value, multiply.value, hard.value, false, S>;
  });
  decltype(&reverse_block<Surrogate::sigmoid, true, true, Columns::all, S>) reverse, reverse_some;
  with_surrogate(p, [&](auto surrogate, auto hard, auto detach) {
    constexpr Surrogate kind = surrogate.value;
    reverse = a.stream ? reverse_block<kind, hard.value, detach.value, Columns::all_streamed, S>
                       : reverse_block<kind, hard.value, detach.value, Columns::all, S>;
    reverse_some = reverse_block<kind, hard.value, detach.value, Columns::some, S>;
  });
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const Span span = tile_span(a.layout, a.C, neuron_backward_tile, tile);
    std::fill(by_column, by_column + span.columns, 0.0);
    for (int64_t i = 0; i < span.columns; i += block_width<A>) {
      const Block b = block_of<A>(a.layout, a.C, span, i);
      // Fewer and fewer columns exist, so the last timestep tells of all.
      const bool full =
          b.columns == block_width<A> &&
          (b.steps == 0 || active_columns(a.layout, a.C, b, b.steps - 1) == block_width<A>);
      (full ? recompute : recompute_some)(a, c, b, scratch);
      A* const grad_u = scratch + a.layout.T * block_width<A>;
      (full ? reverse : reverse_some)(a, p, c, b, scratch, grad_u, factor ? block_width<A> : 0);
      if (factor) factor_block(a, p, c, b, scratch, grad_u, factor + i);
    }
    if (factor) {
      a.grad_factor[tile] = std::accumulate(factor, factor + span.columns, 0.0);
    }
  }
  if (a.stream) finish_stream();
}

#define ATSNN_INSTANTIATE(S)                                                                       \
  template void neuron_forward<S>(const NeuronForward<S>&, const NeuronParams&, int64_t, int64_t); \
  template void neuron_backward<S>(const NeuronBackward<S>&, const NeuronParams&,                  \
                                   arithmetic_t<S>*, int64_t, int64_t);
ATSNN_INSTANTIATE(float)
ATSNN_INSTANTIATE(double)
ATSNN_INSTANTIATE(bfloat16)
ATSNN_INSTANTIATE(float16)
#undef ATSNN_INSTANTIATE

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
