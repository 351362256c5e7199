#include "pass.h"

namespace atsnn {

void Pass::stem() {
  const Timer timer(report_.stem_seconds);
  int64_t side = c_.image_size, channels = c_.in_channels;
  const int64_t shown = images_.still ? 1 : T_;
  const uint64_t* in = nullptr;
  int64_t largest = 0;
  for (size_t i = 0; i < net_.conv.size(); ++i) {
    const int64_t after = i < c_.pooled.size() && c_.pooled[i] ? halved(side) : side;
    largest = std::max(largest, side * side * words(net_.conv[i].map.outputs));
    side = after;
  }
  for (auto& map : ws_.map) map.reserve(T_ * B_ * largest);
  side = c_.image_size;
  // Images of the group follow each other within a timestep only.
  const float* images = images_.data + b0_ * channels * side * side;
  if (shown > 1 && images_.B != B_) {
    const int64_t one = channels * side * side;
    float* copy = ws_.values.reserve(shown * B_ * one);
    for (int64_t t = 0; t < shown; ++t) {
      std::copy_n(images + t * images_.B * one, B_ * one, copy + t * B_ * one);
    }
    images = copy;
  }
  for (size_t i = 0; i < net_.conv.size(); ++i) {
    const PackedLinear& map = net_.conv[i].map;
    const bool halves = i < c_.pooled.size() && c_.pooled[i];
    uint64_t* out = ws_.map[i % 2].data();
    float* state = nullptr;
    if (state_) {
      const int64_t size = halves && !c_.pool_spikes ? halved(side) : side;
      state = state_->conv[i].data() + b0_ * size * size * map.outputs;
    }
    if (i == 4) out = ws_.branch.reserve(T_ * B_ * N_ * W_);
    const Counted counted = run_conv_lif(
        {i == 0 ? images : nullptr, in, channels, T_, B_, side, side, i == 0 && images_.still,
         halves && !c_.pool_spikes, &map, net_.conv[i].neuron, out, state},
        k_, ws_.thread);
    if (options_.record) {
      const int64_t size = halves && !c_.pool_spikes ? halved(side) : side;
      int64_t* offsets = ws_.index.reserve(T_ * B_ + 1);
      for (int64_t run = 0; run <= T_ * B_; ++run) offsets[run] = run * size * size;
      options_.record({-1,
                       static_cast<int>(2 * i + 1),
                       out,
                       words(map.outputs),
                       map.outputs,
                       {T_, B_, size * size, offsets, nullptr},
                       b0_,
                       0});
    }
    report_.stem_spikes[2 * i] += counted.input;
    report_.stem_spikes[2 * i + 1] += counted.spikes[0];
    if (i == 4) break;
    if (halves && c_.pool_spikes) {
      uint64_t* pooled =
          i == 3 ? ws_.tokens.reserve(T_ * B_ * N_ * W_) : ws_.map[(i + 1) % 2].data();
      pool_bits(out, T_ * B_, side, side, words(map.outputs), halving, pooled, threads());
      // The next layer must not write where it reads.
      if (i < 3) std::swap(ws_.map[0], ws_.map[1]);
      out = pooled;
    }
    if (halves) side = halved(side);
    in = out;
    channels = map.outputs;
    poll();
  }
  const int64_t rows = T_ * B_ * N_;
  uint8_t* x = ws_.counts.reserve_zeros(rows * C_);
  for (int64_t r = 0; r < rows; ++r) {
    add_bits(in + r * W_, C_, x + r * C_);
    add_bits(ws_.branch.data() + r * W_, C_, x + r * C_);
  }
}

}  // namespace atsnn
