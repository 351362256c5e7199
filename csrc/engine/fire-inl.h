// Neurons over the timesteps of columns. Included by per-level files.
#pragma once

#include "../cpu/neuron_step-inl.h"
#include "linear-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// Potentials after one step of `n` vectors of neurons; returns which fired.
template <Charge kind, bool multiply, bool hard, int n>
ATSNN_INLINE uint64_t step_neurons(vec<float>* v, const vec<float>* x, const Constants<float>& c) {
  constexpr int64_t width = Simd<float>::width;
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  // The comparison serves the word and the reset; words are put together without leaving the
  // mask registers.
  __mmask64 fires[n];
  for (int i = 0; i < n; ++i) {
    const vec<float> u = charge<kind, multiply>(v[i], x[i], c);
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(c.v_threshold), _CMP_GE_OQ);
    const __m512 rest = hard ? _mm512_set1_ps(c.v_reset) : (__m512)(u - c.v_threshold);
    v[i] = (vec<float>)_mm512_mask_mov_ps((__m512)u, some, rest);
    fires[i] = some;
  }
  if constexpr (n == 4) {
    return _mm512_kunpackd(_mm512_kunpackw(fires[3], fires[2]),
                           _mm512_kunpackw(fires[1], fires[0]));
  }
  uint64_t word = 0;
  for (int i = 0; i < n; ++i) word |= uint64_t(fires[i]) << (i * width);
  return word;
#else
  uint64_t word = 0;
  for (int i = 0; i < n; ++i) {
    const vec<float> u = charge<kind, multiply>(v[i], x[i], c);
    word |= uint64_t(fired(u, c.v_threshold)) << (i * width);
    v[i] = reset<hard>(u, c);
  }
  return word;
#endif
}

// Membranes of `n` vectors of neurons, `channels` of which exist.
template <int n>
ATSNN_INLINE void load_state(vec<float>* v, const float* state, int64_t channels, float at_rest) {
  constexpr int64_t width = Simd<float>::width;
  for (int i = 0; i < n; ++i) {
    const int64_t left = channels - i * width;
    if (!state || left <= 0) {
      v[i] = vec<float>{} + at_rest;
    } else {
      v[i] = left < width ? load_first(state + i * width, left) : load(state + i * width);
    }
  }
}

template <int n>
ATSNN_INLINE void store_state(const vec<float>* v, float* state, int64_t channels) {
  constexpr int64_t width = Simd<float>::width;
  for (int i = 0; state && i < n; ++i) {
    const int64_t left = channels - i * width;
    if (left <= 0) return;
    if (left < width) {
      store_first(state + i * width, v[i], left);
    } else {
      store(state + i * width, v[i]);
    }
  }
}

// Neurons of the vectors `part` .. `part` + n of a panel.
template <Charge kind, bool multiply, bool hard, int n>
int64_t fire_part(const Fire& a, const Constants<float>& settings, int part) {
  const Constants<float> c = settings;  // a copy, which the stores below cannot alias
  constexpr int64_t width = Simd<float>::width;
  const uint64_t valid = a.valid >> (part * width);
  const int64_t channels = std::min<int64_t>(count_bits(valid), n * width);
  int64_t spikes = 0;
  for (int64_t col = 0; col < a.columns; ++col) {
    float* const state = a.state ? a.state[col] + a.state_offset + part * width : nullptr;
    vec<float> v[n];
    load_state<n>(v, a.at_rest ? nullptr : state, channels, c.v_reset);
    for (int32_t step = a.first[col]; step < a.first[col + 1]; ++step) {
      const float* const from = a.acc + (a.still ? col : step) * panel + part * width;
      vec<float> x[n];
      for (int i = 0; i < n; ++i) x[i] = load(from + i * width);
      const uint64_t word = step_neurons<kind, multiply, hard, n>(v, x, c) & valid;
      uint64_t& out = a.spikes[int64_t(a.row[step]) * a.stride];
      out = part == 0 ? word : out | word << (part * width);
      spikes += count_bits(word);
    }
    store_state<n>(v, state, channels);
  }
  return spikes;
}

template <Charge kind, bool multiply, bool hard>
int64_t fire_columns(const Fire& a, const NeuronParams& p) {
  const Constants<float> c(p);
  int64_t spikes = 0;
  for (int part = 0; part < panel_vectors; part += together) {
    const int64_t left = count_bits(a.valid >> (part * Simd<float>::width));
    if (part > 0 && left == 0) break;
    // Narrow maps are a vector or two wide.
    if (left <= together / 4 * Simd<float>::width) {
      spikes += fire_part<kind, multiply, hard, together / 4>(a, c, part);
    } else if (left <= together / 2 * Simd<float>::width) {
      spikes += fire_part<kind, multiply, hard, together / 2>(a, c, part);
    } else {
      spikes += fire_part<kind, multiply, hard, together>(a, c, part);
    }
  }
  return spikes;
}

template <class F>
auto with_neuron(const NeuronParams& p, F f) {
  using std::bool_constant;
  const auto with_reset = [&](auto kind, auto multiply) {
    return p.hard_reset ? f(kind, multiply, bool_constant<true>{})
                        : f(kind, multiply, bool_constant<false>{});
  };
  const auto with_factor = [&](auto kind) {
    return p.multiply ? with_reset(kind, bool_constant<true>{})
                      : with_reset(kind, bool_constant<false>{});
  };
  switch (p.charge) {
    case Charge::integrate:
      return with_reset(std::integral_constant<Charge, Charge::integrate>{}, bool_constant<true>{});
    case Charge::decay:
      return with_factor(std::integral_constant<Charge, Charge::decay>{});
    default:
      return with_factor(std::integral_constant<Charge, Charge::no_decay>{});
  }
}

int64_t fire(const Fire& a, const NeuronParams& p) {
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    return fire_columns<kind.value, multiply.value, hard.value>(a, p);
  });
}

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
