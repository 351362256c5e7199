// What is not zero: listed, counted, packed into bits and unpacked. Included by per-level files.
#pragma once

#include "../cpu/simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

int64_t count(const uint64_t* bits, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += count_bits(bits[i]);
  return sum;
}

#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
// Stores first + lane of the 16 lanes whose bit is set.
ATSNN_INLINE void list_lanes(__m512i first, __mmask16 some, uint16_t* index) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i set = _mm512_maskz_compress_epi32(some, _mm512_add_epi32(first, lane));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), _mm512_cvtepi32_epi16(set));
}

// The same with their values; returns how many there are.
ATSNN_INLINE int64_t list_values(int64_t first, __mmask16 some, __m512 x, uint16_t* index,
                                 float* value) {
  list_lanes(_mm512_set1_epi32(static_cast<int>(first)), some, index);
  _mm512_storeu_ps(value, _mm512_maskz_compress_ps(some, x));
  return count_bits(some);
}
#else
// Lists first + i for each set bit i, with x[i]; returns how many there are.
template <class X>
ATSNN_INLINE int64_t list_values(int64_t first, uint64_t some, const X* x, uint16_t* index,
                                 float* value) {
  each_bit(some, [&](int64_t bit) {
    *index++ = static_cast<uint16_t>(first + bit);
    *value++ = x[bit];
  });
  return count_bits(some);
}
#endif

int64_t list_bits(const uint64_t* bits, int64_t n, int64_t base, uint16_t* index) {
  const uint16_t* const begin = index;
  for (int64_t word = 0; word < n; ++word, base += word_bits) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
    if (!bits[word]) continue;
    for (int64_t i = 0; i < word_bits; i += 16) {
      const __mmask16 some = bits[word] >> i & 0xffff;
      list_lanes(_mm512_set1_epi32(static_cast<int>(base + i)), some, index);
      index += count_bits(some);
    }
#else
    each_bit(bits[word], [&](int64_t bit) { *index++ = static_cast<uint16_t>(base + bit); });
#endif
  }
  return index - begin;
}

int64_t list_bytes(const uint8_t* x, int64_t n, int64_t base, uint16_t* index, float* value) {
  int64_t found = 0;
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(valid_bits(n - i, 0));
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes, x + i);
    const __mmask16 some = _mm_test_epi8_mask(bytes, bytes);
    const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    found += list_values(base + i, some, wide, index + found, value + found);
  }
#else
  const auto list = [&](uint64_t some, int64_t i) {
    found += list_values(base + i, some, x + i, index + found, value + found);
  };
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 16 <= n; i += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    list(~_mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128())) & 0xffff, i);
  }
#endif
  for (; i < n; ++i) list(x[i] != 0, i);
#endif
  return found;
}

int64_t list_floats(const float* x, int64_t n, int64_t base, uint16_t* index, float* value) {
  int64_t found = 0;
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = static_cast<__mmask16>(valid_bits(n - i, 0));
    const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    const __mmask16 some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    found += list_values(base + i, some, v, index + found, value + found);
  }
#else
  constexpr int64_t width = Simd<float>::width;
  const auto list = [&](uint64_t some, int64_t i) {
    found += list_values(base + i, some, x + i, index + found, value + found);
  };
  int64_t i = 0;
  for (; i + width <= n; i += width) list(differs(load(x + i), 0.0f), i);
  for (; i < n; ++i) list(x[i] != 0, i);
#endif
  return found;
}

bool pack(const float* x, int64_t n, uint64_t* bits) {
  constexpr int64_t width = Simd<float>::width;
  bool binary = true;
  for (int64_t c = 0; c < n; c += word_bits) {
    const int64_t left = std::min(n - c, word_bits);
    uint64_t word = 0, others = 0;
    int64_t i = 0;
    for (; i + width <= left; i += width) {
      const vec<float> v = load(x + c + i);
      word |= uint64_t(differs(v, 0.0f)) << i;
      others |= uint64_t(differs(v, 1.0f)) << i;
    }
    for (; i < left; ++i) {
      word |= uint64_t(x[c + i] != 0) << i;
      others |= uint64_t(x[c + i] != 1) << i;
    }
    binary &= (word & others) == 0;
    bits[c / word_bits] = word;
  }
  return binary;
}

void unpack(const uint64_t* bits, int64_t n, float* x) {
  constexpr int64_t width = Simd<float>::width;
  const int64_t whole = n / width * width;
  float last[width];
  for (int64_t c = 0; c < n; c += width) {
    const uint64_t some = bits[c / word_bits] >> (c % word_bits);
    float* to = c < whole ? x + c : last;
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
    store(to, (vec<float>)_mm512_maskz_mov_ps(__mmask16(some), _mm512_set1_ps(1.0f)));
#else
    for (int64_t i = 0; i < width; ++i) to[i] = (some >> i) & 1 ? 1.0f : 0.0f;
#endif
  }
  if (whole < n) std::memcpy(x + whole, last, (n - whole) * sizeof(float));
}

// Pixels at a time between maps of channels and rows of pixels: their words stay in registers.
constexpr int64_t pixel_block = 64;

bool pack_pixels(const float* x, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                 uint64_t* bits) {
  const int64_t stride = words(channels);
  uint64_t others = 0;
  for (int64_t p = begin; p < end; p += pixel_block) {
    const int64_t n = std::min(end - p, pixel_block);
    for (int64_t w = 0; w < stride; ++w) {
      uint64_t word[pixel_block] = {}, other[pixel_block] = {};
      const int64_t left = std::min(channels - w * word_bits, word_bits);
      for (int64_t c = 0; c < left; ++c) {
        const float* row = x + (w * word_bits + c) * pixels + p;
        for (int64_t i = 0; i < n; ++i) {
          const uint64_t some = row[i] != 0;
          word[i] |= some << c;
          other[i] |= some & uint64_t(row[i] != 1);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        bits[(p + i) * stride + w] = word[i];
        others |= other[i];
      }
    }
  }
  return others == 0;
}

void unpack_pixels(const uint64_t* bits, int64_t channels, int64_t pixels, int64_t begin,
                   int64_t end, float* x) {
  const int64_t stride = words(channels);
  for (int64_t p = begin; p < end; p += pixel_block) {
    const int64_t n = std::min(end - p, pixel_block);
    for (int64_t w = 0; w < stride; ++w) {
      uint64_t word[pixel_block];
      for (int64_t i = 0; i < n; ++i) word[i] = bits[(p + i) * stride + w];
      const int64_t left = std::min(channels - w * word_bits, word_bits);
      for (int64_t c = 0; c < left; ++c) {
        float* row = x + (w * word_bits + c) * pixels + p;
        for (int64_t i = 0; i < n; ++i) row[i] = (word[i] >> c) & 1 ? 1.0f : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
