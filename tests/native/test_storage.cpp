// The conversions of storage.h.
#include "inputs.h"

namespace atsnn {
namespace {

// Halves from their definition; infinities and what is not a number are left out.
double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A value between two neighbours, and on the tie, must go where the nearer (the even) one is.
template <class S>
void check_between(uint16_t bits) {
  const double low = widen(S{bits}), high = widen(S{uint16_t(bits + 1)});
  const uint16_t even = bits & 1 ? bits + 1 : bits;
  const std::vector<uint16_t> want{bits, bits, even, uint16_t(bits + 1)};
  std::vector<uint16_t> got;
  for (double part : {0.0, 0.25, 0.5, 0.75}) {
    got.push_back(narrow<S>(float(low + (high - low) * part)).bits);
  }
  for (size_t i = 0; i < want.size(); ++i) CHECK(got[i] == want[i]);
}

TEST(storage_half) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 h{uint16_t(bits)};
    describe("half " + std::to_string(bits));
    if ((bits & 0x7c00) == 0x7c00) {
      CHECK(std::isnan(widen(h)) == ((bits & 0x3ff) != 0));
      CHECK(std::isnan(widen(narrow<float16>(widen(h)))) == ((bits & 0x3ff) != 0));
      continue;
    }
    CHECK(widen(h) == half_value(h.bits));
    CHECK(std::signbit(widen(h)) == (bits >> 15));
    if ((bits & 0x7fff) < 0x7bff) check_between<float16>(h.bits);
  }
  CHECK(narrow<float16>(65519.0f).bits == 0x7bff);
  CHECK(narrow<float16>(65520.0f).bits == 0x7c00);
  CHECK(narrow<float16>(-1e30f).bits == 0xfc00);
}

TEST(storage_bfloat16) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    describe("bfloat16 " + std::to_string(bits));
    const bfloat16 x{uint16_t(bits)};
    if ((bits & 0x7f80) == 0x7f80) {
      CHECK(std::isnan(widen(narrow<bfloat16>(widen(x)))) == ((bits & 0x7f) != 0));
    } else if ((bits & 0x7fff) < 0x7f7f) {
      check_between<bfloat16>(x.bits);
    }
  }
}

}  // namespace
}  // namespace atsnn
