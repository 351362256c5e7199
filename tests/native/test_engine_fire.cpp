// Neurons over the timesteps of columns.
#include <numeric>

#include "engine_inputs.h"

namespace atsnn {

void check_fire(uint64_t seed) {
  Random random(seed);
  const NeuronParams p = random_neuron(random);
  const int64_t channels = random.chance(0.3) ? panel : random.between(1, panel);
  const int64_t columns = random.between(0, 9), stride = random.between(1, 3);
  const int64_t offset = random.pick<int64_t>({0, 3, 64});
  const bool still = random.chance(0.4), keeps = random.chance(0.5), at_rest = random.chance(0.3);
  Array<int32_t> first(columns + 1);
  first[0] = 0;
  for (int64_t i = 0; i < columns; ++i) first[i + 1] = first[i] + random.between(0, 5);
  const int64_t steps = first[columns];
  // Rows of spikes in any order, some of them nobody's.
  const int64_t rows = steps + random.between(0, 3);
  std::vector<int32_t> any(rows);
  std::iota(any.begin(), any.end(), 0);
  for (int64_t i = rows - 1; i > 0; --i) std::swap(any[i], any[random.between(0, i)]);
  const Array<int32_t> row(std::vector<int32_t>(any.begin(), any.begin() + steps));
  Array<float> acc((still ? columns : steps) * panel);
  for (int64_t i = 0; i < acc.size(); ++i) {
    if (i % panel < channels) acc[i] = random.between(-8, 24) * 0x1p-4f;
  }
  std::vector<std::vector<float>> start;
  for (int64_t i = 0; i < columns; ++i) {
    start.push_back(copied(random_state(random, true, offset + channels)));
  }

  const Array<uint64_t> fresh(rows * stride);
  std::vector<uint64_t> want = copied(fresh);
  std::vector<std::vector<float>> want_state = start;
  int64_t spikes = 0;
  for (int64_t col = 0; col < columns; ++col) {
    for (int64_t step = first[col]; step < first[col + 1]; ++step) want[row[step] * stride] = 0;
    for (int64_t c = 0; c < channels; ++c) {
      float rest = p.v_reset;
      float& v = keeps ? want_state[col][offset + c] : rest;
      if (at_rest) v = rest;
      for (int64_t step = first[col]; step < first[col + 1]; ++step) {
        const bool fires = neuron_step(p, acc[(still ? col : step) * panel + c], v);
        want[row[step] * stride] |= uint64_t(fires) << c;
        spikes += fires;
      }
    }
  }
  each_kernels("fire", seed, "channels = " + std::to_string(channels), [&](const Kernels& k) {
    Array<uint64_t> out(rows * stride);
    std::vector<Array<float>> state;
    Array<float*> pointers(columns);
    for (int64_t i = 0; i < columns; ++i) {
      state.emplace_back(start[i]);
      pointers[i] = state[i].data();
    }
    const Fire a{acc.data(),
                 still,
                 first.data(),
                 row.data(),
                 columns,
                 out.data(),
                 stride,
                 valid_bits(channels, 0),
                 keeps ? pointers.data() : nullptr,
                 offset,
                 at_rest};
    CHECK(k.fire(a, p) == spikes);
    CHECK_SAME(out, want);
    for (int64_t i = 0; i < columns; ++i) CHECK_SAME(state[i], want_state[i]);
  });
}

TEST(engine_fire) {
  for (uint64_t seed = 0; seed < 1500; ++seed) check_fire(seed);
}

}  // namespace atsnn
