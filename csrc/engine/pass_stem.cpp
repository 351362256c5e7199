#include "pass.h"

namespace atsnn {

namespace {

constexpr int position = 4;  // the layer whose spikes are added to the tokens

}  // namespace

void Pass::reserve_stem(int64_t T) {
  int64_t largest = 0;
  for (int i = 0; i < position; ++i) {
    largest = std::max(largest, maps_[i].side * maps_[i].side * words(net_.conv[i].map.outputs));
  }
  for (auto* map : {&ws_.map[0], &ws_.map[1]}) map->reserve(T * B_ * largest);
  ws_.tokens.reserve(T * B_ * N_ * W_);
  ws_.branch.reserve(T_ * B_ * N_ * W_);
}

const uint64_t* Pass::stem_layer(int i, int64_t T, const float* images, const uint64_t* in,
                                 float* state, const StemPixels* wanted) {
  const PackedLinear& map = net_.conv[i].map;
  const StemMap& m = maps_[i];
  const int64_t channels = map.inputs / Window{}.taps(), sums = m.side * m.side;
  const int64_t neurons = m.neurons * m.neurons, stride = words(map.outputs);
  const bool still = i == 0 && images_.still, pool = m.halves && !c_.pool_spikes;
  uint64_t* out = i == position ? ws_.branch.data() : ws_.map[0].data();
  ConvLif conv{
      images, in,   channels, T, B_, m.side, m.side, still, pool, &map, net_.conv[i].neuron,
      out,    state};
  if (wanted) conv.wanted = wanted->neurons(m);
  conv.at_rest = at_rest_;
  const Counted counted = run_conv_lif(conv, k_, ws_.thread);
  report_.stem_spikes[2 * i] += counted.input;
  report_.stem_spikes[2 * i + 1] += counted.spikes[0];
  const auto computed = [&](const uint8_t* some, int64_t pixels) {
    return some ? std::count(some, some + B_ * pixels, uint8_t(1)) : B_ * pixels;
  };
  report_.stem_pixels[2 * i] +=
      (still ? 1 : T) * computed(wanted ? wanted->sums(m) : nullptr, sums);
  report_.stem_pixels[2 * i + 1] += T * computed(wanted ? wanted->neurons(m) : nullptr, neurons);
  if (options_.record) {
    int64_t* offsets = ws_.index.reserve(T * B_ + 1);
    for (int64_t run = 0; run <= T * B_; ++run) offsets[run] = run * neurons;
    options_.record(
        {-1, 2 * i + 1, out, stride, map.outputs, {T, B_, neurons, offsets, nullptr}, b0_, 0});
  }
  poll();
  if (i == position) return out;
  // The next layer reads the second map, or the tokens, and writes the first one.
  if (!m.halves || pool) {
    std::swap(ws_.map[0], ws_.map[1]);
    return out;
  }
  uint64_t* pooled = i + 1 == position ? ws_.tokens.data() : ws_.map[1].data();
  pool_bits(out, T * B_, m.side, m.side, stride, halving, pooled, threads(),
            wanted ? wanted->after.data() : nullptr);
  return pooled;
}

float* Pass::stem_state(StreamState* state, int i) const {
  if (!state) return nullptr;
  const int64_t first = state == state_ ? b0_ : 0;
  return state->conv[i].data() +
         first * maps_[i].neurons * maps_[i].neurons * net_.conv[i].map.outputs;
}

void Pass::stem() {
  const Timer timer(report_.stem_seconds);
  reserve_stem(T_);
  const int64_t shown = images_.still ? 1 : T_;
  const int64_t one = image_floats();
  // Images of the group follow each other within a timestep only.
  const float* images = images_.data + b0_ * one;
  if (shown > 1 && images_.B != B_) {
    float* copy = ws_.values.reserve(shown * B_ * one);
    for (int64_t t = 0; t < shown; ++t) {
      std::copy_n(images + t * images_.B * one, B_ * one, copy + t * B_ * one);
    }
    images = copy;
  }
  const uint64_t* in = stem_layer(0, T_, images, nullptr, stem_state(state_, 0), nullptr);
  for (int i = 1; i < position; ++i) {
    in = stem_layer(i, T_, nullptr, in, stem_state(state_, i), nullptr);
  }
  const uint64_t* branch =
      stem_layer(position, T_, nullptr, in, stem_state(state_, position), nullptr);
  const int64_t rows = T_ * B_ * N_;
  uint8_t* x = ws_.counts.reserve_zeros(rows * C_);
  for (int64_t r = 0; r < rows; ++r) {
    add_bits(in + r * W_, C_, x + r * C_);
    add_bits(branch + r * W_, C_, x + r * C_);
  }
}

void Pass::start_stem() {
  const Timer timer(report_.stem_seconds);
  reserve_stem(images_.still ? T_ : 1);
  if (!images_.still) return;
  // What the first layer adds up is the same at every timestep.
  const float* images = images_.data + b0_ * image_floats();
  stem_layer(0, T_, images, nullptr, stem_state(state_, 0), nullptr);
  // Its spikes are in the second map; they stay while the other layers run.
  std::swap(ws_.map[1], ws_.shown);
  ws_.map[1].reserve(ws_.shown.capacity());
}

void Pass::stem_step(int64_t t, StreamState* state, const int64_t* active) {
  const Timer timer(report_.stem_seconds);
  const int64_t tokens = B_ * N_;
  const int64_t on =
      std::count_if(active, active + tokens, [](int64_t steps) { return steps > 0; });
  if (on == 0) return;
  const bool all = on == tokens;
  if (!all) want_stem(active);
  const auto wanted = [&](int i) { return all ? nullptr : &ws_.stem[i]; };
  const uint64_t* in = nullptr;
  if (images_.still) {
    in = ws_.shown.data() +
         t * B_ * maps_[0].after * maps_[0].after * words(net_.conv[0].map.outputs);
  } else {
    const float* images = images_.data + (t * images_.B + b0_) * image_floats();
    in = stem_layer(0, 1, images, nullptr, stem_state(state, 0), wanted(0));
  }
  for (int i = 1; i < position; ++i) {
    in = stem_layer(i, 1, nullptr, in, stem_state(state, i), wanted(i));
  }
  const uint64_t* branch =
      stem_layer(position, 1, nullptr, in, stem_state(state, position), wanted(position));
  uint8_t* x = ws_.all_counts.data();
  for (int64_t i = 0; i < tokens; ++i) {
    if (!active[i]) continue;
    std::fill_n(x + i * C_, C_, uint8_t(0));
    add_bits(in + i * W_, C_, x + i * C_);
    add_bits(branch + i * W_, C_, x + i * C_);
  }
}

void Pass::want_stem(const int64_t* active) {
  const auto each_image = [&](const uint8_t* from, int64_t pixels, const Window& window,
                              int64_t side, Buffer<uint8_t>& to) {
    uint8_t* const read = to.reserve((B_ * side + 1) * side);
    for (int64_t b = 0; b < B_; ++b) {
      mark_read(from + b * pixels, window, side, side, read + b * side * side,
                read + B_ * side * side);
    }
  };
  uint8_t* last = ws_.stem[position].after.reserve(B_ * N_);
  for (int64_t i = 0; i < B_ * N_; ++i) last[i] = active[i] > 0;
  for (int i = position;; --i) {
    StemPixels& wanted = ws_.stem[i];
    const StemMap& m = maps_[i];
    if (m.halves)
      each_image(wanted.after.data(), m.after * m.after, halving, m.side, wanted.before);
    if (i == (images_.still ? 1 : 0)) break;
    // What this layer reads leaves the one before it. The tokens are read by the last layer too.
    each_image(wanted.sums(m), m.side * m.side, {}, m.side, ws_.stem[i - 1].after);
  }
}

}  // namespace atsnn
