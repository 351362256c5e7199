// Convolutions of bits, pooling, neurons.
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
  uint64_t* out;                    // rows of words(outputs)
  float* state;                     // [B, pixels, outputs], read and written; null: at rest
  Window window = {};               // of at most `most_taps`
  const uint8_t* counts = nullptr;  // rows of channels instead of bits: how often each fired
  float* sums = nullptr;  // [T, B, outputs, pixels]: the sums themselves, neither pooled nor fired
  // [B, pixels of neurons]: 1 for those to run, at every timestep; null: all. Others do not fire,
  // their state stays, and of the input only what the wanted ones read is looked at.
  const uint8_t* wanted = nullptr;
  bool at_rest = false;  // neurons begin at rest, and `state` is written only
};

constexpr int64_t halved(int64_t size) { return (size + 1) / 2; }

Counted run_conv_lif(const ConvLif& a, const Kernels& k, std::vector<ChunkScratch>& scratch);

// out = the OR of bits over a window, for `maps` maps; nothing where a pixel is not wanted.
void pool_bits(const uint64_t* bits, int64_t maps, int64_t height, int64_t width, int64_t stride,
               const Window& window, uint64_t* out, int threads, const uint8_t* wanted = nullptr);
constexpr Window halving = {3, 3, 2, 2, 1, 1};

// Marks, with 1, which pixels of a map [height, width] the pixels behind a window read whose
// `wanted` is 1; `row`: `width` bytes of scratch.
void mark_read(const uint8_t* wanted, const Window& window, int64_t height, int64_t width,
               uint8_t* read, uint8_t* row);

}  // namespace atsnn
