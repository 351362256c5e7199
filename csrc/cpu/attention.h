// Spiking self-attention over the runs of active rows: declarations.
//
// The formula's home is `spiking_attention` in src/atsnn/reference.py. For the rows of one
// (timestep, image) and the channels of one head:
//   out = scale * q @ (k^T @ diag(size) @ v)  =  scale * (q @ k^T) @ diag(size) @ v
// Spikes are 0 or 1 and mostly 0, so the products visit only what is not zero. Any finite values
// are taken (zeros are skipped, others multiplied); integer sums below 2^24 are exact in either
// order. Values are summed in arithmetic_t<S> in an order that depends on the shape alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "layout.h"
#include "storage.h"

namespace atsnn {

template <class S>
struct AttentionForward {
  const S *q, *k, *v;  // [R, C]
  S* out;              // [R, C]
  const float* sizes;  // [B, N] in token order, or null: all 1
  Layout layout;
  int64_t C, heads;  // heads divides C
  double scale;
};

template <class S>
struct AttentionBackward {
  const S *q, *k, *v, *grad_out;  // [R, C]
  S *grad_q, *grad_k, *grad_v;    // [R, C]
  const float* sizes;             // [B, N] in token order, or null: all 1
  Layout layout;
  int64_t C, heads;
  double scale;
};

// The cheaper order (the twin of attention_order in reference.py): q (k^T v) costs 2 n d^2
// products, (q k^T) v costs 2 n^2 d.
constexpr bool keys_first(int64_t tokens, int64_t head_dim) { return head_dim <= tokens; }

// Channels of a head as the kernels keep them: whole vectors of the widest set.
template <class A>
constexpr int64_t padded(int64_t head_dim) {
  constexpr int64_t lanes = 64 / sizeof(A);
  return (head_dim + lanes - 1) / lanes * lanes;
}

// Bytes of scratch (aligned to 64) a thread needs for runs of at most `tokens` rows: of q, k, v a
// bit for each value and a flag for each row; q, k, v and the gradient, where rows cannot be read
// in place; up to three [d, d] or two [n, n] matrices; eight rows.
template <class S>
size_t attention_scratch(int64_t tokens, int64_t head_dim, bool backward) {
  using A = arithmetic_t<S>;
  const int64_t wide = padded<A>(head_dim), words = (wide + 63) / 64;
  const size_t bits = 3 * tokens * (words * sizeof(uint64_t) + 1);
  const size_t rows = (backward ? 4 : 3) * tokens * wide;
  const size_t square = (backward ? 3 : 1) * head_dim * wide;
  const size_t products = (backward ? 2 : 1) * std::min(tokens, head_dim) * tokens;
  constexpr size_t lines = 16 * 64;  // each piece begins on a line of its own
  const size_t general = bits + (rows + std::max(square, products) + 8 * wide) * sizeof(A) + lines;
  if (backward || head_dim > 64) return general;
  // In counts (attention_counts-inl.h): of 128 channels, or one head, a bit of q and k and a byte
  // of v; tables of 16 rows for every four of 64 tokens and for every four channels; the product.
  const size_t lanes = head_dim <= 32 ? 32 : 64,
               heads = 128 / std::clamp<int64_t>(head_dim, 1, 128);
  const size_t spikes = heads * (tokens * 16 + (tokens + 3) * lanes);
  const size_t tables = 256 * lanes + (head_dim + 3) / 4 * 32 * lanes + 2 * head_dim * lanes;
  const size_t counts = spikes + tables + lines;
  return std::max(general, counts);
}

// Items are (run, head) pairs, head fastest: item = run * heads + head. Each item writes all its
// rows' channels; items do not touch each other's output.
#define ATSNN_DECLARE_ATTENTION(LEVEL)                                                    \
  namespace LEVEL {                                                                       \
  template <class S>                                                                      \
  void attention_forward(const AttentionForward<S>&, void* scratch, int64_t item_begin,   \
                         int64_t item_end);                                               \
  template <class S>                                                                      \
  void attention_backward(const AttentionBackward<S>&, void* scratch, int64_t item_begin, \
                          int64_t item_end);                                              \
  }
ATSNN_DECLARE_ATTENTION(portable)
ATSNN_DECLARE_ATTENTION(avx2)
ATSNN_DECLARE_ATTENTION(avx512)
#undef ATSNN_DECLARE_ATTENTION

}  // namespace atsnn
