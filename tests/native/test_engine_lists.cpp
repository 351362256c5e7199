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
