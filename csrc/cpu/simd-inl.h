// Fixed-width vectors for one instruction set, through the compiler's vector extensions.
//
// Included once by each per-level file, after ATSNN_LEVEL (its namespace) and
// ATSNN_VECTOR_BYTES are defined. Every operation is elementwise IEEE arithmetic rounded once,
// so all levels give the same bits.
#pragma once
#ifndef ATSNN_LEVEL
#error "define ATSNN_LEVEL and ATSNN_VECTOR_BYTES before including simd-inl.h"
#endif

#define ATSNN_INLINE inline __attribute__((always_inline))
#define ATSNN_NOINLINE __attribute__((noinline))

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

// A store past the caches: of a large result the lines need not be read before they are written.
// `p` must be aligned to a vector.
template <class A>
ATSNN_INLINE void stream(A* p, vec<A> v) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__x86_64__) && ATSNN_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}

// Streamed stores are not ordered with others: this makes them seen before what follows.
ATSNN_INLINE void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class A>
ATSNN_INLINE vec<A> load_first(const A* p, int64_t n) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, float>) {
    return (vec<A>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
#endif
  vec<A> v = {};
  std::memcpy(&v, p, n * sizeof(A));
  return v;
}

template <class A>
ATSNN_INLINE void store_first(A* p, vec<A> v, int64_t n) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  }
#endif
  std::memcpy(p, &v, n * sizeof(A));
}

// a * b + c, of values whose product is exact, so that it is the same where it cannot be fused.
ATSNN_INLINE vec<double> fused(vec<double> a, vec<double> b, vec<double> c) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  return (vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__x86_64__) && ATSNN_VECTOR_BYTES == 32
  return (vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The larger of two; `b` where one is not a number. GCC does not make one instruction of it (nor
// take the unmasked AVX-512 form without a false warning).
ATSNN_INLINE vec<float> maximum(vec<float> a, vec<float> b) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  return (vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__x86_64__) && ATSNN_VECTOR_BYTES == 32
  return (vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

template <class A>
ATSNN_INLINE vec<A> absolute(vec<A> x) {
  typename Simd<A>::I bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= ~((typename Simd<A>::I{} + 1) << (8 * sizeof(A) - 1));
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// Bit i is set where element i is not `c`.
template <class A>
ATSNN_INLINE uint32_t differs(vec<A> v, A c) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(c), _CMP_NEQ_UQ);
  } else {
    return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(c), _CMP_NEQ_UQ);
  }
#elif defined(__x86_64__) && ATSNN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(c), _CMP_NEQ_UQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(c), _CMP_NEQ_UQ));
  }
#elif defined(__x86_64__)
  if constexpr (sizeof(A) == 4) {
    return _mm_movemask_ps(_mm_cmpneq_ps((__m128)v, _mm_set1_ps(c)));
  } else {
    return _mm_movemask_pd(_mm_cmpneq_pd((__m128d)v, _mm_set1_pd(c)));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<A>::width; ++i) bits |= uint32_t(v[i] != c) << i;
  return bits;
#endif
}

// Bit i is set where element i is negative.
ATSNN_INLINE uint32_t signs(Simd<float>::I v) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)v);
#elif defined(__x86_64__) && ATSNN_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)v);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)v);
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<float>::width; ++i) bits |= uint32_t(v[i] < 0) << i;
  return bits;
#endif
}

constexpr double log2_e = 1.44269504088896340736;

// 2^y for float32 and y <= 0: 2^n times a degree-5 minimax polynomial for 2^f, f in [-1/2, 1/2]
// (relative error below 2e-7). Below -124 it stays at 2^-124.
ATSNN_INLINE vec<float> exp2_of_negative(vec<float> y) {
  typedef Simd<float>::I I;
  y = maximum(y, vec<float>{} - 124.0f);
  const vec<float> shifted = y + 0x1.8p23f;  // rounds to an integer, which its low bits hold
  const vec<float> f = y - (shifted - 0x1.8p23f);
  vec<float> p = f * 0.0013276472f + 0.009675541f;
  p = p * f + 0.05550713f;
  p = p * f + 0.2402212f;
  p = p * f + 0.69314694f;
  p = p * f + 1.0000001f;
  I bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;  // p lies in [0.7, 1.42] and n >= -125, so the exponent stays normal
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// float64 serves gradient checks only, where the library's exp2 is fast enough.
ATSNN_INLINE vec<double> exp2_of_negative(vec<double> y) {
  for (int i = 0; i < Simd<double>::width; ++i) y[i] = std::exp2(y[i]);
  return y;
}

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
