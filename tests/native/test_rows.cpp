// rows.h: moving, adding and scoring rows.
#include "../../csrc/cpu/halting.h"
#include "../../csrc/cpu/rows.h"
#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 1000;

struct Case {
  Random random;
  Values values;
  bool exact;
  int64_t C;
  std::string name;

  Case(int i, const char* storage)
      : random(i),
        values(random.pick({Values::spikes, Values::integers, Values::reals})),
        exact(values != Values::reals),
        C(random_channels(random)),
        name("case " + std::to_string(i) + ", " + storage + ", C = " + std::to_string(C)) {}
  // Calls f(level) for every level, after telling what is tested.
  template <class F>
  void each_level(const std::string& more, F f) {
    for (Level level : levels()) {
      describe(name + ", " + level_name(level) + ", " + more);
      f(level);
    }
  }
};

// A case that has a layout and the sizes of its tokens.
struct LayoutCase : Case {
  Cells cells;
  Sizes sizes;

  LayoutCase(int i, const char* storage)
      : Case(i, storage), cells(random_cells(random)), sizes(random, cells) {}
  double size(int64_t b, int64_t k) const { return sizes.value[b * cells.N + k]; }
};

template <class F>
void each_case(F f) {
  for (int i = 0; i < cases; ++i) {
    each_storage([&]<class S>(const char* storage) { f.template operator()<S>(i, storage); });
  }
}

TEST(rows_gather) {
  each_case([]<class S>(int i, const char* storage) {
    Case c(i, storage);
    const int64_t from = c.random.between(0, 20), n = c.random.between(0, 20);
    const bool with_share = c.random.chance(0.5);
    const auto x = random_buffer<S>(c.random, from * c.C, c.values);
    Array<int64_t> index(n);
    Array<double> share(n);
    std::vector<S> want;
    for (int64_t r = 0; r < n; ++r) {
      index[r] = c.random.between(-1, from - 1);
      share[r] = c.random.pick({0.0, 0.25, 1.0, 1.0, 1.0 / 3});
      for (int64_t k = 0; k < c.C; ++k) {
        const double value = index[r] < 0 ? 0 : double(widen(x[index[r] * c.C + k]));
        want.push_back(stored<S>(with_share && index[r] >= 0 ? share[r] * value : value));
      }
    }
    c.each_level("gather", [&](Level level) {
      Array<S> out(n * c.C);
      const GatherRows<S> a{x.data(), index.data(), with_share ? share.data() : nullptr, out.data(),
                            c.C};
      in_pieces(c.random, n, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, gather_rows<S>(a, begin, end));
      });
      CHECK_SAME(out, want);
    });
  });
}

TEST(rows_combine) {
  each_case([]<class S>(int i, const char* storage) {
    Case c(i, storage);
    const int64_t from = c.random.between(1, 20), n = c.random.between(0, 12);
    const bool weighted = c.random.chance(0.6);
    const int bits = c.random.pick({8, 18});
    const auto x = random_buffer<S>(c.random, from * c.C, c.values);
    std::vector<int64_t> starts{0};
    for (int64_t r = 0; r < n; ++r) starts.push_back(starts.back() + c.random.between(0, 4));
    const Array<int64_t> first(starts);
    Array<int64_t> source(starts.back());
    Array<double> weight(starts.back());
    for (int64_t e = 0; e < starts.back(); ++e) {
      source[e] = c.random.between(0, from - 1);
      weight[e] = c.random.between(0, 3);
    }
    // Entries are added in order, so that real values have only one result too.
    std::vector<S> want;
    for (int64_t j = 0; j < n * c.C; ++j) {
      const int64_t r = j / c.C;
      double sum = 0, total = 0;
      for (int64_t e = first[r]; e < first[r + 1]; ++e) {
        sum += widen(x[source[e] * c.C + j % c.C]) * (weighted ? weight[e] : 1);
        total += weight[e];
      }
      if (first[r + 1] - first[r] == 1) {
        want.push_back(x[source[first[r]] * c.C + j % c.C]);
        continue;
      }
      if (weighted) {
        sum = std::ldexp(std::nearbyint(std::ldexp(sum / (total == 0 ? 1 : total), bits)), -bits);
      }
      want.push_back(stored<S>(sum));
    }
    c.each_level("combine", [&](Level level) {
      Array<S> out(n * c.C);
      const CombineRows<S> a{
          x.data(),   first.data(), source.data(), weighted ? weight.data() : nullptr, bits,
          out.data(), c.C};
      in_pieces(c.random, n, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, combine_rows<S>(a, begin, end));
      });
      CHECK_SAME(out, want);
    });
  });
}

TEST(rows_sum_products) {
  each_case([]<class S>(int i, const char* storage) {
    using A = arithmetic_t<S>;
    LayoutCase c(i, storage);
    const auto x = random_buffer<S>(c.random, c.cells.rows * c.C, c.values);
    const auto y = random_buffer<S>(c.random, c.cells.rows * c.C, c.values);
    std::vector<double> want(c.cells.T * c.cells.B * c.C);
    each_cell(c.cells, [&](int64_t t, int64_t b, int64_t k, int64_t row) {
      for (int64_t j = 0; j < c.C; ++j) {
        want[(t * c.cells.B + b) * c.C + j] +=
            c.size(b, k) * widen(x[row * c.C + j]) * widen(y[row * c.C + j]);
      }
    });
    SameAtAllLevels<A> first;
    c.each_level(shown(c.cells), [&](Level level) {
      Array<A> out(want.size());
      const SumProducts<S> a{x.data(), y.data(), c.sizes.data(), out.data(), c.cells.layout(), c.C};
      in_pieces(
          c.random, c.cells.T * c.cells.B * channel_tiles(c.C),
          [&](int64_t begin, int64_t end) { AT_LEVEL(level, sum_products<S>(a, begin, end)); });
      CHECK_VALUES(out, want, c.exact);
      CHECK_LEVELS(first, out);
    });
  });
}

TEST(rows_scale) {
  each_case([]<class S>(int i, const char* storage) {
    using A = arithmetic_t<S>;
    LayoutCase c(i, storage);
    const auto x = random_buffer<S>(c.random, c.cells.rows * c.C, c.values);
    const auto factor = random_buffer<A>(c.random, c.cells.T * c.cells.B * c.C, c.values);
    std::vector<S> want(c.cells.rows * c.C);
    each_cell(c.cells, [&](int64_t t, int64_t b, int64_t k, int64_t row) {
      for (int64_t j = 0; j < c.C; ++j) {
        const A sized = widen(x[row * c.C + j]) * A(c.size(b, k));
        want[row * c.C + j] = narrow<S>(A(sized * factor[(t * c.cells.B + b) * c.C + j]));
      }
    });
    c.each_level(shown(c.cells), [&](Level level) {
      Array<S> out(want.size());
      const ScaleRows<S> a{x.data(),   factor.data(),    c.sizes.data(),
                           out.data(), c.cells.layout(), c.C};
      in_pieces(c.random, c.cells.T * c.cells.B,
                [&](int64_t begin, int64_t end) { AT_LEVEL(level, scale_rows<S>(a, begin, end)); });
      CHECK_SAME(out, want);
    });
  });
}

TEST(rows_sum_steps) {
  each_case([]<class S>(int i, const char* storage) {
    LayoutCase c(i, storage);
    const auto x = random_buffer<S>(c.random, c.cells.rows * c.C, c.values);
    std::vector<double> want(c.cells.B * c.cells.N * c.C);
    each_cell(c.cells, [&](int64_t, int64_t b, int64_t k, int64_t row) {
      for (int64_t j = 0; j < c.C; ++j) {
        want[(b * c.cells.N + k) * c.C + j] += widen(x[row * c.C + j]);
      }
    });
    SameAtAllLevels<float> first;
    c.each_level(shown(c.cells), [&](Level level) {
      Array<float> out(want.size());
      const SumSteps<S> a{x.data(), out.data(), c.cells.layout(), c.C};
      in_pieces(c.random, c.cells.B * c.cells.N,
                [&](int64_t begin, int64_t end) { AT_LEVEL(level, sum_steps<S>(a, begin, end)); });
      CHECK_VALUES(out, want, c.exact);
      CHECK_LEVELS(first, out);
    });
  });
}

TEST(rows_readout) {
  each_case([]<class S>(int i, const char* storage) {
    LayoutCase c(i, storage);
    const int64_t B = c.cells.B, R = c.cells.rows, C = c.C;
    const auto x = random_buffer<S>(c.random, R * C, c.values);
    const auto w = random_buffer<float>(c.random, R, c.values);
    const auto grad = random_buffer<double>(c.random, B * C, c.values);
    std::vector<double> want(B * C), want_grad_w(R);
    std::vector<S> want_grad_x(R * C);
    each_cell(c.cells, [&](int64_t, int64_t b, int64_t k, int64_t row) {
      const double weight = w[row] * c.size(b, k);
      for (int64_t j = 0; j < C; ++j) {
        want[b * C + j] += weight * widen(x[row * C + j]);
        want_grad_x[row * C + j] = stored<S>(weight * grad[b * C + j]);
        want_grad_w[row] += c.size(b, k) * grad[b * C + j] * widen(x[row * C + j]);
      }
    });
    SameAtAllLevels<double> first_out;
    SameAtAllLevels<float> first_grad_w;
    c.each_level(shown(c.cells), [&](Level level) {
      Array<double> out(B * C);
      Array<S> grad_x(R * C);
      Array<float> grad_w(R);
      const Readout<S> a{x.data(), w.data(), c.sizes.data(), c.cells.layout(), C};
      in_pieces(c.random, B * channel_tiles(C), [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, readout_forward<S>(a, out.data(), begin, end));
      });
      in_pieces(c.random, a.layout.runs(), [&](int64_t begin, int64_t end) {
        AT_LEVEL(level,
                 readout_backward<S>(a, grad.data(), grad_x.data(), grad_w.data(), begin, end));
      });
      CHECK_VALUES(out, want, c.exact);
      CHECK_LEVELS(first_out, out);
      CHECK_SAME(grad_x, want_grad_x);
      CHECK_VALUES(grad_w, want_grad_w, c.exact);
      CHECK_LEVELS(first_grad_w, grad_w);
    });
  });
}

// ---- scores

struct NaiveScore {
  double f = 0, mean = 0, scale = 0, z = 0;
};

template <class S>
NaiveScore naive_score(const Scores<S>& a, const S* x) {
  NaiveScore s;
  double mean = 0, variance = 0;
  for (int64_t j = 0; j < a.C; ++j) mean += widen(x[j]);
  mean /= a.C;
  for (int64_t j = 0; j < a.C; ++j) variance += std::pow(widen(x[j]) - mean, 2);
  variance /= a.C;
  if (a.score == Score::first) s.f = widen(x[0]);
  if (a.score == Score::mean) s.f = mean;
  if (a.score == Score::linear) {
    s.mean = mean;
    s.scale = 1 / std::sqrt(variance + 1e-5);
    for (int64_t j = 0; j < a.C; ++j) s.f += (widen(x[j]) - mean) * s.scale * a.weight[j];
  }
  const bool by_weight = a.score == Score::first || a.score == Score::mean;
  s.z = (by_weight ? a.weight[0] * s.f : s.f) + a.bias;
  return s;
}

double naive_sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

TEST(rows_scores) {
  each_case([]<class S>(int i, const char* storage) {
    Case c(i, storage);
    c.C = std::max<int64_t>(c.C, 1);
    const int64_t R = c.random.between(0, 24), C = c.C;
    const auto score = c.random.pick({Score::first, Score::mean, Score::linear, Score::constant});
    const auto x = random_buffer<S>(c.random, R * C, c.values);
    const auto grad = random_buffer<float>(c.random, R, c.values);
    Array<double> weight(score == Score::linear ? C : 1);
    for (int64_t j = 0; j < weight.size(); ++j) weight[j] = c.random.uniform(-3, 3);
    const double bias = c.random.pick({0.0, -2.0, 1.5, 800.0, -800.0});
    const Scores<S> a{x.data(), score, weight.data(), bias, C};
    const bool reaches_x = score == Score::first || score == Score::mean;

    std::vector<double> want_h, want_z, want_f, want_x, want_mean, want_scale, want_weight(C);
    for (int64_t r = 0; r < R; ++r) {
      const NaiveScore s = naive_score(a, x.data() + r * C);
      const double sigmoid = naive_sigmoid(s.z), z = grad[r] * (sigmoid * (1 - sigmoid));
      want_h.push_back(std::nearbyint(sigmoid * 0x1p18) * 0x1p-18);
      want_z.push_back(z);
      want_f.push_back(s.f);
      want_mean.push_back(s.mean);
      want_scale.push_back(s.scale);
      for (int64_t j = 0; j < C; ++j) {
        want_x.push_back(score == Score::mean              ? z * weight[0] / C
                         : score == Score::first && j == 0 ? z * weight[0]
                                                           : 0);
        want_weight[j] += z * ((widen(x[r * C + j]) - s.mean) * s.scale);
      }
    }
    // Where the sum before the sigmoid is not exact, a score may be rounded the other way.
    const bool exact = score != Score::linear && (c.exact || score != Score::mean);
    SameAtAllLevels<float> first_h;
    SameAtAllLevels<S> first_x;
    SameAtAllLevels<double> first_weight;
    c.each_level("score " + std::to_string(int(score)), [&](Level level) {
      Array<float> h(R);
      in_pieces(c.random, R, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, scores_forward<S>(a, h.data(), begin, end));
      });
      CHECK_NEAR(h, want_h, 0, exact ? 0 : 0x1p-18);
      for (int64_t r = 0; r < R; ++r)
        CHECK(std::ldexp(h[r], 18) == std::rint(std::ldexp(h[r], 18)));
      CHECK_LEVELS(first_h, h);

      Array<S> grad_x(reaches_x ? R * C : 0);
      Array<ScoreRow> found(R);
      in_pieces(c.random, R, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level,
                 scores_backward<S>(a, grad.data(), grad_x.data(), found.data(), begin, end));
      });
      std::vector<double> z, f, mean, scale;
      for (int64_t r = 0; r < R; ++r) {
        z.push_back(found[r].grad_z);
        f.push_back(found[r].f);
        mean.push_back(found[r].mean);
        scale.push_back(found[r].scale);
      }
      CHECK_NEAR(z, want_z, 1e-9, 1e-9);
      CHECK_NEAR(f, want_f, 1e-9, 1e-9);
      CHECK_NEAR(mean, want_mean, 1e-9, 1e-9);
      CHECK_NEAR(scale, want_scale, 1e-9, 1e-9);
      if (reaches_x) CHECK_VALUES(grad_x, want_x, false);
      CHECK_LEVELS(first_x, grad_x);
      if (score != Score::linear) return;

      Array<double> grad_weight(C);
      in_pieces(c.random, C, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level,
                 scores_linear_backward<S>(a, found.data(), R, grad_weight.data(), begin, end));
      });
      CHECK_NEAR(grad_weight, want_weight, 1e-7, 1e-7);
      CHECK_LEVELS(first_weight, grad_weight);
    });
  });
}

// The engine's rows: scores of bytes are those of the same numbers as floats.
TEST(rows_scores_of_bytes) {
  for (int i = 0; i < cases; ++i) {
    Case c(i, "uint8");
    const int64_t R = c.random.between(0, 24);
    // More channels than one piece of the integer sums has, now and then.
    const int64_t C = i % 64 == 0 ? (1 << 15) + c.random.between(1, 99) : c.random.between(1, 99);
    const auto score = c.random.pick({Score::first, Score::mean, Score::linear, Score::constant});
    const int64_t most = c.random.pick({0, 1, 3, 255});
    Array<uint8_t> x(R * C);
    Array<float> same(R * C);
    for (int64_t j = 0; j < R * C; ++j) {
      x[j] = static_cast<uint8_t>(i % 5 == 0 ? most : c.random.between(0, most));
      same[j] = x[j];
    }
    Array<double> weight(score == Score::linear ? C : 1);
    for (int64_t j = 0; j < weight.size(); ++j) weight[j] = c.random.uniform(-3, 3) / std::sqrt(C);
    const Scores<uint8_t> a{x.data(), score, weight.data(), c.random.pick({0.0, -2.0, 1.5}), C};
    const Scores<float> b{same.data(), score, weight.data(), a.bias, C};
    SameAtAllLevels<float> first;
    c.each_level("score " + std::to_string(int(score)), [&](Level level) {
      Array<float> h(R), want(R);
      in_pieces(c.random, R, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, scores_forward<uint8_t>(a, h.data(), begin, end));
      });
      AT_LEVEL(level, scores_forward<float>(b, want.data(), 0, R));
      const std::vector<double> wanted(want.data(), want.data() + R);
      CHECK_NEAR(h, wanted, 0, score == Score::linear ? 0x1p-18 : 0);
      CHECK_LEVELS(first, h);
    });
  }
}

template <class A>
void check_dots(int i, const char* storage) {
  Case c(i, storage);
  const int64_t n = c.random.between(0, 11);
  const auto a = random_buffer<A>(c.random, c.C, c.values);
  std::vector<Array<A>> rows;
  Array<const A*> pointers(n);
  std::vector<double> want(n);
  for (int64_t j = 0; j < n; ++j) {
    rows.push_back(random_buffer<A>(c.random, c.C, c.values));
    pointers[j] = rows[j].data();
    for (int64_t k = 0; k < c.C; ++k) want[j] += double(a[k]) * rows[j][k];
  }
  c.each_level("dots", [&](Level level) {
    Array<double> out(n);
    AT_LEVEL(level, dots<A>(a.data(), pointers.data(), n, c.C, out.data()));
    CHECK_NEAR(out, want, 0, c.exact ? 0 : sum_error<A> * std::max<double>(1, c.C));
  });
}

TEST(rows_dots) {
  for (int i = 0; i < cases; ++i) {
    check_dots<float>(i, "float32");
    check_dots<double>(i, "float64");
  }
}

}  // namespace
}  // namespace atsnn
