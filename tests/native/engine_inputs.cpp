#include "engine_inputs.h"

#include <algorithm>
#include <cmath>

namespace atsnn {

const Kernels& kernels_of(Level level) {
#if defined(__x86_64__)
  if (level == Level::avx512) return avx512_kernels;
  if (level == Level::avx2) return avx2_kernels;
#endif
  return portable_kernels;
}

double random_rate(Random& random) { return random.pick({0.0, 0.02, 0.1, 0.3, 1.0}); }

Array<uint64_t> random_bits(Random& random, int64_t rows, int64_t channels, double rate,
                            int64_t stride) {
  Array<uint64_t> bits(rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill_n(bits.data() + r * stride, words(channels), uint64_t(0));
    for (int64_t c = 0; c < channels; ++c) {
      bits[r * stride + c / word_bits] |= uint64_t(random.chance(rate)) << (c % word_bits);
    }
  }
  return bits;
}

int64_t ones(const std::vector<uint64_t>& bits) {
  int64_t n = 0;
  for (uint64_t word : bits) n += count_bits(word);
  return n;
}

NeuronParams random_neuron(Random& random) {
  const auto charge = random.pick({Charge::integrate, Charge::decay, Charge::no_decay});
  const double tau = random.pick({2.0, 1.5, 3.0});
  const bool hard = random.chance(0.5);
  NeuronParams p =
      neuron_settings(charge, tau, std::nullopt, random.pick({1.0, 0.5, 0.7}),
                      hard ? std::optional(random.pick({0.0, -0.25, 0.1})) : std::nullopt);
  p.multiply = random.chance(0.5);
  p.factor = p.multiply ? 1 / tau : tau;
  return p;
}

bool neuron_step(const NeuronParams& p, float x, float& v) {
  const float factor = p.factor, rest = p.v_reset, threshold = p.v_threshold;
  const auto leak = [&](float u) { return p.multiply ? u * factor : u / factor; };
  float u = v + x;
  if (p.charge == Charge::decay) u = v + leak(x - (v - rest));
  if (p.charge == Charge::no_decay) u = v - leak(v - rest) + x;
  const bool fires = u >= threshold;
  v = !fires ? u : p.hard_reset ? rest : u - threshold;
  return fires;
}

Array<float> random_state(Random& random, bool given, int64_t n) {
  Array<float> state(given ? n : 0);
  for (int64_t i = 0; i < state.size(); ++i) state[i] = random.between(-16, 16) * 0x1p-4f;
  return state;
}

float random_weight(Random& random, bool exact) {
  return exact ? random.between(-16, 16) * 0x1p-5f : float(random.uniform(-0.5, 0.5));
}

Map::Map(Random& random, int64_t outputs_, int64_t inputs_)
    : outputs(outputs_), inputs(inputs_), weight(outputs * inputs), bias(outputs) {
  const bool exact = random.chance(0.5), with_bias = random.chance(0.7);
  std::vector<float> by_output(outputs * inputs);
  for (int64_t i = 0; i < outputs * inputs; ++i) {
    weight[i] = random_weight(random, exact);
    by_output[i % outputs * inputs + i / outputs] = weight[i];
  }
  for (float& x : bias) x = with_bias ? random_weight(random, exact) : 0;
  packed = {by_output.data(), with_bias ? bias.data() : nullptr, outputs, inputs};
}

OneStep::OneStep(const Layout& all, int64_t t)
    : offsets(all.B + 1),
      layout{1, all.B, all.N, offsets.data(), all.token},
      first(all.offsets[t * all.B]) {
  for (int64_t b = 0; b <= all.B; ++b) offsets[b] = all.offsets[t * all.B + b] - first;
}

// ---- networks

NetworkConfig random_config(Random& random) {
  NetworkConfig c{};
  const int64_t d = random.pick<int64_t>({1, 3, 4, 8, 12, 16, 40, 65});
  c.num_heads = random.pick<int64_t>({1, 2, 3, 5});
  c.embed_dim = d * c.num_heads;
  c.hidden = random.pick<int64_t>({1, 30, 64, 2 * c.embed_dim, 4 * c.embed_dim});
  c.depth = random.between(1, 4);
  c.T = random.between(1, 4);
  c.in_channels = random.between(1, 3);
  c.outputs = random.between(1, 10);
  c.pooled = random.pick<std::array<bool, 4>>(
      {{}, {false, false, true, true}, {true, false, false, true}, {true, true, true, true}});
  const int64_t halvings = std::count(c.pooled.begin(), c.pooled.end(), true);
  c.image_size = random.between(1, halvings == 4 ? 2 : 4) << halvings;
  c.image_size -= random.between(0, (1 << halvings) - 1);
  if (random.chance(0.06)) {  // so many tokens that images, in streams too, go in several groups
    c.pooled = {};
    c.image_size = 24;
    c.embed_dim = random.pick<int64_t>({5, 8}) * c.num_heads;
    c.hidden = 30;
    c.depth = std::min<int64_t>(c.depth, 2);
    c.T = 4;
  }
  c.pool_spikes = random.chance(0.5);
  c.spike_driven = random.chance(0.3);
  c.attn_scale = random.pick({0.125, 0.25, 0.3});
  c.halting = random.pick({Accumulator::none, Accumulator::rectangle, Accumulator::rectangle,
                           Accumulator::depth, Accumulator::depth, Accumulator::sequential,
                           Accumulator::sequential});
  c.mean_field = random.chance(0.6);
  c.pixels = random.chance(0.3);
  c.score = random.pick({Score::first, Score::mean, Score::linear, Score::constant});
  c.eps = random.pick({0.01, 0.1, 0.5});
  c.merge_r.assign(c.depth - 1, 0);
  if (c.halting != Accumulator::sequential && random.chance(0.5)) {
    c.merge_sizes = random.chance(0.5);
    if (random.chance(0.5)) {
      c.merge_threshold = random.pick({-1.0, 0.1, 0.5, 0.9});
      c.merging = true;
    }
    for (int64_t& r : c.merge_r) {
      if (!c.merge_threshold) r = random.between(0, 5);
      c.merging |= r > 0;
    }
  }
  return c;
}

Network random_network(Random& random, const NetworkConfig& c) {
  Network net;
  net.config = c;
  // Weights of a size at which some neurons fire and some do not.
  const auto map = [&](int64_t outputs, int64_t inputs) {
    const double most = std::min(1.0, 1.5 / std::sqrt(0.2 * inputs));
    const int64_t steps = std::max<int64_t>(1, std::llround(most * 32));
    std::vector<float> weight(outputs * inputs), bias(outputs);
    for (float& w : weight) w = random.between(-steps, steps) * 0x1p-5f;
    for (float& b : bias) b = random.between(-2, 12) * 0x1p-4f;
    return PackedLinear(weight.data(), bias.data(), outputs, inputs);
  };
  const auto layer = [&](int64_t outputs, int64_t inputs) {
    return SpikeLayer{map(outputs, inputs), random_neuron(random)};
  };
  const int64_t C = c.embed_dim;
  int64_t channels = c.in_channels;
  for (size_t i = 0; i < net.conv.size(); ++i) {
    const int64_t width = random.pick<int64_t>({1, 3, 8, 16, 65});
    const int64_t outputs = i >= 3 ? C : c.grid() > 16 ? std::min<int64_t>(width, 8) : width;
    net.conv[i] = layer(outputs, 9 * channels);
    channels = outputs;
  }
  for (int64_t l = 0; l < c.depth; ++l) {
    BlockLayers b;
    const PackedLinear q = map(C, C), k = map(C, C), v = map(C, C);
    b.qkv = {beside({&q, &k, &v}), random_neuron(random)};
    b.attn = random_neuron(random);
    b.proj = layer(C, C);
    b.fc1 = layer(c.hidden, C);
    b.fc2 = layer(C, c.hidden);
    net.block.push_back(std::move(b));
  }
  for (int64_t i = 0; i < c.outputs * C; ++i) {
    net.head_weight.push_back(random.between(-32, 32) * 0x1p-6);
  }
  for (int64_t i = 0; i < c.outputs; ++i) net.head_bias.push_back(random.uniform(-1, 1));
  for (int64_t i = 0; i < (c.score == Score::linear ? C : 1); ++i) {
    net.score_weight.push_back(random.uniform(-1, 1) *
                               (c.score == Score::linear ? 2 / std::sqrt(C) : 1));
  }
  net.score_bias = random.uniform(-2, 0.5);
  return net;
}

std::string shown(const NetworkConfig& c) {
  std::string text;
  const auto add = [&](const char* name, auto value) {
    text += std::string(text.empty() ? "" : ", ") + name + " = " + std::to_string(value);
  };
  add("image", c.image_size);
  add("T", c.T);
  add("C", c.embed_dim);
  add("heads", c.num_heads);
  add("hidden", c.hidden);
  add("depth", c.depth);
  for (bool halves : c.pooled) add("pooled", int(halves));
  add("pool_spikes", int(c.pool_spikes));
  add("spike_driven", int(c.spike_driven));
  add("halting", int(c.halting));
  add("mean_field", int(c.mean_field));
  add("score", int(c.score));
  add("pixels", int(c.pixels));
  add("merging", int(c.merging));
  if (c.merge_threshold) add("merge_threshold", *c.merge_threshold);
  return text;
}

}  // namespace atsnn
