// Fixed-width vectors for one instruction set, through the compiler's vector extensions.
//
// Included once by each per-level file, after ATSNN_LEVEL (its namespace) and
// ATSNN_VECTOR_BYTES are defined. Every operation is elementwise IEEE arithmetic rounded once,
// so all levels give the same bits.
#ifndef ATSNN_LEVEL
#error "define ATSNN_LEVEL and ATSNN_VECTOR_BYTES before including simd-inl.h"
#endif

#define ATSNN_INLINE inline __attribute__((always_inline))

namespace atsnn {
namespace ATSNN_LEVEL {

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(ATSNN_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(ATSNN_VECTOR_BYTES)));
  static constexpr int width = ATSNN_VECTOR_BYTES / sizeof(float);
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(ATSNN_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(ATSNN_VECTOR_BYTES)));
  static constexpr int width = ATSNN_VECTOR_BYTES / sizeof(double);
};
template <class A>
using vec = typename Simd<A>::V;

template <class A>
ATSNN_INLINE vec<A> load(const A* p) {
  vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
ATSNN_INLINE void store(A* p, vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
ATSNN_INLINE vec<A> load_first(const A* p, int64_t n) {
  vec<A> v = {};
  std::memcpy(&v, p, n * sizeof(A));
  return v;
}

template <class A>
ATSNN_INLINE void store_first(A* p, vec<A> v, int64_t n) {
  std::memcpy(p, &v, n * sizeof(A));
}

template <class A>
ATSNN_INLINE vec<A> absolute(vec<A> x) {
  return x < 0 ? -x : x;
}

// exp for float32: Cody-Waite reduction by ln 2 and a degree-6 polynomial (relative error below
// 2e-7). The argument is clamped to where the result is a normal number.
ATSNN_INLINE vec<float> exponential(vec<float> x) {
  typedef Simd<float>::I I;
  x = x < -87.0f ? vec<float>{} - 87.0f : x;
  x = x > 88.0f ? vec<float>{} + 88.0f : x;
  const vec<float> shifted = x * 1.44269504088896341f + 0x1.8p23f;  // rounds to an integer
  const vec<float> n = shifted - 0x1.8p23f;
  const vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec<float> p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  vec<float> scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// float64 serves gradient checks only, where the library's exp is fast enough.
ATSNN_INLINE vec<double> exponential(vec<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
