// halting.h: accumulators, weights and what runs next, against each token followed on its own.
#include "../../csrc/cpu/halting.h"
#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 2000;

// Multiples of 2^-18, as scores are, so that every sum is exact.
Array<float> scores(Random& random, int64_t n, double most) {
  Array<float> buffer(n);
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = std::nearbyint(random.uniform(0, most * 0x1p18)) * 0x1p-18;
  return buffer;
}

TEST(halting_step) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Cells cells = random_cells(random);
    const bool over_time = random.chance(0.5), final = random.chance(0.2);
    const float threshold = random.pick({0.99f, 0.5f, 0.0f, 100.0f});
    describe("case " + std::to_string(i) + ": " + shown(cells));
    const auto h = scores(random, cells.rows, 0.7), H = scores(random, cells.rows, 1.0);
    Array<float> w(cells.rows), H_after(cells.rows), scratch(2 * cells.N);
    Array<uint8_t> last(cells.rows);
    Array<int64_t> active_steps(cells.B * cells.N);
    halt_step({h.data(), H.data(), cells.layout(), over_time, threshold, final, w.data(),
               last.data(), H_after.data(), active_steps.data()},
              scratch.data());

    std::vector<float> want_w(cells.rows), want_H(cells.rows);
    std::vector<uint8_t> want_last(cells.rows);
    std::vector<int64_t> want_steps(cells.B * cells.N, 0);
    for (int64_t b = 0; b < cells.B; ++b) {
      for (int64_t k = 0; k < cells.N; ++k) {
        float so_far = 0;
        bool halted = final;
        for (int64_t t = 0; t < cells.steps[b * cells.N + k]; ++t) {
          const int64_t row = cells.at(t, b, k);
          so_far = over_time ? so_far + h[row] : h[row];
          want_H[row] = H[row] + so_far;
          halted = halted || want_H[row] >= threshold;
          want_w[row] = halted ? 1 - H[row] : so_far;
          want_last[row] = halted;
          want_steps[b * cells.N + k] += !halted;
        }
      }
    }
    CHECK_SAME(w, want_w);
    CHECK_SAME(last, want_last);
    CHECK_SAME(H_after, want_H);
    CHECK_SAME(active_steps, want_steps);
  }
}

TEST(halting_step_backward) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Cells cells = random_cells(random);
    const bool over_time = random.chance(0.5);
    const bool with_w = random.chance(0.8), with_H = random.chance(0.8);
    describe("case " + std::to_string(i) + ": " + shown(cells));
    const auto grad_w = random_buffer<float>(random, cells.rows, Values::integers);
    const auto grad_H = random_buffer<float>(random, cells.rows, Values::integers);
    Array<uint8_t> last(cells.rows);
    for (int64_t r = 0; r < cells.rows; ++r) last[r] = random.chance(0.4);
    Array<float> grad_h(cells.rows), grad_before(cells.rows), scratch(cells.N);
    halt_step_backward({with_w ? grad_w.data() : nullptr, with_H ? grad_H.data() : nullptr,
                        last.data(), cells.layout(), over_time, grad_h.data(), grad_before.data()},
                       scratch.data());

    // With over_time a score reaches every later accumulator of its token.
    std::vector<float> want_h(cells.rows, 0.0f), want_before(cells.rows);
    each_cell(cells, [&](int64_t t, int64_t b, int64_t k, int64_t row) {
      const float through_w = with_w ? grad_w[row] : 0, through_H = with_H ? grad_H[row] : 0;
      want_before[row] = last[row] ? through_H - through_w : through_H;
      for (int64_t s = over_time ? 0 : t; s <= t; ++s) {
        want_h[cells.at(s, b, k)] += last[row] ? through_H : through_H + through_w;
      }
    });
    CHECK_SAME(grad_h, want_h);
    CHECK_SAME(grad_before, want_before);
  }
}

}  // namespace
}  // namespace atsnn
