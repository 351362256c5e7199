// Bits, bytes and floats that are not zero: counted, listed, added, packed and unpacked.
#include "../../csrc/engine/rows.h"
#include "engine_inputs.h"

namespace atsnn {
namespace {

// Documented: so many entries past the last one may be overwritten.
constexpr int64_t slack = 16;

template <class T, class List>
void check_values(const Array<T>& x, int64_t base, List list) {
  std::vector<uint16_t> want;
  std::vector<float> want_value;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (x[i] == 0) continue;
    want.push_back(static_cast<uint16_t>(base + i));
    want_value.push_back(x[i]);
  }
  const int64_t n = want.size();
  Array<uint16_t> index(n + slack);
  Array<float> value(n + slack);
  CHECK(list(x.data(), x.size(), base, index.data(), value.data()) == n);
  CHECK_SAME(index, want);
  CHECK_SAME(value, want_value);
}

void check_packed(const Array<float>& x, const Kernels& k) {
  std::vector<uint64_t> want(words(x.size()));
  bool binary = true;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (x[i] != 0) set_bit(want, 0, 0, i);
    binary &= x[i] == 0 || x[i] == 1;
  }
  Array<uint64_t> bits(want.size());
  CHECK(k.pack(x.data(), x.size(), bits.data()) == binary);
  CHECK_SAME(bits, want);
}

}  // namespace

void check_lists(uint64_t seed) {
  Random random(seed);
  const int64_t n = random.pick<int64_t>({0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 200});
  const int64_t base = random.pick<int64_t>({0, 64, 1000, most_inputs + 1 - words(n) * word_bits});
  const double rate = random_rate(random);
  const auto bits = random_bits(random, 1, n, rate, words(n));
  Array<uint8_t> bytes(n);
  Array<float> floats(n), binary(n);
  std::vector<uint16_t> want;
  std::vector<uint8_t> want_bytes(n);
  std::vector<float> want_floats(n);
  for (int64_t i = 0; i < n; ++i) {
    const bool on = bit_at(bits, 0, 0, i);
    if (on) want.push_back(static_cast<uint16_t>(base + i));
    binary[i] = on;
    bytes[i] = random.chance(rate) ? random.between(1, 255) : 0;
    const float some = random.pick({1.0f, -0.75f, 3.5f, 1e-40f, float(random.uniform(-1, 1))});
    floats[i] = random.chance(rate) ? some : random.pick({0.0f, -0.0f});
    want_bytes[i] = bytes[i] / 2 + on;
    want_floats[i] = floats[i] + (on ? 1.0f : 0.0f);
  }
  each_kernels("lists", seed, "n = " + std::to_string(n), [&](const Kernels& k) {
    CHECK(k.count(bits.data(), bits.size()) == int64_t(want.size()));
    Array<uint16_t> index(want.size() + slack);
    CHECK(k.list_bits(bits.data(), bits.size(), base, index.data()) == int64_t(want.size()));
    CHECK_SAME(index, want);
    check_values(bytes, base, k.list_bytes);
    check_values(floats, base, k.list_floats);
    check_packed(floats, k);
    check_packed(binary, k);
    Array<float> unpacked(n);
    k.unpack(bits.data(), n, unpacked.data());
    CHECK_SAME(unpacked, copied(binary));
  });
  for (int64_t i = 0; i < n; ++i) bytes[i] /= 2;
  add_bits(bits.data(), n, bytes.data());
  CHECK_SAME(bytes, want_bytes);
  add_bits(bits.data(), n, floats.data());
  for (int64_t i = 0; i < n; ++i) CHECK(floats[i] == want_floats[i]);
}

// Maps of channels to rows of pixels and back, in two parts.
static void check_pixels(uint64_t seed) {
  Random random(seed);
  const int64_t channels = random.between(1, 140),
                pixels = random.pick<int64_t>({1, 5, 64, 70, 150});
  const int64_t stride = words(channels), half = random.between(0, pixels);
  const auto bits = random_bits(random, pixels, channels, random_rate(random), stride);
  Array<float> maps(channels * pixels);
  for (int64_t i = 0; i < maps.size(); ++i) {
    maps[i] = bit_at(bits, stride, i % pixels, i / pixels);
  }
  const int64_t odd = random.chance(0.5) ? random.between(0, maps.size() - 1) : -1;
  each_kernels("pixels", seed, std::to_string(channels) + " x " + std::to_string(pixels),
               [&](const Kernels& k) {
                 Array<float> back(maps.size());
                 k.unpack_pixels(bits.data(), channels, pixels, 0, half, back.data());
                 k.unpack_pixels(bits.data(), channels, pixels, half, pixels, back.data());
                 CHECK_SAME(back, copied(maps));
                 // One value that is no spike is told, where it is no zero.
                 if (odd >= 0 && back[odd] != 0) back[odd] = 2;
                 const bool binary = odd < 0 || back[odd] == 0;
                 Array<uint64_t> found(bits.size());
                 bool all = k.pack_pixels(back.data(), channels, pixels, 0, half, found.data());
                 all &= k.pack_pixels(back.data(), channels, pixels, half, pixels, found.data());
                 CHECK_SAME(found, copied(bits));
                 CHECK(all == binary);
               });
}

TEST(engine_pixels) {
  for (uint64_t seed = 0; seed < 500; ++seed) check_pixels(seed);
}

TEST(engine_lists) {
  for (uint64_t seed = 0; seed < 2000; ++seed) check_lists(seed);
}

TEST(engine_tiles) {
  for (int64_t inputs = 0; inputs < 2000; ++inputs) {
    const int64_t tile = tile_inputs(inputs, first_cache_inputs);
    CHECK(tile > 0 && tile % word_bits == 0);
    CHECK(tile <= first_cache_inputs);
  }
}

}  // namespace atsnn
