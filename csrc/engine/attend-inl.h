// Spiking attention of bits with its neurons. Included by per-level files.
#pragma once

#include "fire-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// Word `i` of the bits offset .. offset + n of a row.
ATSNN_INLINE uint64_t bits_at(const uint64_t* row, int64_t offset, int64_t n, int64_t i) {
  const int64_t at = offset + i * word_bits, word = at / word_bits, shift = at % word_bits;
  const int64_t left = std::min(n - i * word_bits, word_bits);
  uint64_t bits = row[word] >> shift;
  if (shift && left > word_bits - shift) bits |= row[word + 1] << (word_bits - shift);
  return bits & valid_bits(left, 0);
}

// 0 or `one` for each bit of the n channels from a bit offset on.
ATSNN_INLINE void spread(const uint64_t* row, int64_t offset, int64_t n, float one, float* out) {
  constexpr int64_t width = Simd<float>::width;
  for (int64_t i = 0; i < words(n); ++i) {
    const uint64_t bits = bits_at(row, offset, n, i);
    const int64_t left = std::min(n - i * word_bits, word_bits);
    for (int64_t c = 0; c < left; c += width) {
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
      store(out + i * word_bits + c,
            (vec<float>)_mm512_maskz_mov_ps(__mmask16(bits >> c), _mm512_set1_ps(one)));
#else
      for (int64_t k = 0; k < width; ++k) {
        out[i * word_bits + c + k] = (bits >> (c + k)) & 1 ? one : 0.0f;
      }
#endif
    }
  }
}

// Accumulators in integers below 2^24, exact in float32 in any order.
template <Charge kind, bool multiply, bool hard>
int64_t attend_heads(const Attend& a, const NeuronParams& p, int64_t image, int64_t first_head,
                     int64_t heads, float* scratch) {
  const Constants<float> c(p);
  constexpr int64_t width = Simd<float>::width;
  const int64_t d = a.C / a.heads, wide = padded<float>(d), tokens = a.layout.N;
  float* const kv = scratch;           // [d, wide]
  float* const v_row = kv + d * wide;  // [wide]
  float* const sum = v_row + wide;     // [wide]
  float* const membrane = sum + wide;  // [tokens, wide]
  const int64_t group_word = first_head * d / word_bits;
  const int64_t group_words = words(first_head * d + heads * d) - group_word;
  int64_t spikes = 0;
  for (int64_t t = 0; t < a.layout.T; ++t) {
    const int64_t first = a.layout.start(t, image);
    for (int64_t r = 0; r < a.layout.count(t, image); ++r) {
      std::fill_n(a.out + (first + r) * a.out_stride + group_word, group_words, uint64_t(0));
    }
  }
  for (int64_t head = first_head; head < first_head + heads; ++head) {
    const int64_t offset = head * d;
    const int64_t present = a.layout.T ? a.layout.count(0, image) : 0;
    for (int64_t r = 0; r < present; ++r) {
      float* v = membrane + r * wide;
      std::fill_n(v, wide, c.v_reset);
      if (a.state && !a.at_rest) {
        const int64_t token = image * tokens + a.layout.token_at(image, r);
        std::memcpy(v, a.state + token * a.C + offset, d * sizeof(float));
      }
    }
    for (int64_t t = 0; t < a.layout.T; ++t) {
      const int64_t first = a.layout.start(t, image), n = a.layout.count(t, image);
      if (n == 0) break;
      std::fill_n(kv, d * wide, 0.0f);
      for (int64_t r = 0; r < n; ++r) {
        const uint64_t* k = a.k + (first + r) * a.in_stride;
        bool spread_yet = false;
        for (int64_t i = 0; i < words(d); ++i) {
          const uint64_t bits = bits_at(k, offset, d, i);
          if (!bits) continue;
          if (!spread_yet) {
            const float size =
                a.sizes ? a.sizes[image * tokens + a.layout.token_at(image, r)] : 1.0f;
            spread(a.v + (first + r) * a.in_stride, offset, d, size, v_row);
            spread_yet = true;
          }
          each_bit(bits, [&](int64_t bit) {
            float* row = kv + (i * word_bits + bit) * wide;
            for (int64_t j = 0; j < d; j += width) {
              store(row + j, load(row + j) + load(v_row + j));
            }
          });
        }
      }
      for (int64_t r = 0; r < n; ++r) {
        const uint64_t* q = a.q + (first + r) * a.in_stride;
        std::fill_n(sum, wide, 0.0f);
        for (int64_t i = 0; i < words(d); ++i) {
          each_bit(bits_at(q, offset, d, i), [&](int64_t bit) {
            const float* row = kv + (i * word_bits + bit) * wide;
            for (int64_t j = 0; j < d; j += width) store(sum + j, load(sum + j) + load(row + j));
          });
        }
        float* v = membrane + r * wide;
        uint64_t* out = a.out + (first + r) * a.out_stride;
        for (int64_t j = 0; j < d; j += width) {
          const vec<float> u = charge<kind, multiply>(load(v + j), load(sum + j) * a.scale, c);
          const uint64_t word = fired(u, c.v_threshold) & valid_bits(d - j, 0);
          store(v + j, reset<hard>(u, c));
          const int64_t at = offset + j, shift = at % word_bits;
          out[at / word_bits] |= word << shift;
          if (shift && word >> (word_bits - shift)) {
            out[at / word_bits + 1] |= word >> (word_bits - shift);
          }
          spikes += count_bits(word);
        }
      }
    }
    for (int64_t r = 0; a.state && r < present; ++r) {
      const int64_t token = image * tokens + a.layout.token_at(image, r);
      std::memcpy(a.state + token * a.C + offset, membrane + r * wide, d * sizeof(float));
    }
  }
  return spikes;
}

int64_t attend(const Attend& a, const NeuronParams& p, int64_t image, int64_t first_head,
               int64_t heads, float* scratch) {
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    return attend_heads<kind.value, multiply.value, hard.value>(a, p, image, first_head, heads,
                                                                scratch);
  });
}

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
