// Attention of spikes in bits, against q k^T v in full.
#include <numeric>

#include "../../csrc/engine/attention.h"
#include "engine_inputs.h"

namespace atsnn {
namespace {

struct Case {
  Random random;
  NeuronParams p;
  Cells cells;
  Sizes sizes;
  int64_t d, heads, C, W, in_stride, out_stride;
  float scale;
  bool at_rest;
  Array<uint64_t> qkv;  // [R, in_stride]: q, k, v, each of W words
  const Array<uint64_t> fresh;
  std::vector<uint64_t> want;
  int64_t spikes = 0;
  std::string name;

  explicit Case(uint64_t seed)
      : random(seed),
        p(random_neuron(random)),
        cells(random_cells(random, {0, 1, 2, 5, 9, 16, 33})),
        sizes(random, cells),
        d(random.pick<int64_t>({1, 3, 12, 16, 32, 48, 64, 80, 128})),
        heads(
            std::min(random.pick<int64_t>({1, 2, 3, 4, 5, 8, 70}), std::max<int64_t>(256 / d, 1))),
        C(heads * d),
        W(words(C)),
        in_stride(3 * W),
        out_stride(W + random.between(0, 1)),
        scale(random.pick({0.125f, 0.25f, 0.3f})),
        at_rest(random.chance(0.3)),
        qkv(cells.rows * in_stride),
        fresh(cells.rows * out_stride),
        want(copied(fresh)),
        name("d = " + std::to_string(d) + ", heads = " + std::to_string(heads) + ", " +
             shown(cells)) {
    for (int64_t part = 0; part < 3; ++part) {
      const auto bits = random_bits(random, cells.rows, C, random_rate(random), W);
      for (int64_t i = 0; i < bits.size(); ++i) {
        qkv[i / W * in_stride + part * W + i % W] = bits[i];
      }
    }
    for (int64_t i = 0; i < int64_t(want.size()); ++i) {
      if (i % out_stride < W) want[i] = 0;
    }
  }
  bool at(int64_t part, int64_t row, int64_t c) const {
    return bit_at(qkv, in_stride, row, part * W * word_bits + c);
  }
  void fire(int64_t row, int64_t c) {
    set_bit(want, out_stride, row, c);
    ++spikes;
  }
  // What the kernels get; `out` and `state` are overwritten.
  Attend attend(Array<uint64_t>& out, Array<float>& state) const {
    return {qkv.data(),   qkv.data() + W, qkv.data() + 2 * W,
            in_stride,    out.data(),     out_stride,
            sizes.data(), cells.layout(), C,
            heads,        scale,          state.data(),
            at_rest};
  }
};

template <class T>
std::vector<T> scratches(Random& random) {
  return std::vector<T>(random.between(1, 3));
}

}  // namespace

void check_attention(uint64_t seed) {
  Case c(seed);
  const Cells& cells = c.cells;
  const auto start = random_state(c.random, c.random.chance(0.5), cells.B * cells.N * c.C);
  const bool keeps = start.size() > 0;
  std::vector<float> v =
      keeps ? copied(start) : std::vector<float>(cells.B * cells.N * c.C, float(c.p.v_reset));
  each_cell(cells, [&](int64_t t, int64_t b, int64_t token, int64_t row) {
    for (int64_t first = 0; first < c.C; first += c.d) {
      std::vector<double> sum(c.d);
      for (int64_t other = 0; other < cells.N; ++other) {
        const int64_t from = cells.at(t, b, other);
        if (from < 0) continue;
        double dot = 0;
        for (int64_t i = first; i < first + c.d; ++i) dot += c.at(0, row, i) && c.at(1, from, i);
        dot *= c.sizes.value[b * cells.N + other];
        for (int64_t i = 0; dot != 0 && i < c.d; ++i) sum[i] += dot * c.at(2, from, first + i);
      }
      for (int64_t i = 0; i < c.d; ++i) {
        float& membrane = v[(b * cells.N + token) * c.C + first + i];
        if (c.at_rest && t == 0) membrane = c.p.v_reset;
        if (neuron_step(c.p, float(sum[i]) * c.scale, membrane)) c.fire(row, first + i);
      }
    }
  });
  v.resize(start.size());
  // Groups of heads that share no word, in any order.
  const int64_t together = std::min(heads_together(c.d), c.heads);
  const int64_t groups = (c.heads + together - 1) / together;
  std::vector<int64_t> order(cells.B * groups);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = int64_t(order.size()) - 1; i > 0; --i) {
    std::swap(order[i], order[c.random.between(0, i)]);
  }
  each_kernels("attention", seed, c.name, [&](const Kernels& k) {
    Array<uint64_t> out(c.want.size());
    Array<float> state(copied(start)), scratch(attend_scratch(cells.N, c.d));
    int64_t spikes = 0;
    for (int64_t item : order) {
      const int64_t first = item % groups * together;
      spikes += k.attend(c.attend(out, state), c.p, item / groups, first,
                         std::min(together, c.heads - first), scratch.data());
    }
    CHECK(spikes == c.spikes);
    CHECK_SAME(out, c.want);
    CHECK_SAME(state, v);

    Array<uint64_t> again(c.want.size());
    Array<float> again_state(copied(start));
    auto threads = scratches<Buffer<float>>(c.random);
    CHECK(run_attention(c.attend(again, again_state), c.p, k, threads) == c.spikes);
    CHECK_SAME(again, c.want);
    CHECK_SAME(again_state, v);
  });
}

void check_spike_driven_attention(uint64_t seed) {
  Case c(seed);
  const Cells& cells = c.cells;
  const auto start = random_state(c.random, c.random.chance(0.5), cells.B * c.C);
  std::vector<float> v =
      start.size() ? copied(start) : std::vector<float>(cells.B * c.C, float(c.p.v_reset));
  if (c.at_rest) std::fill(v.begin(), v.end(), float(c.p.v_reset));
  for (int64_t i = 0; i < cells.T * cells.B * c.C; ++i) {
    const int64_t t = i / (cells.B * c.C), b = i / c.C % cells.B, channel = i % c.C;
    float sum = 0;
    for (int64_t token = 0; token < cells.N; ++token) {
      const int64_t row = cells.at(t, b, token);
      if (row >= 0 && c.at(1, row, channel) && c.at(2, row, channel)) {
        sum += c.sizes.value[b * cells.N + token];
      }
    }
    if (!neuron_step(c.p, sum, v[b * c.C + channel])) continue;
    for (int64_t token = 0; token < cells.N; ++token) {
      const int64_t row = cells.at(t, b, token);
      if (row >= 0 && c.at(0, row, channel)) c.fire(row, channel);
    }
  }
  v.resize(start.size());
  each_kernels("spike-driven attention", seed, c.name, [&](const Kernels& k) {
    Array<uint64_t> out(c.want.size());
    Array<float> state(copied(start));
    auto threads = scratches<ChunkScratch>(c.random);
    CHECK(run_spike_driven_attention(c.attend(out, state), c.p, k, threads) == c.spikes);
    CHECK_SAME(out, c.want);
    CHECK_SAME(state, v);
  });
}

TEST(engine_attention) {
  for (uint64_t seed = 0; seed < 1200; ++seed) check_attention(seed);
}

TEST(engine_spike_driven_attention) {
  for (uint64_t seed = 0; seed < 1000; ++seed) check_spike_driven_attention(seed);
}

}  // namespace atsnn
