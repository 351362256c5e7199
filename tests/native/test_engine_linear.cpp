// Linear maps with neurons behind them, against one sum after the other.
#include "engine_inputs.h"

namespace atsnn {
namespace {

enum class Form { bits, counts, values };

// Rows of inputs in one of the three forms.
struct Rows {
  Form form;
  int64_t channels, stride;
  Array<uint64_t> bits;
  Array<uint8_t> counts;
  Array<float> values;

  Rows(Random& random, int64_t rows, int64_t channels_)
      : form(random.pick({Form::bits, Form::counts, Form::values})),
        channels(channels_),
        stride(words(channels) + random.between(0, 1)) {
    const double rate = random_rate(random);
    if (form == Form::bits) bits = random_bits(random, rows, channels, rate, stride);
    if (form == Form::counts) counts = Array<uint8_t>(rows * channels);
    if (form == Form::values) values = Array<float>(rows * channels);
    const int64_t most = random.pick<int64_t>({2, 10, 255});
    for (int64_t i = 0; i < counts.size(); ++i) {
      counts[i] = random.chance(rate) ? random.between(1, most) : 0;
    }
    for (int64_t i = 0; i < values.size(); ++i) {
      values[i] = random.chance(rate) ? random.between(-32, 32) * 0x1p-3f : 0;
    }
  }
  float at(int64_t row, int64_t i) const {
    return form == Form::bits     ? bit_at(bits, stride, row, i)
           : form == Form::counts ? counts[row * channels + i]
                                  : values[row * channels + i];
  }
  // Whether the row is one of bits that are added in groups.
  bool many(int64_t row) const {
    int64_t n = 0;
    for (int64_t i = 0; form == Form::bits && i < channels; ++i) n += at(row, i) != 0;
    return channels >= word_bits && n > many_rate * channels;
  }
  // From row `first` on.
  RowInput input(int64_t first) const {
    RowInput in{channels};
    if (form == Form::bits) in.bits = bits.data() + first * stride;
    if (form == Form::counts) in.counts = counts.data() + first * channels;
    if (form == Form::values) in.values = values.data() + first * channels;
    in.stride = form == Form::bits ? stride : 0;
    return in;
  }
};

}  // namespace

void check_linear(uint64_t seed) {
  Random random(seed);
  const Cells cells = random_cells(random, {0, 1, 2, 5, 16, 20, 66});
  const auto [T, B, N] = std::tuple(cells.T, cells.B, cells.N);
  const int64_t inputs = random.pick<int64_t>({1, 3, 63, 64, 65, 128, 192, 193, 200, 384, 450});
  const Rows x(random, cells.rows, inputs);
  const NeuronParams p = random_neuron(random);
  // One map, or three side by side as q, k and v are.
  const int64_t groups = random.chance(0.3) ? 3 : 1;
  const int64_t outputs = random.pick<int64_t>({1, 5, 31, 32, 33, 48, 64, 65, 130});
  std::vector<Map> maps;
  for (int64_t g = 0; g < groups; ++g) maps.emplace_back(random, outputs, inputs);
  PackedLinear together;
  if (groups == 3) together = beside({&maps[0].packed, &maps[1].packed, &maps[2].packed});
  PackedLinear& packed = groups == 3 ? together : maps[0].packed;
  Buffer<float> gathered;
  if (random.chance(0.5)) gathered = gather_weights({&packed});
  const int64_t panels = packed.panels(), part = words(outputs);
  const auto start = random_state(random, random.chance(0.5), B * N * packed.outputs);
  const bool at_rest = random.chance(0.3);

  std::vector<uint64_t> want(cells.rows * panels);
  std::vector<float> want_sums(groups == 1 ? cells.rows * outputs : 0);
  std::vector<float> want_state = copied(start);
  Counted counted;
  std::vector<float> rest(want_state.empty() ? B * N * packed.outputs : 0, float(p.v_reset));
  float* const v = want_state.empty() ? rest.data() : want_state.data();
  each_cell(cells, [&](int64_t t, int64_t b, int64_t token, int64_t row) {
    for (int64_t i = 0; i < inputs; ++i) counted.input += x.at(row, i);
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<float> sums = maps[g].bias;
      if (x.many(row)) {
        maps[g].add_groups([&](int64_t i) { return x.at(row, i) != 0; }, sums.data());
      } else {
        for (int64_t i = 0; i < inputs; ++i) maps[g].add(i, x.at(row, i), sums.data());
      }
      if (groups == 1) std::copy(sums.begin(), sums.end(), want_sums.data() + row * outputs);
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t at = g * part * panel + o;
        float& membrane = v[(b * N + token) * packed.outputs + at];
        if (at_rest && t == 0) membrane = p.v_reset;
        if (!neuron_step(p, sums[o], membrane)) continue;
        set_bit(want, panels, row, at);
        ++counted.spikes[g];
      }
    }
  });
  const std::string name = "form " + std::to_string(int(x.form)) + ", " + std::to_string(inputs) +
                           " -> " + std::to_string(groups) + " * " + std::to_string(outputs) +
                           ", " + shown(cells);
  std::vector<ChunkScratch> used;
  each_kernels("linear", seed, name, [&](const Kernels& k) {
    std::vector<ChunkScratch> threads(random.pick({1, 1, 2, 3, 7}));
    Array<uint64_t> out(want.size());
    Array<float> state(copied(start));
    Columns columns;
    columns.set(cells.layout());
    const Counted got = run_linear_lif({x.input(0), &packed, p, cells.layout(), &columns,
                                        out.data(), state.data(), groups, nullptr, at_rest},
                                       k, threads);
    CHECK_SAME(out, want);
    CHECK_SAME(state, want_state);
    CHECK(got.input == counted.input);
    for (int g = 0; g < 3; ++g) CHECK(got.spikes[g] == counted.spikes[g]);
    if (groups == 1) {
      Array<float> sums(want_sums.size());
      run_linear_lif(
          {x.input(0), &packed, p, cells.layout(), &columns, nullptr, nullptr, 1, sums.data()}, k,
          threads);
      CHECK_SAME(sums, want_sums);
    }

    // The same a timestep at a time, with scratch that other shapes have used.
    if (want_state.empty()) return;
    Array<uint64_t> split(want.size());
    Array<float> carried(copied(start));
    if (used.empty()) used.resize(random.between(1, 3));
    Counted sum;
    for (int64_t t = 0; t < T; ++t) {
      const OneStep step(cells.layout(), t);
      columns.set(step.layout);
      sum += run_linear_lif(
          {x.input(step.first), &packed, p, step.layout, &columns,
           split.data() + step.first * panels, carried.data(), groups, nullptr, at_rest && t == 0},
          k, used);
    }
    CHECK_SAME(split, want);
    CHECK_SAME(carried, want_state);
    CHECK(sum.input == counted.input);
  });
}

TEST(engine_linear) {
  for (uint64_t seed = 0; seed < 1200; ++seed) check_linear(seed);
}

}  // namespace atsnn
