#include "inputs.h"

#include <algorithm>
#include <numeric>

namespace atsnn {

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> found{Level::portable};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
      found.push_back(Level::avx2);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Level::avx512);
    }
#endif
    return found;
  }();
  return all;
}

const char* level_name(Level level) {
  return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "portable";
}

double random_value(Random& random, Values values) {
  switch (values) {
    case Values::spikes:
      return random.chance(0.25);
    case Values::integers:
      return random.chance(0.5) ? 0 : random.between(-4, 4);
    case Values::reals:
      break;
  }
  return random.chance(0.25) ? 0 : random.uniform(-2, 2);
}

int64_t Cells::rank(int64_t b, int64_t k) const {
  if (dense) return k;
  int64_t r = 0;
  while (token[b * N + r] != k) ++r;
  return r;
}

int64_t Cells::most_in_a_run() const {
  int64_t most = 0;
  for (int64_t i = 0; i < T * B; ++i) most = std::max(most, offsets[i + 1] - offsets[i]);
  return most;
}

Cells make_cells(int64_t T, int64_t B, int64_t N, const std::vector<int64_t>& steps,
                 Random* random) {
  Cells cells{T,
              B,
              N,
              0,
              false,
              steps,
              std::vector<int64_t>(T * B * N, -1),
              Array<int64_t>(B * N),
              Array<int64_t>(T * B + 1)};
  for (int64_t b = 0; b < B; ++b) {
    std::vector<int64_t> order(N);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = N - 1; random && i > 0; --i) std::swap(order[i], order[random->between(0, i)]);
    std::stable_sort(order.begin(), order.end(), [&](int64_t k, int64_t other) {
      return steps[b * N + k] > steps[b * N + other];
    });
    for (int64_t r = 0; r < N; ++r) cells.token[b * N + r] = order[r];
  }
  cells.offsets[0] = 0;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t r = 0; r < N; ++r) {
        const int64_t k = cells.token[b * N + r];
        if (steps[b * N + k] > t) cells.row[(t * B + b) * N + k] = cells.rows++;
      }
      cells.offsets[t * B + b + 1] = cells.rows;
    }
  }
  return cells;
}

Cells dense_cells(int64_t T, int64_t B, int64_t N) {
  Cells cells = make_cells(T, B, N, std::vector<int64_t>(B * N, T), nullptr);
  cells.dense = true;
  return cells;
}

Cells random_cells(Random& random, std::initializer_list<int64_t> tokens) {
  const int64_t T = random.pick<int64_t>({0, 1, 1, 2, 2, 3, 4, 4, 5, 6});
  const int64_t B = random.pick<int64_t>({0, 1, 1, 1, 1, 2, 2, 2, 3, 4});
  const int64_t N = random.pick(tokens);
  enum { dense, all_active, all_halted, empty_images, any };
  const auto kind = random.pick({dense, all_active, all_halted, empty_images, any, any, any, any});
  if (kind == dense) return dense_cells(T, B, N);
  std::vector<int64_t> steps;
  for (int64_t b = 0; b < B; ++b) {
    const bool empty = kind == all_halted || (kind == empty_images && random.chance(0.5));
    for (int64_t k = 0; k < N; ++k) {
      steps.push_back(empty ? 0 : kind == all_active ? T : random.between(0, T));
    }
  }
  return make_cells(T, B, N, steps, &random);
}

int64_t random_channels(Random& random) {
  return random.pick<int64_t>({0, 1, 3, 16, 17, 33, 64, 129, 384});
}

std::string shown(const Cells& cells) {
  std::string text = "T = " + std::to_string(cells.T) + ", B = " + std::to_string(cells.B) +
                     ", N = " + std::to_string(cells.N);
  if (cells.dense) return text + ", dense";
  text += ", active steps";
  for (int64_t n : cells.steps) text += " " + std::to_string(n);
  return text;
}

Sizes::Sizes(Random& random, const Cells& cells)
    : value(cells.B * cells.N, 1), buffer(cells.B * cells.N), given(random.chance(0.6)) {
  for (size_t i = 0; i < value.size(); ++i) {
    if (given) value[i] = random.between(1, 4);
    buffer[i] = value[i];
  }
}

}  // namespace atsnn
