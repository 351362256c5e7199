// Rows of weights added to sums: in the order of the entries, or in groups of four inputs.
#include "engine_inputs.h"

namespace atsnn {

void check_add_rows(uint64_t seed) {
  Random random(seed);
  const int64_t K = random.pick<int64_t>({1, 2, 9, 64, 200}), rows = random.between(1, 12);
  const int64_t outputs = random.chance(0.3) ? panel : random.between(1, panel);
  const bool weighted = random.chance(0.5), with_bias = random.chance(0.5);
  const bool exact = random.chance(0.5);
  const auto weights = [&](int64_t n) {
    Array<float> x(n);
    for (int64_t i = 0; i < n; ++i) x[i] = random_weight(random, exact);
    return x;
  };
  const auto weight = weights(K * panel), bias = weights(panel), start = weights(rows * panel);
  // One list for several rows, and several lists for one, are allowed.
  Array<Job> jobs(random.between(0, 20));
  Array<uint16_t> index(random.pick<int64_t>({1, 17, 300}));
  Array<float> value(weighted ? index.size() : 0);
  for (int64_t i = 0; i < index.size(); ++i) index[i] = random.between(0, K - 1);
  for (int64_t i = 0; i < value.size(); ++i) value[i] = random.between(-8, 8) * 0x1p-2f;
  std::vector<float> want = copied(start);
  for (int64_t j = 0; j < jobs.size(); ++j) {
    Job& job = jobs[j];
    job.entry = random.between(0, index.size());
    job.count = random.chance(0.2) ? 0 : random.between(0, index.size() - job.entry);
    job.row = random.between(0, rows - 1);
    for (int64_t o = 0; o < outputs; ++o) {
      float& sum = want[job.row * panel + o];
      if (with_bias) sum = bias[o];
      for (uint32_t e = job.entry; e < job.entry + job.count; ++e) {
        const float w = weight[index[e] * panel + o];
        sum += weighted ? value[e] * w : w;
      }
    }
  }
  each_kernels("add_rows", seed, "outputs = " + std::to_string(outputs), [&](const Kernels& k) {
    Array<float> acc(copied(start));
    k.add_rows({outputs, weight.data(), index.data(), weighted ? value.data() : nullptr,
                jobs.data(), jobs.size(), with_bias ? bias.data() : nullptr, acc.data(),
                weight.data() + random.between(0, K) * panel, random.between(0, 3)});
    // Outputs that do not exist may hold anything in the rows of a job.
    std::vector<float> exist = copied(acc);
    for (int64_t j = 0; j < jobs.size(); ++j) {
      const int64_t row = jobs[j].row * panel;
      std::copy_n(&want[row] + outputs, panel - outputs, &exist[row] + outputs);
    }
    CHECK_SAME(exist, want);
  });
}

void check_add_groups(uint64_t seed) {
  Random random(seed);
  const int64_t inputs = random.pick<int64_t>({1, 4, 47, 48, 64, 65, 100, 200});
  const int64_t outputs = random.chance(0.3) ? panel : random.between(1, panel);
  const int64_t rows = random.pick<int64_t>({0, 1, 11, 12, 13, 30}), stride = words(inputs);
  const Map map(random, outputs, inputs);
  const auto bits = random_bits(random, rows, inputs, random.pick({0.0, 0.3, 0.7, 1.0}), stride);
  // Rows go anywhere in the sums, and leave the others alone.
  const int64_t first = random.between(0, 2), step = random.between(1, 2);
  const Array<float> start((first + rows * step) * panel);
  std::vector<float> want = copied(start);
  Array<const uint64_t*> row_bits(rows);
  Array<int32_t> row(rows);
  for (int64_t r = 0; r < rows; ++r) {
    row_bits[r] = bits.data() + r * stride;
    row[r] = first + (rows - 1 - r) * step;
    float* sums = want.data() + row[r] * panel;
    std::copy(map.bias.begin(), map.bias.end(), sums);
    map.add_groups([&](int64_t i) { return bit_at(bits, stride, r, i); }, sums);
  }
  const Array<float> weight(
      std::vector<float>(map.packed.weight, map.packed.weight + inputs * panel));
  const Array<float> bias(
      std::vector<float>(map.packed.bias.data(), map.packed.bias.data() + panel));
  each_kernels("add_groups", seed, "rows = " + std::to_string(rows), [&](const Kernels& k) {
    Array<float> acc(copied(start)), table(group_table);
    Array<uint16_t> code(rows * group_codes(inputs));
    k.list_groups(row_bits.data(), rows, inputs, code.data());
    k.add_groups({outputs, inputs, weight.data(), row_bits.data(), code.data(), row.data(), rows,
                  bias.data(), acc.data(), table.data()});
    std::vector<float> exist = copied(acc);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = row[r] * panel;
      std::copy_n(&want[at] + outputs, panel - outputs, &exist[at] + outputs);
    }
    CHECK_SAME(exist, want);
  });
}

TEST(engine_add_groups) {
  for (uint64_t seed = 0; seed < 1000; ++seed) check_add_groups(seed);
}

TEST(engine_add_rows) {
  for (uint64_t seed = 0; seed < 1500; ++seed) check_add_rows(seed);
}

}  // namespace atsnn
