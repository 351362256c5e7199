// Spiking attention of float32 spikes in counts, for heads of 16, 32, 48 or 64 channels.
//
// Where q, k and v are 0 and 1 every sum is a count, and four bits are a number of 0..15 to look
// up:
//   k^T v   for every four tokens a table holds the sums of each subset of their rows of v; the
//   spikes
//           of a channel of k at the four tokens say which one its row of k^T v takes;
//   q kv    for every four channels a table holds the sums of each subset of their rows of k^T v;
//   the
//           spikes of q there say which one an output row takes.
// So the work is the same whatever fired and nothing branches on it: at 5 to 15 % a branch that is
// taken wrong costs more than the additions it saves.

#include "simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

constexpr int64_t count_heads(int64_t d) { return 128 / std::clamp<int64_t>(d, 1, 128); }

typedef Simd<float>::I Ints;
// Rows are 32 or 64 counts, in whole vectors of either.
typedef uint8_t Bytes
    __attribute__((vector_size(ATSNN_VECTOR_BYTES > 32 ? 32 : ATSNN_VECTOR_BYTES)));
typedef uint16_t Counts __attribute__((vector_size(ATSNN_VECTOR_BYTES)));

// All bits set where x is 1; `other` keeps bits of what is neither 0 nor 1. Of the two only 1 has
// the bit that is looked at, and nothing else has just the bits of a 1.
ATSNN_INLINE Ints fired(const float* p, Ints& other) {
  constexpr int32_t one = 0x3f800000;
  Ints x;
  std::memcpy(&x, p, sizeof x);
  const Ints s = (x << 2) >> 31;
  other |= (s & one) ^ x;
  return s;
}

ATSNN_INLINE uint64_t spike_bits(const float* row, int64_t d, Ints& other) {
  constexpr int64_t width = Simd<float>::width;
  uint64_t bits = 0;
  for (int64_t c = 0; c < d; c += width) bits |= uint64_t{signs(fired(row + c, other))} << c;
  return bits;
}

ATSNN_INLINE void spike_bytes(const float* row, int64_t d, uint8_t* bytes, Ints& other) {
  constexpr int64_t width = Simd<float>::width;
  typedef uint8_t Quarter __attribute__((vector_size(ATSNN_VECTOR_BYTES / 4)));
  for (int64_t c = 0; c < d; c += width) {
    const Quarter held = __builtin_convertvector(fired(row + c, other), Quarter) & 1;
    std::memcpy(bytes + c, &held, sizeof held);
  }
}

ATSNN_INLINE bool any_bit(Ints v) {
  int32_t all = 0;
  for (int i = 0; i < Simd<float>::width; ++i) all |= v[i];
  return all != 0;
}

// Tokens whose tables are kept at a time: a bit of each makes up a word.
constexpr int64_t count_tokens = 64;

// The sums of each subset of four rows, [16, lanes]; subset 0 is of none.
template <class Vec, int NV, class T>
ATSNN_INLINE void sum_subsets(const T* rows, int64_t stride, T* sums) {
  constexpr int64_t width = sizeof(Vec) / sizeof(T), lanes = NV * width;
  for (int k = 0; k < NV; ++k) {
    Vec row[4], sum[16];
    for (int i = 0; i < 4; ++i) std::memcpy(&row[i], rows + i * stride + k * width, sizeof(Vec));
    sum[0] = Vec{};
    std::memcpy(sums + k * width, &sum[0], sizeof(Vec));
#pragma GCC unroll 15
    for (int number = 1; number < 16; ++number) {
      sum[number] = sum[number & (number - 1)] + row[__builtin_ctz(number)];
      std::memcpy(sums + number * lanes + k * width, &sum[number], sizeof(Vec));
    }
  }
}

// Bit i of word j becomes bit j of word i, for 32 words of 32 bits.
ATSNN_INLINE void transpose_bits(uint32_t* w) {
  uint32_t mask = 0x0000ffff;
  for (int step = 16; step > 0; step >>= 1, mask ^= mask << step) {
    for (int block = 0; block < 32; block += 2 * step) {
      for (int i = block; i < block + step; ++i) {
        const uint32_t swap = ((w[i] >> step) ^ w[i + step]) & mask;
        w[i] ^= swap << step;
        w[i + step] ^= swap;
      }
    }
  }
}

// kv += k^T v for up to 64 tokens: `bits` of k, and v as bytes of `lanes` channels, zeros behind
// them.
template <int FOURS>
struct HeadCounts {
  static constexpr int64_t d = 4 * FOURS, lanes = d <= 32 ? 32 : 64;
  static constexpr int narrow = lanes / sizeof(Bytes), wide = 2 * lanes / sizeof(Counts);
  static constexpr int64_t narrow_width = sizeof(Bytes), wide_width = sizeof(Counts) / 2;

  alignas(64) uint8_t by_tokens[count_tokens / 4 * 16 * lanes];
  alignas(64) uint16_t kv[d * lanes];
  alignas(64) uint16_t by_channels[FOURS * 16 * lanes];

  ATSNN_NOINLINE void add_tokens(const uint64_t* bits, const uint8_t* v, int64_t n) {
    const int64_t fours = (n + 3) / 4;
    for (int64_t g = 0; g < fours; ++g) {
      sum_subsets<Bytes, narrow>(v + g * 4 * lanes, lanes, by_tokens + g * 16 * lanes);
    }
    for (int64_t c0 = 0; c0 < d; c0 += 32) {
      alignas(64) uint32_t low[32], high[32];
      for (int64_t r = 0; r < 32; ++r) {
        low[r] = r < n ? static_cast<uint32_t>(bits[r] >> c0) : 0;
        high[r] = r + 32 < n ? static_cast<uint32_t>(bits[r + 32] >> c0) : 0;
      }
      transpose_bits(low);
      transpose_bits(high);
      for (int64_t c = 0; c < std::min<int64_t>(32, d - c0); ++c) {
        const uint64_t fired = low[c] | uint64_t{high[c]} << 32;
        Bytes sum[narrow] = {};
        const auto add = [&](int64_t g) {
          const uint8_t* subset = by_tokens + (g * 16 + (fired >> 4 * g & 15)) * lanes;
          for (int k = 0; k < narrow; ++k) {
            Bytes held;
            std::memcpy(&held, subset + k * narrow_width, sizeof held);
            sum[k] += held;
          }
        };
        if (fours == count_tokens / 4) {
#pragma GCC unroll 16
          for (int64_t g = 0; g < count_tokens / 4; ++g) add(g);
        } else {
          for (int64_t g = 0; g < fours; ++g) add(g);
        }
        alignas(64) uint8_t counts[lanes];
        std::memcpy(counts, sum, sizeof sum);
        uint16_t* row = kv + (c0 + c) * lanes;
        for (int64_t i = 0; i < lanes; ++i) row[i] += counts[i];
      }
    }
  }

  void prepare_look_up() {
    for (int64_t g = 0; g < FOURS; ++g) {
      sum_subsets<Counts, wide>(kv + g * 4 * lanes, lanes, by_channels + g * 16 * lanes);
    }
  }

  ATSNN_NOINLINE void look_up(const uint64_t* bits, int64_t n, float* out, int64_t stride,
                              float scale) const {
    for (int64_t r = 0; r < n; ++r) {
      Counts sum[wide] = {};
      const uint64_t fired = bits[r];
#pragma GCC unroll 16
      for (int64_t g = 0; g < FOURS; ++g) {
        const uint16_t* subset = by_channels + (g * 16 + (fired >> 4 * g & 15)) * lanes;
        for (int k = 0; k < wide; ++k) {
          Counts held;
          std::memcpy(&held, subset + k * wide_width, sizeof held);
          sum[k] += held;
        }
      }
      alignas(64) uint16_t counts[lanes];
      std::memcpy(counts, sum, sizeof sum);
      float* row = out + r * stride;
      for (int64_t c = 0; c < d; ++c) row[c] = scale * static_cast<float>(int32_t{counts[c]});
    }
  }
};

// Heads `head` .. `head + heads` of the n rows at `first`, if all is binary and every sum fits;
// otherwise nothing is written and the answer is no.
template <int FOURS>
bool count_attention(const AttentionForward<float>& a, int64_t first, int64_t n, int64_t head,
                     int64_t heads, void* scratch) {
  using Tables = HeadCounts<FOURS>;
  constexpr int64_t d = Tables::d, lanes = Tables::lanes;
  const int64_t at = first * a.C + head * d, whole = (n + 3) / 4 * 4;
  auto* const kb = static_cast<uint64_t*>(scratch);
  auto* const qb = kb + heads * n;
  auto* const v8 = reinterpret_cast<uint8_t*>(qb + heads * n);
  auto* const tables = reinterpret_cast<Tables*>(
      (reinterpret_cast<uintptr_t>(v8 + heads * whole * lanes) + 63) / 64 * 64);
  std::memset(v8, 0, heads * whole * lanes);
  Ints other = {};
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t x = at + r * a.C + h * d;
      kb[h * n + r] = spike_bits(a.k + x, d, other);
      qb[h * n + r] = spike_bits(a.q + x, d, other);
      spike_bytes(a.v + x, d, v8 + (h * whole + r) * lanes, other);
    }
  }
  if (any_bit(other)) return false;
  for (int64_t h = 0; h < heads; ++h) {
    std::memset(tables->kv, 0, sizeof tables->kv);
    for (int64_t r = 0; r < n; r += count_tokens) {
      tables->add_tokens(kb + h * n + r, v8 + (h * whole + r) * lanes,
                         std::min(count_tokens, n - r));
    }
    tables->prepare_look_up();
    tables->look_up(qb + h * n, n, a.out + at + h * d, a.C, static_cast<float>(a.scale));
  }
  return true;
}

// The same for a head of any size, and `no` for those that whole vectors do not make up, for tokens
// that have sizes, and for so many that a sum might not fit.
inline bool try_counts(const AttentionForward<float>& a, int64_t first, int64_t n, int64_t head,
                       int64_t heads, void* scratch) {
  const int64_t d = a.C / a.heads;
  if (a.sizes || n * d > 65535) return false;
  switch (d) {
    case 16:
      return count_attention<4>(a, first, n, head, heads, scratch);
    case 32:
      return count_attention<8>(a, first, n, head, heads, scratch);
    case 48:
      return count_attention<12>(a, first, n, head, heads, scratch);
    case 64:
      return count_attention<16>(a, first, n, head, heads, scratch);
    default:
      return false;
  }
}

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
