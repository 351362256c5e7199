// One timestep of a spiking neuron, on one vector (see neuron.h). Included by per-level files.
#pragma once

#include "simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

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

// Bit i is set where element i of `u` reaches the threshold.
ATSNN_INLINE uint32_t fired(vec<float> u, float v_threshold) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(v_threshold), _CMP_GE_OQ);
#else
  return signs(u >= v_threshold);
#endif
}

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
