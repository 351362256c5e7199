// Spikformer's stem in bits: 3x3 convolutions (stride 1, padding 1), pooling, neurons.
#pragma once

#include <vector>

#include "linear.h"

namespace atsnn {

// A convolution, then neurons. Maps are rows of pixels in the order (t, b, y, x).
struct ConvLif {
  const float* images;   // [T_in, B, channels, height, width], or null: `bits`
  const uint64_t* bits;  // rows of words(channels)
  int64_t channels, T, B, height, width;
  bool still;               // `images` is one timestep that is shown T times
  bool pool;                // sums are pooled (max, 3x3, stride 2, padding 1) before the neurons
  const PackedLinear* map;  // inputs (ky, kx, channel)
  NeuronParams neuron;
  uint64_t* out;  // rows of words(outputs)
  float* state;   // [B, pixels, outputs], read and written; null: at rest
};

constexpr int64_t halved(int64_t size) { return (size + 1) / 2; }

Counted run_conv_lif(const ConvLif& a, const Kernels& k, std::vector<ChunkScratch>& scratch);

// out = the OR of bits over 3x3, stride 2, padding 1, for `maps` maps.
void pool_bits(const uint64_t* bits, int64_t maps, int64_t height, int64_t width, int64_t stride,
               uint64_t* out, int threads);

}  // namespace atsnn
