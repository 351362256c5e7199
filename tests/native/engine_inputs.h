// What the tests of the engine are made of: spikes as bits, maps, neurons, networks, and the plain
// loops that results are compared with.
#pragma once

#include <memory>

#include "../../csrc/engine/engine.h"
#include "inputs.h"

namespace atsnn {

// One random case of each kind, checked at every level: the tests run the first ones, the fuzzer
// as many as time allows.
void check_lists(uint64_t seed);
void check_add_rows(uint64_t seed);
void check_add_groups(uint64_t seed);
void check_fire(uint64_t seed);
void check_attention(uint64_t seed);
void check_spike_driven_attention(uint64_t seed);
void check_linear(uint64_t seed);
void check_conv(uint64_t seed);
void check_network(uint64_t seed);

const Kernels& kernels_of(Level level);

// Calls f(kernels) for every level, after telling what is tested.
template <class F>
void each_kernels(const std::string& name, uint64_t seed, const std::string& more, F f) {
  for (Level level : levels()) {
    describe(name + ", seed " + std::to_string(seed) + ", " + level_name(level) + ", " + more);
    f(kernels_of(level));
  }
}

double random_rate(Random& random);
// Rows of spikes; words from `words(channels)` to `stride` keep what fresh memory holds.
Array<uint64_t> random_bits(Random& random, int64_t rows, int64_t channels, double rate,
                            int64_t stride);
inline bool bit_at(const Array<uint64_t>& bits, int64_t stride, int64_t row, int64_t c) {
  return bits[row * stride + c / word_bits] >> (c % word_bits) & 1;
}
inline void set_bit(std::vector<uint64_t>& bits, int64_t stride, int64_t row, int64_t c) {
  bits[row * stride + c / word_bits] |= uint64_t(1) << (c % word_bits);
}
int64_t ones(const std::vector<uint64_t>& bits);

NeuronParams random_neuron(Random& random);
// One timestep of a neuron: whether it fires.
bool neuron_step(const NeuronParams& p, float x, float& v);
// Membranes, none where `given` is false.
Array<float> random_state(Random& random, bool given, int64_t n);

// Sums of small multiples of 2^-5 are exact; others have only the result of the order they have.
float random_weight(Random& random, bool exact);

// A linear map, as it is and as the engine packs it.
struct Map {
  int64_t outputs, inputs;
  std::vector<float> weight, bias;  // [inputs, outputs], [outputs]
  PackedLinear packed;

  Map(Random& random, int64_t outputs, int64_t inputs);
  // Adds what input i contributes to the sums of a row that started from the bias.
  void add(int64_t i, float x, float* sums) const {
    const float* w = weight.data() + i * outputs;
    for (int64_t o = 0; x != 0 && o < outputs; ++o) sums[o] += x * w[o];
  }
  // Adds groups of four inputs, each summed up first.
  template <class IsSet>
  void add_groups(IsSet is_set, float* sums) const {
    for (int64_t first = 0; first < inputs; first += group_inputs) {
      std::vector<float> group(outputs);
      for (int64_t i = first; i < std::min(first + group_inputs, inputs); ++i) {
        if (is_set(i)) add(i, 1, group.data());
      }
      for (int64_t o = 0; o < outputs; ++o) sums[o] += group[o];
    }
  }
};

NetworkConfig random_config(Random& random);
Network random_network(Random& random, const NetworkConfig& config);
std::string shown(const NetworkConfig& config);

// The part of a layout that is timestep t, whose rows begin at row `first` of the whole.
struct OneStep {
  Array<int64_t> offsets;
  Layout layout;
  int64_t first;
  OneStep(const Layout& all, int64_t t);
};

}  // namespace atsnn
