// neuron.h, against each column followed through time on its own.
#include "../../csrc/cpu/neuron.h"
#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 1500;
constexpr double pi = 3.14159265358979323846;

NeuronParams random_params(Random& random) {
  NeuronParams p;
  p.charge = random.pick({Charge::integrate, Charge::decay, Charge::no_decay});
  const double tau = random.pick({2.0, 1.5, 3.0});
  p.multiply = random.chance(0.5);
  p.factor = p.multiply ? 1 / tau : tau;
  p.v_threshold = random.pick({1.0, 0.5, 0.7});
  p.hard_reset = random.chance(0.5);
  p.v_reset = p.hard_reset ? random.pick({0.0, -0.25, 0.1}) : 0;
  p.detach_reset = random.chance(0.5);
  p.surrogate = random.pick({Surrogate::sigmoid, Surrogate::atan, Surrogate::piecewise_quadratic,
                             Surrogate::piecewise_exp, Surrogate::soft_sign, Surrogate::super_spike,
                             Surrogate::erf});
  p.alpha = random.pick({1.0, 2.0, 4.0});
  return p;
}

double derivative(const NeuronParams& p, double z) {
  const double alpha = p.alpha;
  switch (p.surrogate) {
    case Surrogate::sigmoid: {
      const double s = 1 / (1 + std::exp(-alpha * z));
      return alpha * s * (1 - s);
    }
    case Surrogate::atan:
      return alpha / 2 / (1 + std::pow(pi / 2 * alpha * z, 2));
    case Surrogate::piecewise_quadratic:
      return std::max(0.0, alpha - alpha * alpha * std::abs(z));
    case Surrogate::piecewise_exp:
      return alpha / 2 * std::exp(-alpha * std::abs(z));
    case Surrogate::soft_sign:
      return 1 / (2 * alpha * std::pow(1 / alpha + std::abs(z), 2));
    case Surrogate::super_spike:
      return alpha / std::pow(1 + std::abs(z), 2);
    case Surrogate::erf:
      return alpha / std::sqrt(pi) * std::exp(-std::pow(alpha * z, 2));
  }
  return 0;
}

// Rows of C elements, `stride` apart, and nothing behind the last one.
template <class S>
struct Strided {
  Array<S> buffer;
  int64_t stride;

  Strided(Random& random, const Cells& cells, int64_t C, Values values)
      : stride(cells.N == 1 ? random.pick<int64_t>({C, C, 0, C + 5}) : C) {
    const int64_t R = cells.rows;
    buffer = random_buffer<S>(random, R > 0 && C > 0 ? (R - 1) * stride + C : 0, values);
  }
  arithmetic_t<S> at(int64_t row, int64_t c) const { return widen(buffer[row * stride + c]); }
};

template <class S>
struct NeuronCase {
  using A = arithmetic_t<S>;
  Random random;
  Cells cells;
  int64_t C;
  NeuronParams p;
  Values values;
  Strided<S> x;
  Array<A> v_init;
  bool given;  // v_init is
  std::string name;
  std::vector<A> potential;  // [R, C], before the reset
  std::vector<A> before;     // [R, C], what each step began with
  std::vector<S> spikes;
  std::vector<A> v_final;

  NeuronCase(int i, const char* storage)
      : random(i),
        cells(random_cells(random)),
        C(random_channels(random)),
        p(random_params(random)),
        values(random.pick({Values::spikes, Values::integers, Values::reals, Values::reals})),
        x(random, cells, C, values),
        v_init(random_buffer<A>(random, cells.B * cells.N * C, values)),
        given(random.chance(0.5)),
        name("case " + std::to_string(i) + ", " + storage + ", C = " + std::to_string(C) + ", " +
             shown(cells)),
        potential(cells.rows * C),
        before(cells.rows * C),
        spikes(cells.rows * C) {
    for (int64_t column = 0; column < cells.B * cells.N * C; ++column) run(column);
  }

  int64_t element(int64_t t, int64_t column) const {
    const int64_t image = cells.N * C;
    return cells.at(t, column / image, column % image / C) * C + column % C;
  }
  int64_t steps(int64_t column) const { return cells.steps[column / C]; }

  // Every operation is rounded once, in this order.
  void run(int64_t column) {
    const A factor = p.factor, threshold = p.v_threshold, rest = p.v_reset;
    const auto part = [&](A change) { return p.multiply ? change * factor : change / factor; };
    A v = given ? v_init[column] : rest;
    for (int64_t t = 0; t < steps(column); ++t) {
      const int64_t i = element(t, column);
      const A in = x.at(i / C, i % C);
      A u = v + in;
      if (p.charge == Charge::decay) u = v + part(in - (v - rest));
      if (p.charge == Charge::no_decay) u = (v - part(v - rest)) + in;
      before[i] = v;
      potential[i] = u;
      spikes[i] = stored<S>(u >= threshold);
      v = u < threshold ? u : p.hard_reset ? rest : u - threshold;
    }
    v_final.push_back(v);
  }

  // Whether results may be written past the caches, but for their size (see can_stream).
  bool streams() {
    return std::is_same<S, A>::value && C * sizeof(S) % 64 == 0 && random.chance(0.5);
  }
};

template <class F>
void each_case(F f) {
  for (int i = 0; i < cases; ++i) {
    each_storage([&]<class S>(const char* storage) {
      NeuronCase<S> c(i, storage);
      f(c);
    });
  }
}

TEST(neuron_forward) {
  each_case([]<class S>(NeuronCase<S>& c) {
    for (Level level : levels()) {
      describe(c.name + ", " + level_name(level));
      const bool stream = c.streams();
      Array<S> spikes(c.spikes.size(), stream ? 64 : 16);
      Array<arithmetic_t<S>> v_final(c.v_final.size());
      const NeuronForward<S> a{c.x.buffer.data(), c.x.stride, c.given ? c.v_init.data() : nullptr,
                               spikes.data(),     stream,     v_final.data(),
                               c.cells.layout(),  c.C};
      in_pieces(c.random, neuron_tiles(a.layout, c.C, neuron_forward_tile),
                [&](int64_t begin, int64_t end) {
                  AT_LEVEL(level, neuron_forward<S>(a, c.p, begin, end));
                });
      CHECK_SAME(spikes, c.spikes);
      CHECK_SAME(v_final, c.v_final);
    }
  });
}

TEST(neuron_backward) {
  each_case([]<class S>(NeuronCase<S>& c) {
    using A = arithmetic_t<S>;
    const int64_t state = c.v_final.size(), image = c.cells.N * c.C;
    const Strided<S> grad(c.random, c.cells, c.C, Values::reals);
    const auto grad_v = random_buffer<A>(c.random, state, Values::reals);
    const bool with_spikes = c.random.chance(0.8), with_v = c.random.chance(0.7);
    const bool want_v = c.random.chance(0.7);
    const bool want_factor = c.p.charge != Charge::integrate && c.random.chance(0.6);
    const int64_t tiles = neuron_tiles(c.cells.layout(), c.C, neuron_backward_tile);

    const A threshold = c.p.v_threshold;
    const double rest = A(c.p.v_reset);
    const double rate = c.p.multiply ? c.p.factor : 1 / c.p.factor;
    const double to_x = c.p.charge == Charge::decay ? rate : 1;
    const double to_v = c.p.charge == Charge::integrate ? 1 : 1 - rate;
    std::vector<double> want_x(c.spikes.size()), want_v_init(state), want_rate(tiles);
    for (int64_t column = 0; column < state; ++column) {
      double gv = with_v ? grad_v[column] : 0, sum = 0;
      for (int64_t t = c.steps(column) - 1; t >= 0; --t) {
        const int64_t i = c.element(t, column);
        const double u = c.potential[i], slope = derivative(c.p, A(c.potential[i] - threshold));
        const double gs = with_spikes ? grad.at(i / c.C, i % c.C) : 0;
        double gu = c.p.hard_reset && c.potential[i] >= threshold ? 0 : gv;
        if (!c.p.detach_reset) gu += gv * slope * (c.p.hard_reset ? rest - u : -double(threshold));
        gu += gs * slope;
        want_x[i] = gu * to_x;
        gv = gu * to_v;
        const double in = c.p.charge == Charge::decay ? c.x.at(i / c.C, i % c.C) : 0;
        sum += gu * (in - (c.before[i] - rest));
      }
      want_v_init[column] = gv;
      if (!want_factor) continue;
      // Tiles run over the columns of an image, which are its tokens by rank.
      const int64_t b = column / image;
      const int64_t at = c.cells.rank(b, column % image / c.C) * c.C + column % c.C;
      want_rate[b * (tiles / c.cells.B) + at / neuron_backward_tile] += sum;
    }

    SameAtAllLevels<S> first_x;
    SameAtAllLevels<A> first_v;
    SameAtAllLevels<double> first_rate;
    for (Level level : levels()) {
      describe(c.name + ", " + level_name(level));
      const bool stream = c.streams();
      Array<S> grad_x(want_x.size(), stream ? 64 : 16);
      Array<A> grad_v_init(state), scratch(neuron_backward_scratch(c.cells.T, want_factor));
      Array<double> grad_rate(tiles);
      const NeuronBackward<S> a{c.x.buffer.data(),
                                c.x.stride,
                                c.given ? c.v_init.data() : nullptr,
                                with_spikes ? grad.buffer.data() : nullptr,
                                grad.stride,
                                with_v ? grad_v.data() : nullptr,
                                grad_x.data(),
                                stream,
                                want_v ? grad_v_init.data() : nullptr,
                                want_factor ? grad_rate.data() : nullptr,
                                c.cells.layout(),
                                c.C};
      in_pieces(c.random, tiles, [&](int64_t begin, int64_t end) {
        AT_LEVEL(level, neuron_backward<S>(a, c.p, scratch.data(), begin, end));
      });
      CHECK_VALUES(grad_x, want_x, false);
      CHECK_LEVELS(first_x, grad_x);
      if (want_v) {
        CHECK_VALUES(grad_v_init, want_v_init, false);
        CHECK_LEVELS(first_v, grad_v_init);
      }
      if (want_factor) {
        CHECK_NEAR(grad_rate, want_rate, sum_error<A>, sum_error<A> * 100);
        CHECK_LEVELS(first_rate, grad_rate);
      }
    }
  });
}

}  // namespace
}  // namespace atsnn
