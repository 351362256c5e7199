// The row kernels, written once and compiled for each instruction set (see simd-inl.h). Their loops
// run along the channels, element by element, and the compiler makes vectors of them.

#include "simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

ATSNN_INLINE double size_of(const float* sizes, const Layout& layout, int64_t b, int64_t rank) {
  return sizes ? sizes[b * layout.N + layout.token_at(b, rank)] : 1.0;
}

// narrow<S> of a float64 value: once, through the arithmetic type.
template <class S>
ATSNN_INLINE S from_double(double x) {
  return narrow<S>(static_cast<arithmetic_t<S>>(x));
}

// Calls f(begin, n) for the channels in pieces that fit an accumulator on the stack.
template <class F>
ATSNN_INLINE void each_channels(int64_t C, F f) {
  for (int64_t c = 0; c < C; c += channel_tile) f(c, std::min(channel_tile, C - c));
}

template <class S>
void gather_rows(const GatherRows<S>& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  if (C == 0) return;  // an empty tensor is null, which memcpy does not take
  for (int64_t i = begin; i < end; ++i) {
    S* out = a.out + i * C;
    if (a.index[i] < 0) {
      std::memset(static_cast<void*>(out), 0, C * sizeof(S));
      continue;
    }
    const S* x = a.x + a.index[i] * C;
    const double share = a.share ? a.share[i] : 1.0;
    if (share == 1.0) {
      std::memcpy(static_cast<void*>(out), x, C * sizeof(S));
    } else {
      for (int64_t c = 0; c < C; ++c) out[c] = from_double<S>(share * widen(x[c]));
    }
  }
}

template <class S>
void combine_rows(const CombineRows<S>& a, int64_t begin, int64_t end) {
  if (a.C == 0) return;  // an empty tensor is null, which memcpy does not take
  const double grid = std::ldexp(1.0, a.bits), step = std::ldexp(1.0, -a.bits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = a.first[i], last = a.first[i + 1];
    S* out = a.out + i * a.C;
    if (last - first == 1) {
      std::memcpy(static_cast<void*>(out), a.x + a.source[first] * a.C, a.C * sizeof(S));
      continue;
    }
    double total = 0;
    for (int64_t e = first; a.weight && e < last; ++e) total += a.weight[e];
    if (total == 0) total = 1;
    each_channels(a.C, [&](int64_t begin_c, int64_t n) {
      double sum[channel_tile] = {};
      for (int64_t e = first; e < last; ++e) {
        const S* x = a.x + a.source[e] * a.C + begin_c;
        const double weight = a.weight ? a.weight[e] : 1.0;
        for (int64_t c = 0; c < n; ++c) sum[c] += widen(x[c]) * weight;
      }
      if (a.weight) {
        for (int64_t c = 0; c < n; ++c) sum[c] = std::nearbyint(sum[c] / total * grid) * step;
      }
      for (int64_t c = 0; c < n; ++c) out[begin_c + c] = from_double<S>(sum[c]);
    });
  }
}

template <class S>
void sum_products(const SumProducts<S>& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<S>;
  const int64_t tiles = channel_tiles(a.C);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t run = item / tiles, b = run % a.layout.B;
    const int64_t c0 = item % tiles * channel_tile, n = std::min(channel_tile, a.C - c0);
    A sum[channel_tile] = {};
    for (int64_t row = a.layout.offsets[run]; row < a.layout.offsets[run + 1]; ++row) {
      const S *x = a.x + row * a.C + c0, *y = a.y + row * a.C + c0;
      const A size = static_cast<A>(size_of(a.sizes, a.layout, b, row - a.layout.offsets[run]));
      for (int64_t c = 0; c < n; ++c) sum[c] += A(widen(x[c]) * widen(y[c])) * size;
    }
    std::memcpy(a.out + run * a.C + c0, sum, n * sizeof(A));
  }
}

template <class S>
void scale_rows(const ScaleRows<S>& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<S>;
  const int64_t C = a.C;
  for (int64_t run = begin; run < end; ++run) {
    const A* factor = a.factor + run * C;
    const int64_t b = run % a.layout.B;
    for (int64_t row = a.layout.offsets[run]; row < a.layout.offsets[run + 1]; ++row) {
      const A size = static_cast<A>(size_of(a.sizes, a.layout, b, row - a.layout.offsets[run]));
      const S* x = a.x + row * C;
      S* out = a.out + row * C;
      for (int64_t c = 0; c < C; ++c) out[c] = narrow<S>(A(A(widen(x[c]) * size) * factor[c]));
    }
  }
}

template <class S>
void sum_steps(const SumSteps<S>& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.layout.N, rank = item % a.layout.N;
    float* out = a.out + (b * a.layout.N + a.layout.token_at(b, rank)) * C;
    std::fill(out, out + C, 0.0f);
    for (int64_t t = 0; t < a.layout.T && rank < a.layout.count(t, b); ++t) {
      const S* x = a.x + (a.layout.start(t, b) + rank) * C;
      for (int64_t c = 0; c < C; ++c) out[c] += static_cast<float>(widen(x[c]));
    }
  }
}

template <class S>
void readout_forward(const Readout<S>& a, double* out, int64_t begin, int64_t end) {
  const int64_t tiles = channel_tiles(a.C);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / tiles;
    const int64_t c0 = item % tiles * channel_tile, n = std::min(channel_tile, a.C - c0);
    double sum[channel_tile] = {};
    for (int64_t t = 0; t < a.layout.T; ++t) {
      const int64_t first = a.layout.start(t, b), count = a.layout.count(t, b);
      for (int64_t r = 0; r < count; ++r) {
        const double w = a.w[first + r] * size_of(a.sizes, a.layout, b, r);
        if (w == 0) continue;
        const S* x = a.x + (first + r) * a.C + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] += w * widen(x[c]);
      }
    }
    std::memcpy(out + b * a.C + c0, sum, n * sizeof(double));
  }
}

// A sum in eight strands, so that its order is the same at every width of vector.
constexpr int64_t strands = 8;
template <class F>
ATSNN_INLINE double strand_sum(int64_t n, F value) {
  double sum[strands] = {};
  int64_t i = 0;
  for (; i + strands <= n; i += strands) {
    for (int64_t j = 0; j < strands; ++j) sum[j] += value(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) sum[j] += value(i + j);
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

template <class S>
void readout_backward(const Readout<S>& a, const double* grad, S* grad_x, float* grad_w,
                      int64_t begin, int64_t end) {
  const int64_t C = a.C;
  for (int64_t run = begin; run < end; ++run) {
    const int64_t b = run % a.layout.B;
    const double* g = grad + b * C;
    for (int64_t row = a.layout.offsets[run]; row < a.layout.offsets[run + 1]; ++row) {
      const double size = size_of(a.sizes, a.layout, b, row - a.layout.offsets[run]);
      const double w = a.w[row] * size;
      const S* x = a.x + row * C;
      S* out = grad_x + row * C;
      for (int64_t c = 0; c < C; ++c) out[c] = from_double<S>(w * g[c]);
      grad_w[row] =
          static_cast<float>(size * strand_sum(C, [&](int64_t c) { return g[c] * widen(x[c]); }));
    }
  }
}

template <class S>
ATSNN_INLINE ScoreRow score_row(const Scores<S>& a, const S* x) {
  const int64_t C = a.C;
  const auto value = [&](int64_t c) { return static_cast<double>(widen(x[c])); };
  switch (a.score) {
    case Score::first:
      return {0, value(0), 0, 0};
    case Score::mean:
      return {0, strand_sum(C, value) / C, 0, 0};
    case Score::constant:
      return {0, 0, 0, 0};
    case Score::linear:
      break;
  }
  const double mean = strand_sum(C, value) / C;
  const double variance =
      strand_sum(C, [&](int64_t c) { return (value(c) - mean) * (value(c) - mean); }) / C;
  const double scale = 1.0 / std::sqrt(variance + 1e-5);  // as torch's layer_norm
  const double f =
      strand_sum(C, [&](int64_t c) { return (value(c) - mean) * scale * a.weight[c]; });
  return {0, f, mean, scale};
}

template <class S>
ATSNN_INLINE double score_input(const Scores<S>& a, double f) {
  return (a.score == Score::linear ? f : a.score == Score::constant ? 0 : a.weight[0] * f) + a.bias;
}

// f(x) alone.
template <class S>
ATSNN_INLINE double score_of(const Scores<S>& a, const S* x) {
  return score_row(a, x).f;
}

// Of bytes the linear score has its mean and variance from exact integer sums, in one pass of
// vectors four times as wide; the result differs in the last bits of f, which the rounding of h
// takes away.
ATSNN_INLINE double score_of(const Scores<uint8_t>& a, const uint8_t* x) {
  if (a.score != Score::linear) return score_row(a, x).f;
  int64_t sum = 0, squares = 0;
  constexpr int64_t piece = 1 << 15;  // 2^15 squares of bytes fit 32 bits
  for (int64_t c0 = 0; c0 < a.C; c0 += piece) {
    const int64_t n = std::min(piece, a.C - c0);
    uint32_t some = 0, some_squares = 0;
    for (int64_t c = 0; c < n; ++c) {
      const uint32_t value = x[c0 + c];
      some += value;
      some_squares += value * value;
    }
    sum += some;
    squares += some_squares;
  }
  const double C = static_cast<double>(a.C), mean = sum / C;
  const double variance = (a.C * squares - sum * sum) / (C * C);
  return strand_sum(a.C, [&](int64_t c) { return (x[c] - mean) * a.weight[c]; }) /
         std::sqrt(variance + 1e-5);
}

template <class S>
void scores_forward(const Scores<S>& a, float* h, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    h[row] = halting_score(score_input(a, score_of(a, a.x + row * a.C)));
  }
}

template <class S>
void scores_backward(const Scores<S>& a, const float* grad, S* grad_x, ScoreRow* found,
                     int64_t begin, int64_t end) {
  const int64_t C = a.C;
  for (int64_t row = begin; row < end; ++row) {
    ScoreRow& r = found[row];
    r = score_row(a, a.x + row * C);
    const double s = sigmoid(score_input(a, r.f));
    r.grad_z = grad[row] * (s * (1 - s));
    if (!grad_x) continue;
    S* out = grad_x + row * C;
    const bool mean = a.score == Score::mean;
    std::fill(out, out + C, from_double<S>(mean ? r.grad_z * a.weight[0] / C : 0.0));
    if (a.score == Score::first) out[0] = from_double<S>(r.grad_z * a.weight[0]);
  }
}

template <class S>
void scores_linear_backward(const Scores<S>& a, const ScoreRow* found, int64_t rows,
                            double* grad_weight, int64_t begin, int64_t end) {
  std::fill(grad_weight + begin, grad_weight + end, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    const ScoreRow r = found[row];
    const S* x = a.x + row * a.C;
    for (int64_t c = begin; c < end; ++c) {
      grad_weight[c] += r.grad_z * ((widen(x[c]) - r.mean) * r.scale);
    }
  }
}

template <class A>
void dots(const A* a, const A* const* b, int64_t n, int64_t C, double* out) {
  constexpr int64_t width = Simd<A>::width, together = 4;
  const int64_t whole = C / width * width;
  for (int64_t j = 0; j < n; j += together) {
    const int64_t some = std::min(together, n - j);
    const A* rows[together];
    for (int64_t i = 0; i < together; ++i) rows[i] = b[j + std::min(i, some - 1)];
    vec<A> sum[together] = {};
    for (int64_t c = 0; c < whole; c += width) {
      const vec<A> x = load(a + c);
      for (int64_t i = 0; i < together; ++i) sum[i] += x * load(rows[i] + c);
    }
    for (int64_t i = 0; i < some; ++i) {
      double total = 0;
      for (int64_t lane = 0; lane < width; ++lane) total += sum[i][lane];
      for (int64_t c = whole; c < C; ++c) total += double(a[c]) * rows[i][c];
      out[j + i] = total;
    }
  }
}

#define ATSNN_INSTANTIATE(S)                                                                   \
  template void gather_rows<S>(const GatherRows<S>&, int64_t, int64_t);                        \
  template void combine_rows<S>(const CombineRows<S>&, int64_t, int64_t);                      \
  template void sum_products<S>(const SumProducts<S>&, int64_t, int64_t);                      \
  template void scale_rows<S>(const ScaleRows<S>&, int64_t, int64_t);                          \
  template void sum_steps<S>(const SumSteps<S>&, int64_t, int64_t);                            \
  template void readout_forward<S>(const Readout<S>&, double*, int64_t, int64_t);              \
  template void readout_backward<S>(const Readout<S>&, const double*, S*, float*, int64_t,     \
                                    int64_t);                                                  \
  template void scores_forward<S>(const Scores<S>&, float*, int64_t, int64_t);                 \
  template void scores_backward<S>(const Scores<S>&, const float*, S*, ScoreRow*, int64_t,     \
                                   int64_t);                                                   \
  template void scores_linear_backward<S>(const Scores<S>&, const ScoreRow*, int64_t, double*, \
                                          int64_t, int64_t);
ATSNN_INSTANTIATE(float)
ATSNN_INSTANTIATE(double)
ATSNN_INSTANTIATE(bfloat16)
ATSNN_INSTANTIATE(float16)
#undef ATSNN_INSTANTIATE
template void readout_forward<uint8_t>(const Readout<uint8_t>&, double*, int64_t, int64_t);
template void scores_forward<uint8_t>(const Scores<uint8_t>&, float*, int64_t, int64_t);
template void dots<float>(const float*, const float* const*, int64_t, int64_t, double*);
template void dots<double>(const double*, const double* const*, int64_t, int64_t, double*);

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
