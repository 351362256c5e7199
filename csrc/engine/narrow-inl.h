// Convolutions of narrow maps with their neurons, pixel by pixel. Included by per-level files.
#pragma once

#include "fire-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// Of `n` vectors of outputs.
template <Charge kind, bool multiply, bool hard, int n>
NarrowCounts narrow_of(const NarrowConv& a, const Constants<float>& settings) {
  const Constants<float> c = settings;
  constexpr int64_t width = Simd<float>::width;
  const int64_t taps = a.window.taps(), channels = a.channels;
  const int64_t outputs = count_bits(a.valid);
  const int64_t together_taps = word_bits / channels;  // in a word
  vec<float> bias[n];
  for (int i = 0; i < n; ++i) bias[i] = load(a.bias + i * width);
  NarrowCounts counts{};
  const auto run = [&](int64_t pixel, const Taps& at) {
    float* const state = a.state ? a.state + pixel * outputs : nullptr;
    vec<float> v[n];
    load_state<n>(v, state, outputs, c.v_reset);
    for (int64_t t = 0; t < a.T; ++t) {
      const uint64_t* const frame = a.bits + t * a.step;
      if (at.centre >= 0) counts.input += count_bits(frame[at.centre]);
      vec<float> sum[n];
      for (int i = 0; i < n; ++i) sum[i] = bias[i];
      for (int64_t tap = 0; tap < taps;) {
        // Bits of pixels side by side are inputs in their order.
        const float* const weight = a.weight + tap * channels * panel;
        const int64_t end = std::min(tap + together_taps, taps);
        uint64_t word = 0;
        for (int64_t shift = 0; tap < end; ++tap, shift += channels) {
          if (at[tap] >= 0) word |= frame[at[tap]] << shift;
        }
        each_bit(word, [&](int64_t bit) {
          for (int i = 0; i < n; ++i) sum[i] += load(weight + bit * panel + i * width);
        });
      }
      const uint64_t fires = step_neurons<kind, multiply, hard, n>(v, sum, c) & a.valid;
      a.out[t * a.out_step + pixel] = fires;
      counts.spikes += count_bits(fires);
    }
    store_state<n>(v, state, outputs);
  };
  each_window(a.window, a.height, a.width, a.strip, 0, run);
  return counts;
}

NarrowCounts conv_narrow(const NarrowConv& a, const NeuronParams& p) {
  constexpr int64_t width = Simd<float>::width;
  const int64_t outputs = count_bits(a.valid);
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    constexpr Charge charge = kind.value;
    constexpr bool times = multiply.value, to_reset = hard.value;
    const Constants<float> c(p);
    constexpr int n = panel_vectors;
    if (outputs <= n / 4 * width) return narrow_of<charge, times, to_reset, n / 4>(a, c);
    if (outputs <= n / 2 * width) return narrow_of<charge, times, to_reset, n / 2>(a, c);
    return narrow_of<charge, times, to_reset, n>(a, c);
  });
}

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
