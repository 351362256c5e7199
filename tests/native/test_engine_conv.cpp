// Convolutions with neurons behind them, and pooling, against loops over the pixels.
#include <limits>

#include "engine_inputs.h"

namespace atsnn {
namespace {

// Calls f(y, x, tap) for the pixels of the window of output pixel (y, x) that exist.
template <class F>
void each_pixel(const Window& w, int64_t y, int64_t x, int64_t height, int64_t width, F f) {
  for (int64_t tap = 0; tap < w.taps(); ++tap) {
    const int64_t ny = y * w.stride_y - w.pad_y + tap / w.kernel_x;
    const int64_t nx = x * w.stride_x - w.pad_x + tap % w.kernel_x;
    if (ny >= 0 && ny < height && nx >= 0 && nx < width) f(ny, nx, tap);
  }
}

// Spikformer's window half of the time, else any that fits.
Window random_window(Random& random, int64_t height, int64_t width, const Window& usual) {
  if (random.chance(0.5)) return usual;
  Window w;
  do {
    w = {random.between(1, 4), random.between(1, 4), random.between(1, 3),
         random.between(1, 3), random.between(0, 2), random.between(0, 2)};
  } while (w.height(height) < 1 || w.width(width) < 1 || height + 2 * w.pad_y < w.kernel_y ||
           width + 2 * w.pad_x < w.kernel_x);
  return w;
}

// Which pixels of the input some of the output read.
void check_read(Random& random, const Window& window, int64_t height, int64_t width) {
  const int64_t h = window.height(height), w = window.width(width);
  Array<uint8_t> wanted(h * w);
  const double share = random.pick({0.0, 0.05, 0.5, 1.0});
  std::vector<uint8_t> want(height * width);
  for (int64_t i = 0; i < h * w; ++i) {
    wanted[i] = random.chance(share);
    each_pixel(window, i / w, i % w, height, width, [&](int64_t ny, int64_t nx, int64_t) {
      if (wanted[i]) want[ny * width + nx] = 1;
    });
  }
  Array<uint8_t> read(want.size());
  Array<uint8_t> row(width);
  mark_read(wanted.data(), window, height, width, read.data(), row.data());
  CHECK_SAME(read, want);
}

void check_pool(Random& random, uint64_t seed, int64_t maps, int64_t height, int64_t width) {
  const Window window = random_window(random, height, width, halving);
  const int64_t h = window.height(height), w = window.width(width);
  const int64_t channels = random.between(1, 130), stride = words(channels);
  const auto bits =
      random_bits(random, maps * height * width, channels, random_rate(random), stride);
  std::vector<uint64_t> want(maps * h * w * stride);
  Array<uint8_t> wanted(random.chance(0.5) ? maps * h * w : 0);
  for (int64_t i = 0; i < wanted.size(); ++i) wanted[i] = random.chance(0.3);
  for (int64_t i = 0; i < maps * h * w; ++i) {
    if (wanted.size() && !wanted[i]) continue;
    const int64_t map = i / (h * w), y = i / w % h, x = i % w;
    each_pixel(window, y, x, height, width, [&](int64_t ny, int64_t nx, int64_t) {
      for (int64_t j = 0; j < stride; ++j) {
        want[i * stride + j] |= bits[((map * height + ny) * width + nx) * stride + j];
      }
    });
  }
  describe("pool_bits, seed " + std::to_string(seed));
  Array<uint64_t> out(want.size());
  pool_bits(bits.data(), maps, height, width, stride, window, out.data(), 1,
            wanted.size() ? wanted.data() : nullptr);
  CHECK_SAME(out, want);
  check_read(random, window, height, width);
}

}  // namespace

void check_conv(uint64_t seed) {
  Random random(seed);
  const int64_t T = random.between(0, 4), B = random.between(0, 3);
  const bool floats = random.chance(0.3), still = floats && random.chance(0.5);
  const bool counted_input = !floats && random.chance(0.4);
  const bool pool = random.chance(0.4), some = random.chance(0.4);
  int64_t height, width, channels, outputs;
  do {
    height = random.pick<int64_t>({1, 2, 3, 4, 5, 7, 13, 20});
    width = random.pick<int64_t>({1, 2, 3, 4, 5, 7, 13, 20});
    channels =
        floats ? random.pick<int64_t>({1, 2, 3, 5, 16})
               : random.pick<int64_t>({1, 3, 6, 9, 16, 24, 49, 50, 64, 100, 149, 150, 200, 400});
    outputs = random.pick<int64_t>({1, 3, 16, 33, 64, 65, 130});
  } while (T * B * height * width * channels * outputs > 400000);
  const Window window = random_window(random, height, width, {});
  const bool same = window.stride_y == 1 && window.stride_x == 1 &&
                    window.kernel_y == 2 * window.pad_y + 1 &&
                    window.kernel_x == 2 * window.pad_x + 1;
  const int64_t shown_steps = still ? 1 : T, pixels = height * width;
  const int64_t full_h = window.height(height), full_w = window.width(width);
  const int64_t places = full_h * full_w;
  const int64_t h = pool ? halved(full_h) : full_h, w = pool ? halved(full_w) : full_w;
  Array<float> images(floats ? shown_steps * B * channels * pixels : 0);
  for (int64_t i = 0; i < images.size(); ++i) {
    images[i] = random.chance(0.1) ? 0 : random.between(-16, 16) * 0x1p-3f;
  }
  Array<uint64_t> bits;
  Array<uint8_t> counts(counted_input ? T * B * pixels * channels : 0);
  const double rate = random_rate(random);
  for (int64_t i = 0; i < counts.size(); ++i) {
    counts[i] = random.chance(rate) ? random.pick({1, 1, 2, 3, 255}) : 0;
  }
  if (!floats && !counted_input) {
    bits = random_bits(random, T * B * pixels, channels, random_rate(random), words(channels));
  }
  const Map map(random, outputs, window.taps() * channels);
  const NeuronParams p = random_neuron(random);
  const auto start = random_state(random, random.chance(0.5), B * h * w * outputs);
  const bool at_rest = random.chance(0.3);
  // The pixels whose neurons run, and those of the sums that they read.
  Array<uint8_t> wanted(some ? B * h * w : 0);
  const double share = random.pick({0.0, 0.05, 0.5, 1.0});
  for (int64_t i = 0; i < wanted.size(); ++i) wanted[i] = random.chance(share);
  std::vector<uint8_t> read(B * places, !some);
  for (int64_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) continue;
    const int64_t b = i / (h * w), y = i / w % h, x = i % w;
    if (!pool) read[i] = 1;
    each_pixel(halving, y, x, full_h, full_w, [&](int64_t ny, int64_t nx, int64_t) {
      if (pool) read[b * places + ny * full_w + nx] = 1;
    });
  }

  const auto input = [&](int64_t t, int64_t b, int64_t c, int64_t y, int64_t x) -> float {
    const int64_t pixel = ((t * B + b) * height + y) * width + x;
    if (counted_input) return counts[pixel * channels + c];
    if (!floats) return bit_at(bits, words(channels), pixel, c);
    return images[(((t * B + b) * channels + c) * height + y) * width + x];
  };
  Counted counted;
  std::vector<float> sums(shown_steps * B * places * outputs);
  for (int64_t i = 0; i < shown_steps * B * places; ++i) {
    const int64_t t = i / (B * places), b = i / places % B, y = i / full_w % full_h, x = i % full_w;
    float* sum = sums.data() + i * outputs;
    std::copy(map.bias.begin(), map.bias.end(), sum);
    each_pixel(window, y, x, height, width, [&](int64_t ny, int64_t nx, int64_t tap) {
      for (int64_t c = 0; c < channels; ++c) {
        map.add(tap * channels + c, input(t, b, c, ny, nx), sum);
      }
    });
    for (int64_t c = 0; same && read[b * places + y * full_w + x] && c < channels; ++c) {
      counted.input += input(t, b, c, y, x);
    }
  }
  const int64_t W = words(outputs);
  std::vector<uint64_t> want(T * B * h * w * W);
  std::vector<float> v =
      start.size() ? copied(start) : std::vector<float>(B * h * w * outputs, float(p.v_reset));
  for (int64_t i = 0; at_rest && T > 0 && i < int64_t(v.size()); ++i) {
    if (!some || wanted[i / outputs]) v[i] = p.v_reset;
  }
  for (int64_t i = 0; i < T * B * h * w; ++i) {
    const int64_t t = still ? 0 : i / (B * h * w), b = i / (h * w) % B, y = i / w % h, x = i % w;
    if (some && !wanted[i % (B * h * w)]) continue;
    const float* image = sums.data() + (t * B + b) * places * outputs;
    for (int64_t o = 0; o < outputs; ++o) {
      float sum =
          pool ? -std::numeric_limits<float>::infinity() : image[(y * full_w + x) * outputs + o];
      if (pool) {
        each_pixel(halving, y, x, full_h, full_w, [&](int64_t ny, int64_t nx, int64_t) {
          sum = std::max(sum, image[(ny * full_w + nx) * outputs + o]);
        });
      }
      if (!neuron_step(p, sum, v[i % (B * h * w) * outputs + o])) continue;
      set_bit(want, W, i, o);
      ++counted.spikes[0];
    }
  }
  v.resize(start.size());
  const std::string name =
      "T = " + std::to_string(T) + ", B = " + std::to_string(B) + ", " + std::to_string(height) +
      " x " + std::to_string(width) + ", " + std::to_string(channels) + " -> " +
      std::to_string(outputs) +
      (floats          ? still ? ", still" : ", floats"
       : counted_input ? ", counts"
                       : ", bits") +
      (pool ? ", pooled" : "") + (at_rest ? ", at rest" : "") + (some ? ", some pixels" : "") +
      ", window " + std::to_string(window.kernel_y) + " x " + std::to_string(window.kernel_x) +
      " / " + std::to_string(window.stride_y) + " " + std::to_string(window.stride_x) + " + " +
      std::to_string(window.pad_y) + " " + std::to_string(window.pad_x);
  each_kernels("conv", seed, name, [&](const Kernels& k) {
    std::vector<ChunkScratch> threads(random.pick({1, 1, 2, 5}));
    ConvLif a{floats ? images.data() : nullptr,
              bits.data(),
              channels,
              T,
              B,
              height,
              width,
              still,
              pool,
              &map.packed,
              p,
              nullptr,
              nullptr,
              window,
              counted_input ? counts.data() : nullptr};
    Array<uint64_t> out(want.size());
    Array<float> state(copied(start));
    a.out = out.data();
    a.state = state.data();
    if (some) a.wanted = wanted.data();
    a.at_rest = at_rest;
    const Counted got = run_conv_lif(a, k, threads);
    CHECK_SAME(out, want);
    CHECK_SAME(state, v);
    if (T * B == 0) return;
    // Of counts it is the number that are not 0.
    if (same && !counted_input) CHECK(got.input == counted.input);
    CHECK(got.spikes[0] == counted.spikes[0]);

    // The sums themselves.
    if (!pool && !still && !some) {
      Array<float> plain(sums.size());
      std::vector<float> want_sums(sums.size());
      for (size_t i = 0; i < sums.size(); ++i) {
        const int64_t row = i / outputs, o = i % outputs;
        want_sums[(row / places * outputs + o) * places + row % places] = sums[i];
      }
      ConvLif without = a;
      without.out = nullptr;
      without.state = nullptr;
      without.sums = plain.data();
      run_conv_lif(without, k, threads);
      CHECK_SAME(plain, want_sums);
    }

    // The same a timestep at a time.
    if (v.empty()) return;
    Array<uint64_t> split(want.size());
    Array<float> carried(copied(start));
    a.T = 1;
    a.state = carried.data();
    for (int64_t t = 0; t < T; ++t) {
      a.out = split.data() + t * B * h * w * W;
      a.at_rest = at_rest && t == 0;
      if (floats) a.images = images.data() + (still ? 0 : t * B * channels * pixels);
      if (counted_input) a.counts = counts.data() + t * B * pixels * channels;
      if (!floats && !counted_input) a.bits = bits.data() + t * B * pixels * words(channels);
      run_conv_lif(a, k, threads);
    }
    CHECK_SAME(split, want);
    CHECK_SAME(carried, v);
  });
  check_pool(random, seed, random.between(0, 3), height, width);
}

TEST(engine_conv) {
  for (uint64_t seed = 0; seed < 800; ++seed) check_conv(seed);
}

}  // namespace atsnn
