// Work on whole rows: gathering, merging, sums over tokens, readout, halting scores, dot products.
//
// Lists of rows come ready made (layout.h, merging.h); these kernels move and add channels. Sums
// run in an order that depends on the shape alone, so every level gives the same bits.
#pragma once

#include <cstdint>

#include "layout.h"
#include "storage.h"

namespace atsnn {

// out[i] = share[i] * x[index[i]]; zeros where index is -1; `share` null: copies.
template <class S>
struct GatherRows {
  const S* x;
  const int64_t* index;
  const double* share;
  S* out;
  int64_t C;
};

// out[i] = sum over the entries first[i] .. first[i + 1] of x[source[entry]], in float64. With
// `weight`, their weighted mean rounded to a multiple of 2^-bits, but a row alone is copied.
template <class S>
struct CombineRows {
  const S* x;
  const int64_t *first, *source;
  const double* weight;
  int bits;
  S* out;
  int64_t C;
};

// sum over the tokens of each (t, b) of size * x * y, [T, B, C].
template <class S>
struct SumProducts {
  const S *x, *y;      // [R, C]
  const float* sizes;  // [B, N] in token order, or null: all 1
  arithmetic_t<S>* out;
  Layout layout;
  int64_t C;
};

// out = size * x * factor[t, b], row by row.
template <class S>
struct ScaleRows {
  const S* x;
  const arithmetic_t<S>* factor;  // [T, B, C]
  const float* sizes;             // [B, N] in token order, or null: all 1
  S* out;
  Layout layout;
  int64_t C;
};

// sum over the timesteps of each token, [B, N, C] in token order.
template <class S>
struct SumSteps {
  const S* x;
  float* out;
  Layout layout;
  int64_t C;
};

// sum over timesteps and tokens of size * w * x, [B, C].
template <class S>
struct Readout {
  const S* x;          // [R, C]
  const float* w;      // [R]
  const float* sizes;  // [B, N] in token order, or null: all 1
  Layout layout;
  int64_t C;
};

enum class Score { first, mean, linear, constant };

// h = sigmoid(weight * f(x) + bias); see halting.h for the rounding.
template <class S>
struct Scores {
  const S* x;  // [R, C]
  Score score;
  const double* weight;  // one, or [C] for the linear score
  double bias;
  int64_t C;
};

// What the backward of the scores leaves of each row.
struct ScoreRow {
  double grad_z, f;    // the gradient before the sigmoid, and f(x)
  double mean, scale;  // of the layer normalisation, for the linear score
};

// Channels a thread takes at a time where the rows are few.
constexpr int64_t channel_tile = 128;
constexpr int64_t channel_tiles(int64_t C) { return (C + channel_tile - 1) / channel_tile; }

#define ATSNN_DECLARE_ROWS(LEVEL)                                                        \
  namespace LEVEL {                                                                      \
  /* rows of the result */                                                               \
  template <class S>                                                                     \
  void gather_rows(const GatherRows<S>&, int64_t begin, int64_t end);                    \
  template <class S>                                                                     \
  void combine_rows(const CombineRows<S>&, int64_t begin, int64_t end);                  \
  /* item = (t * B + b) * channel_tiles + tile */                                        \
  template <class S>                                                                     \
  void sum_products(const SumProducts<S>&, int64_t begin, int64_t end);                  \
  /* runs */                                                                             \
  template <class S>                                                                     \
  void scale_rows(const ScaleRows<S>&, int64_t begin, int64_t end);                      \
  /* item = b * N + rank */                                                              \
  template <class S>                                                                     \
  void sum_steps(const SumSteps<S>&, int64_t begin, int64_t end);                        \
  /* item = b * channel_tiles + tile */                                                  \
  template <class S>                                                                     \
  void readout_forward(const Readout<S>&, double* out, int64_t begin, int64_t end);      \
  /* runs; grad [B, C] */                                                                \
  template <class S>                                                                     \
  void readout_backward(const Readout<S>&, const double* grad, S* grad_x, float* grad_w, \
                        int64_t begin, int64_t end);                                     \
  /* rows */                                                                             \
  template <class S>                                                                     \
  void scores_forward(const Scores<S>&, float* h, int64_t begin, int64_t end);           \
  /* rows; grad_x null: not wanted */                                                    \
  template <class S>                                                                     \
  void scores_backward(const Scores<S>&, const float* grad, S* grad_x, ScoreRow* found,  \
                       int64_t begin, int64_t end);                                      \
  /* channels of the linear map's gradient, over all rows */                             \
  template <class S>                                                                     \
  void scores_linear_backward(const Scores<S>&, const ScoreRow* found, int64_t rows,     \
                              double* grad_weight, int64_t begin, int64_t end);          \
  /* see merging.h; exact where the sums are */                                          \
  template <class A>                                                                     \
  void dots(const A* a, const A* const* b, int64_t n, int64_t C, double* out);           \
  }
ATSNN_DECLARE_ROWS(portable)
ATSNN_DECLARE_ROWS(avx2)
ATSNN_DECLARE_ROWS(avx512)
#undef ATSNN_DECLARE_ROWS

}  // namespace atsnn
