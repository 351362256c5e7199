// Whole networks: that executions, levels, batches and streams agree bit for bit.
#include <atomic>

#include "engine_inputs.h"

// Of the sanitizers' allocator_interface.h, which GCC does not install.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             size_t),
                                                         void (*free_hook)(const volatile void*));

namespace atsnn {
namespace {

// What a pass fills, in arrays of the exact size.
struct Results {
  int64_t L, T, B, N, outputs_an_image;
  Array<float> logits, scores, weights, block_sizes, sizes;
  Array<uint8_t> active;
  Array<int64_t> depth, source;
  Report report;

  Results(const NetworkConfig& c, int64_t T_, int64_t B_)
      : L(c.depth),
        T(T_),
        B(B_),
        N(c.grid() * c.grid()),
        outputs_an_image(c.outputs * (c.pixels ? N : 1)),
        logits(B * outputs_an_image),
        scores(L * T * B * N),
        weights(L * T * B * N),
        block_sizes(L * B * N),
        sizes(B * N),
        active(L * T * B * N),
        depth(T * B * N),
        source(B * N) {}
  Outputs outputs() {
    return {logits.data(),      active.data(), scores.data(), weights.data(),
            block_sizes.data(), sizes.data(),  depth.data(),  source.data()};
  }
};

// Elements of some images [first, first + n) of an array [outer, B, inner].
template <class T>
std::vector<T> images_of(const Array<T>& x, int64_t outer, int64_t B, int64_t first, int64_t n) {
  std::vector<T> part;
  const int64_t inner = B ? x.size() / (outer * B) : 0;
  for (int64_t i = 0; i < outer * n * inner; ++i) {
    part.push_back(x[(i / (n * inner) * B + first) * inner + i % (n * inner)]);
  }
  return part;
}

// `got` are images first .. first + got.B of `want`.
void check_results(const Results& got, const Results& want, int64_t first) {
  const auto same = [&](auto member, int64_t outer) {
    return images_of(want.*member, outer, want.B, first, got.B);
  };
  const int64_t L = want.L, T = want.T;
  CHECK_SAME(got.active, same(&Results::active, L * T));
  CHECK_SAME(got.scores, same(&Results::scores, L * T));
  CHECK_SAME(got.weights, same(&Results::weights, L * T));
  CHECK_SAME(got.block_sizes, same(&Results::block_sizes, L));
  CHECK_SAME(got.sizes, same(&Results::sizes, 1));
  CHECK_SAME(got.depth, same(&Results::depth, T));
  CHECK_SAME(got.source, same(&Results::source, 1));
  CHECK_SAME(got.logits, same(&Results::logits, 1));
}

// `whole`: both computed all of the stem, or both what the tokens that go on need.
void check_reports(const Report& got, const Report& want, bool whole = true) {
  CHECK_SAME(got.rows, want.rows);
  if (whole) {
    CHECK_SAME(got.stem_spikes, want.stem_spikes);
    CHECK_SAME(got.stem_pixels, want.stem_pixels);
  }
  CHECK_SAME(got.block_spikes, want.block_spikes);
  CHECK(got.ponder == want.ponder);
}

Engine::Options options(const Kernels& k, int threads, bool masked, StreamState* state = nullptr) {
  Engine::Options o{};
  o.kernels = &k;
  o.threads = threads;
  o.masked = masked;
  o.state = state;
  return o;
}

Network network(uint64_t seed) {
  Random random(seed);
  return random_network(random, random_config(random));
}

struct NetworkCase {
  Engine engine;
  const NetworkConfig& c;
  Random random;
  int64_t T, B, one;  // one: floats of an image
  bool still;
  Array<float> x;

  explicit NetworkCase(uint64_t seed)
      : engine(network(seed)),
        c(engine.network().config),
        random(seed + 1),
        T(c.T),
        B(c.grid() > 16 ? 4 : random.between(0, 4)),
        one(c.in_channels * c.image_size * c.image_size),
        still(random.chance(0.5)),
        x((still ? 1 : T) * B * one) {
    for (int64_t i = 0; i < x.size(); ++i) x[i] = random.between(-16, 16) * 0x1p-3f;
  }
  // Images first .. first + n, as they are given to a pass of their own.
  Array<float> some(int64_t first, int64_t n) const {
    return Array<float>(images_of(x, still ? 1 : T, B, first, n));
  }
  void run(const Array<float>& images, int64_t n, Results& out, const Kernels& k, bool masked,
           int threads) {
    engine.run({images.data(), still, T, n}, out.outputs(), options(k, threads, masked),
               out.report);
  }
  Results run(int64_t first, int64_t n, const Kernels& k, bool masked, int threads) {
    Results out(c, T, n);
    run(some(first, n), n, out, k, masked, threads);
    return out;
  }

  // In parts of one timestep or more, which must give what one call gave.
  void check_stream(const Results& want, const Kernels& k, bool masked, int64_t most) {
    StreamState state;
    state.start(engine.network(), B);
    const int64_t cells = B * want.N;
    for (int64_t t = 0, steps; t < T; t += steps) {
      steps = std::min(T - t, random.between(1, most));
      Results part(c, steps, B);
      const Array<float> images(std::vector<float>(x.data() + (still ? 0 : t * B * one),
                                                   x.data() + (still ? 1 : t + steps) * B * one));
      engine.run({images.data(), still, steps, B}, part.outputs(), options(k, 1, masked, &state),
                 part.report);
      const auto same = [&](const auto& array, int64_t l) {
        const auto* from = array.data() + (l * T + t) * cells;
        return std::vector(from, from + steps * cells);
      };
      for (int64_t l = 0; l < want.L; ++l) {
        const int64_t at = l * steps * cells;
        CHECK_SAME(part.active.data() + at, same(want.active, l));
        CHECK_SAME(part.scores.data() + at, same(want.scores, l));
        CHECK_SAME(part.weights.data() + at, same(want.weights, l));
      }
      CHECK_SAME(part.depth, same(want.depth, 0));
      if (t + steps == T) CHECK_SAME(part.logits, copied(want.logits));
    }
    CHECK(state.steps == T);
  }
};

// Scores from outside reach states that the model's own rarely do.
void check_given_scores(NetworkCase& a, uint64_t seed, const std::string& name) {
  if (a.c.halting == Accumulator::none || a.c.halting == Accumulator::sequential) return;
  Results want(a.c, a.T, a.B);
  Array<float> scores(want.scores.size());
  for (int64_t i = 0; i < scores.size(); ++i) scores[i] = a.random.pick({0.0f, 0.125f, 0.5f, 1.0f});
  const auto run = [&](Results& out, const Kernels& k, bool masked) {
    Engine::Options given = options(k, 1, masked);
    given.scores = scores.data();
    a.engine.run({a.x.data(), a.still, a.T, a.B}, out.outputs(), given, out.report);
  };
  run(want, portable_kernels, false);
  each_kernels("network, given scores", seed, name, [&](const Kernels& k) {
    for (const bool masked : {false, true}) {
      Results got(a.c, a.T, a.B);
      run(got, k, masked);
      check_results(got, want, 0);
      check_reports(got.report, want.report);
    }
  });
}

std::atomic<int64_t> allocations{0};

}  // namespace

void check_network(uint64_t seed) {
  NetworkCase a(seed);
  const std::string name = "B = " + std::to_string(a.B) + ", " + shown(a.c);
  describe("network, seed " + std::to_string(seed) + ", " + name);
  const Results want = a.run(0, a.B, portable_kernels, false, 1);
  each_kernels("network", seed, name, [&](const Kernels& k) {
    for (const bool masked : {false, true}) {
      describe(described() + (masked ? ", masked" : ", packed"));
      const Results got = a.run(0, a.B, k, masked, int(a.random.between(1, 3)));
      check_results(got, want, 0);
      check_reports(got.report, want.report, !masked || a.c.halting != Accumulator::sequential);
      for (size_t i = 0; masked && i < got.report.stem_pixels.size(); ++i) {
        CHECK(got.report.stem_pixels[i] >= want.report.stem_pixels[i]);
        CHECK(got.report.stem_spikes[i] >= want.report.stem_spikes[i] || i == layer::conv0_in);
      }
    }
    const bool masked = a.random.chance(0.5);
    describe(described() + ", images alone");
    for (int64_t first = 0, n; first < a.B; first += n) {
      n = std::min(a.B - first, a.random.pick<int64_t>({1, 1, 1, 2}));
      check_results(a.run(first, n, k, masked, 1), want, first);
    }
    if (a.c.merging) return;
    describe(described() + ", streamed");
    a.check_stream(want, k, masked, a.c.grid() > 16 ? 3 : a.random.pick<int64_t>({1, 1, 3}));
  });
  check_given_scores(a, seed, name);
  // Without a trace, and with spikes shown on the way: none fire beyond the last channel.
  describe("network, seed " + std::to_string(seed) + ", " + name + ", recorded");
  Results plain(a.c, a.T, a.B);
  Outputs logits{};
  logits.logits = plain.logits.data();
  Engine::Options recorded = options(kernels_of(levels().back()), 1, a.random.chance(0.5));
  recorded.record = [](const Recorded& r) {
    for (int64_t row = 0; row < r.layout.rows(); ++row) {
      const int64_t last = words(r.channels) - 1;
      CHECK((r.bits[row * r.stride + last] & ~valid_bits(r.channels, last)) == 0);
    }
  };
  a.engine.run({a.x.data(), a.still, a.T, a.B}, logits, recorded, plain.report);
  CHECK_SAME(plain.logits, copied(want.logits));
}

TEST(engine_network) {
  for (uint64_t seed = 0; seed < 90; ++seed) check_network(seed);
}

TEST(engine_allocates_once) {
  static const int hooks = __sanitizer_install_malloc_and_free_hooks(
      [](const volatile void*, size_t) { ++allocations; }, [](const volatile void*) {});
  CHECK(hooks > 0);
  for (uint64_t seed = 0; seed < 60; ++seed) {
    NetworkCase a(seed);
    const bool masked = a.random.chance(0.3);
    describe("allocations, seed " + std::to_string(seed) + ", " + shown(a.c));
    Results out(a.c, a.T, a.B);
    const Array<float> images = a.some(0, a.B);
    const auto run = [&] { a.run(images, a.B, out, kernels_of(levels().back()), masked, 2); };
    run();
    const int64_t before = allocations;
    for (int call = 0; call < 2; ++call) run();
    CHECK(allocations == before);
  }
}

}  // namespace atsnn
