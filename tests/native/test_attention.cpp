// attention.h, against the sums over pairs of tokens.
#include <numeric>

#include "../../csrc/cpu/attention.h"
#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 200;

// Rows as the kernels read them, and their values.
template <class S>
struct Rows {
  Array<S> buffer;
  std::vector<double> value;

  explicit Rows(Array<S> x) : buffer(std::move(x)) {
    for (int64_t i = 0; i < buffer.size(); ++i) value.push_back(widen(buffer[i]));
  }
  const S* data() const { return buffer.data(); }
};

template <class S>
struct AttentionCase {
  Random random;
  Values values;
  Cells cells;
  Sizes sizes;
  int64_t heads, d, C;
  double scale;
  Rows<S> q, k, v, grad;

  explicit AttentionCase(int i)
      : random(i),
        values(random.pick({Values::spikes, Values::spikes, Values::integers, Values::reals})),
        cells(random_cells(random, {0, 1, 2, 5, 16, 20, 33, 64, 66})),
        sizes(random, cells),
        heads(random.pick<int64_t>({1, 1, 2, 3, 9})),
        d(random.pick<int64_t>({0, 1, 3, 8, 16, 16, 32, 48, 64, 64, 129})),
        C(heads * d),
        scale(exact() ? random.pick({0.125, 0.25, 1.0}) : random.uniform(0.1, 1)),
        q(rows()),
        k(rows()),
        v(rows()),
        grad(random_buffer<S>(random, elements(), exact() ? Values::integers : Values::reals)) {}

  bool exact() const { return values != Values::reals; }
  // Spikes or not, each on its own: what holds of all three must not be concluded from one.
  Rows<S> rows() {
    const bool spikes = random.chance(0.5);
    return Rows<S>(random_buffer<S>(random, elements(), spikes ? Values::spikes : values));
  }
  int64_t elements() const { return cells.rows * C; }
  int64_t items() const { return cells.layout().runs() * heads; }
  Array<char> scratch(bool backward) const {
    return Array<char>(attention_scratch<S>(cells.most_in_a_run(), d, backward), 64);
  }

  // Calls f(i, j, size of j, first channel) for every pair of rows of a run and every head.
  template <class F>
  void each_pair(F f) const {
    each_cell(cells, [&](int64_t t, int64_t b, int64_t, int64_t i) {
      for (int64_t token = 0; token < cells.N; ++token) {
        const int64_t j = cells.at(t, b, token);
        if (j < 0) continue;
        for (int64_t c = 0; c < C; c += d) f(i, j, sizes.value[b * cells.N + token], c);
      }
    });
  }
  double dot(const Rows<S>& x, int64_t i, const Rows<S>& y, int64_t j, int64_t c) const {
    return std::inner_product(&x.value[i * C + c], &x.value[i * C + c] + d, &y.value[j * C + c],
                              0.0);
  }
  // What a sum becomes once it is complete.
  std::vector<double> scaled(std::vector<double> sums) const {
    for (double& x : sums) x *= scale;
    return sums;
  }
};

// Calls f(case, what it is) for every case and storage type.
template <class F>
void each_case(F f) {
  for (int i = 0; i < cases; ++i) {
    each_storage([&]<class S>(const char* storage) {
      AttentionCase<S> c(i);
      const std::string name = "case " + std::to_string(i) + ", " + storage +
                               ", C = " + std::to_string(c.C) +
                               ", heads = " + std::to_string(c.heads) + ", " + shown(c.cells);
      f(c, name);
    });
  }
}

TEST(attention) {
  each_case([]<class S>(AttentionCase<S>& c, const std::string& name) {
    std::vector<double> want(c.elements());
    c.each_pair([&](int64_t i, int64_t j, double size, int64_t first) {
      const double weight = size * c.dot(c.q, i, c.k, j, first);
      for (int64_t e = first; e < first + c.d; ++e) {
        want[i * c.C + e] += weight * c.v.value[j * c.C + e];
      }
    });
    want = c.scaled(want);
    SameAtAllLevels<S> first;
    for (Level level : levels()) {
      describe(name + ", " + level_name(level));
      Array<S> out(c.elements());
      const AttentionForward<S> a{c.q.data(), c.k.data(),     c.v.data(),
                                  out.data(), c.sizes.data(), c.cells.layout(),
                                  c.C,        c.heads,        c.scale};
      auto scratch = c.scratch(false);
      in_pieces(c.random, c.items(), [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, attention_forward<S>(a, scratch.data(), begin, end));
      });
      CHECK_VALUES(out, want, c.exact());
      CHECK_LEVELS(first, out);
    }
  });
}

TEST(attention_backward) {
  each_case([]<class S>(AttentionCase<S>& c, const std::string& name) {
    std::vector<double> want_q(c.elements()), want_k(c.elements()), want_v(c.elements());
    c.each_pair([&](int64_t i, int64_t j, double size, int64_t first) {
      const double through = size * c.dot(c.grad, i, c.v, j, first);
      const double weight = size * c.dot(c.q, i, c.k, j, first);
      for (int64_t e = first; e < first + c.d; ++e) {
        want_q[i * c.C + e] += through * c.k.value[j * c.C + e];
        want_k[j * c.C + e] += through * c.q.value[i * c.C + e];
        want_v[j * c.C + e] += weight * c.grad.value[i * c.C + e];
      }
    });
    want_q = c.scaled(want_q);
    want_k = c.scaled(want_k);
    want_v = c.scaled(want_v);
    SameAtAllLevels<S> first_q, first_k, first_v;
    for (Level level : levels()) {
      describe(name + ", " + level_name(level));
      Array<S> grad_q(c.elements()), grad_k(c.elements()), grad_v(c.elements());
      const AttentionBackward<S> a{c.q.data(),       c.k.data(),    c.v.data(),    c.grad.data(),
                                   grad_q.data(),    grad_k.data(), grad_v.data(), c.sizes.data(),
                                   c.cells.layout(), c.C,           c.heads,       c.scale};
      auto scratch = c.scratch(true);
      in_pieces(c.random, c.items(), [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, attention_backward<S>(a, scratch.data(), begin, end));
      });
      CHECK_VALUES(grad_q, want_q, c.exact());
      CHECK_VALUES(grad_k, want_k, c.exact());
      CHECK_VALUES(grad_v, want_v, c.exact());
      CHECK_LEVELS(first_q, grad_q);
      CHECK_LEVELS(first_k, grad_k);
      CHECK_LEVELS(first_v, grad_v);
    }
  });
}

// All ones, [n, heads * d], but for one element that may differ.
Array<float> ones(int64_t n, int64_t C, int64_t at, float x) {
  Array<float> buffer(n * C);
  std::fill_n(buffer.data(), n * C, 1.0f);
  buffer[at] = x;
  return buffer;
}

void check_ones(int64_t n, int64_t d, const Array<float>& q, const Array<float>& k,
                const Array<float>& v, const std::vector<float>& want) {
  const Cells cells = dense_cells(1, 1, n);
  const int64_t heads = q.size() / (n * d);
  for (Level level : levels()) {
    describe("d = " + std::to_string(d) + ", n = " + std::to_string(n) + ", " + level_name(level));
    Array<float> out(q.size());
    Array<char> scratch(attention_scratch<float>(n, d, false), 64);
    const AttentionForward<float> a{q.data(),       k.data(),  v.data(), out.data(), nullptr,
                                    cells.layout(), heads * d, heads,    1.0};
    AT_LEVEL(level, attention_forward<float>(a, scratch.data(), 0, heads));
    CHECK_SAME(out, want);
  }
}

// Everything fires, on both sides of what sums of 16 bits could hold.
TEST(attention_largest_sums) {
  for (int64_t d : {16, 32, 48, 64}) {
    for (int64_t n : {d, int64_t(0xffff) / d, int64_t(0xffff) / d + 1, int64_t(0x1ffff) / d}) {
      const auto x = ones(n, 2 * d, 0, 1);
      check_ones(n, d, x, x, x, std::vector<float>(x.size(), n * d));
    }
  }
}

// One value that must not be taken for a spike, or for none.
TEST(attention_odd_values) {
  for (int64_t d : {8, 16, 32, 48, 64}) {
    const int64_t n = d + 1, row = n / 2, channel = d - 1, at = row * d + channel;
    const auto x = ones(n, d, 0, 1);
    for (float value : {2.0f, -1.0f, -0.0f, 0.0f, 0.5f, 3.0f}) {
      const auto odd = ones(n, d, at, value);
      std::vector<float> of_q(n * d, n * d), of_v(n * d, n * d);
      for (int64_t c = 0; c < d; ++c) of_q[row * d + c] = n * (d - 1 + value);
      for (int64_t r = 0; r < n; ++r) of_v[r * d + channel] = d * (n - 1 + value);
      check_ones(n, d, odd, x, x, of_q);
      check_ones(n, d, x, odd, x, std::vector<float>(n * d, n * d - 1 + value));
      check_ones(n, d, x, x, odd, of_v);
    }
  }
}

}  // namespace
}  // namespace atsnn
