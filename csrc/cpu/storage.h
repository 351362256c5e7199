// Storage types of the kernels and the arithmetic type each one is computed in.
#pragma once

#include <cstdint>
#include <cstring>

namespace atsnn {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Arithmetic is float32 for every storage type but float64 (which exists for gradient checks).
template <class Storage>
struct arithmetic {
  using type = float;
};
template <>
struct arithmetic<double> {
  using type = double;
};
template <class Storage>
using arithmetic_t = typename arithmetic<Storage>::type;

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(uint8_t x) { return x; }  // small integers, for reading only

inline float widen(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(float16 h) {
  const uint32_t magnitude = h.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  // The exponent is rebiased by a multiplication, which also normalises subnormals.
  float x = bits_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) x = bits_float(0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bits_float(float_bits(x) | sign);
}

template <class Storage>
Storage narrow(float x);
template <class Storage>
Storage narrow(double x);

template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}

// Round to nearest, ties to even; a NaN stays a NaN.
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t u = float_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
inline float16 narrow<float16>(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinities and NaN
    h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, rounded by the addition
    h = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace atsnn
