// Convolutions of narrow maps with their neurons, pixel by pixel. Included by per-level files.
#pragma once

#include "fire-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// The input of a strip as windows read it: for each row, timestep, part and place the taps of that
// part, side by side in a word, nothing where they lie outside. Rows are put together once for all
// of the kernel_y windows above each other that read them.
class WindowRows {
 public:
  WindowRows(const NarrowConv& a, const NarrowWords& words)
      : a_(a),
        words_(words),
        above_(a.strip.top * a.window.stride_y - a.window.pad_y),
        next_(above_),
        places_(a.window.width(a.width)),
        rows_((a.strip.bottom - a.strip.top - 1) * a.window.stride_y + a.window.kernel_y),
        windows_(a.room + a.T * rows_ * words.parts * places_) {}

  // Puts together what row `y` of the output reads; rows have to come in their order. Word i of
  // the window of place x at a timestep is at [(timestep * words.count() + i) * width + x].
  const uint64_t* of(int64_t y) {
    const int64_t first = y * a_.window.stride_y - a_.window.pad_y;
    for (next_ = std::max(next_, first); next_ < first + a_.window.kernel_y; ++next_) {
      for (int64_t t = 0; t < a_.T; ++t) put_together(next_, t);
    }
    uint64_t* to = windows_;
    for (int64_t t = 0; t < a_.T; ++t) {
      for (int64_t ky = 0; ky < a_.window.kernel_y; ky += words_.rows) {
        const int64_t n = words_.parts * places_;
        std::copy_n(at(first + ky, t), n, to);
        for (int64_t i = 1; i < std::min(words_.rows, a_.window.kernel_y - ky); ++i) {
          const uint64_t* const from = at(first + ky + i, t);
          const int64_t shift = i * words_.row_bits;
          for (int64_t x = 0; x < n; ++x) to[x] |= from[x] << shift;
        }
        to += n;
      }
    }
    return windows_;
  }

 private:
  uint64_t* at(int64_t row, int64_t t) const {
    return a_.room + (t * rows_ + row - above_) * words_.parts * places_;
  }

  void put_together(int64_t row, int64_t t) const {
    const Window& w = a_.window;
    uint64_t* to = at(row, t);
    std::fill_n(to, words_.parts * places_, uint64_t(0));
    if (row < 0 || row >= a_.height) return;
    const uint64_t* const from = a_.bits + t * a_.step + row * a_.width;
    for (int64_t kx = 0; kx < w.kernel_x; ++kx) {
      const auto [begin, end] = w.inside_x(kx, a_.width);
      const int64_t shift = kx % words_.taps * a_.channels, first = kx - w.pad_x;
      uint64_t* const part = to + kx / words_.taps * places_;
      if (w.stride_x == 1) {
        for (int64_t x = begin; x < end; ++x) part[x] |= from[x + first] << shift;
      } else {
        for (int64_t x = begin; x < end; ++x) part[x] |= from[x * w.stride_x + first] << shift;
      }
    }
  }

  const NarrowConv& a_;
  const NarrowWords words_;
  const int64_t above_;  // the row of the input that comes first
  int64_t next_;         // that has not been put together
  const int64_t places_, rows_;
  uint64_t* const windows_;
};

// Of `n` vectors of outputs.
template <Charge kind, bool multiply, bool hard, int n>
NarrowCounts narrow_of(const NarrowConv& a, const Constants<float>& settings) {
  const Constants<float> c = settings;
  constexpr int64_t width = Simd<float>::width;
  const Window w = a.window;
  const NarrowWords words(w, a.channels);
  const int64_t places = w.width(a.width), outputs = count_bits(a.valid), count = words.count();
  const float* weight[most_taps];  // of the inputs of each word of a window
  for (int64_t i = 0, first = 0; i < count; ++i) {
    weight[i] = a.weight + first * panel;
    const bool last = words.parts > 1 && (i + 1) % words.parts == 0;
    first += words.parts == 1 ? words.rows * words.row_bits
             : last           ? words.row_bits - (words.parts - 1) * words.part_bits
                              : words.part_bits;
  }
  const bool centred = w.pad_y < w.kernel_y && w.pad_x < w.kernel_x;
  vec<float> bias[n];
  for (int i = 0; i < n; ++i) bias[i] = load(a.bias + i * width);
  int64_t input_spikes = 0, spikes = 0;  // not in the result, which lies in memory
  WindowRows input(a, words);
  for (int64_t y = a.strip.top; y < a.strip.bottom; ++y) {
    const uint8_t* const wanted = a.strip.wanted ? a.strip.wanted + y * places : nullptr;
    if (wanted && !std::memchr(wanted, 1, places)) continue;
    const uint64_t* const windows = input.of(y);
    const int64_t centre_y = y * w.stride_y;
    // Places whose centre is inside.
    const int64_t counted = centred && centre_y < a.height ? (a.width - 1) / w.stride_x + 1 : 0;
    const uint64_t* const row = a.bits + centre_y * a.width;
    for (int64_t x = 0; x < places; ++x) {
      if (wanted && !wanted[x]) continue;
      const int64_t pixel = y * places + x;
      for (int64_t t = 0; x < counted && t < a.T; ++t) {
        input_spikes += count_bits(row[t * a.step + x * w.stride_x]);
      }
      float* const state = a.state ? a.state + pixel * outputs : nullptr;
      vec<float> v[n];
      load_state<n>(v, a.at_rest ? nullptr : state, outputs, c.v_reset);
      const uint64_t* word = windows + x;
      uint64_t* out = a.out + pixel;
      for (int64_t t = 0; t < a.T; ++t, out += a.out_step) {
        vec<float> sum[n];
        for (int i = 0; i < n; ++i) sum[i] = bias[i];
        for (int64_t i = 0; i < count; ++i, word += places) {
          const float* const from = weight[i];
          each_bit(*word, [&](int64_t bit) {
            for (int j = 0; j < n; ++j) sum[j] += load(from + bit * panel + j * width);
          });
        }
        const uint64_t fires = step_neurons<kind, multiply, hard, n>(v, sum, c) & a.valid;
        *out = fires;
        spikes += count_bits(fires);
      }
      store_state<n>(v, state, outputs);
    }
  }
  return {static_cast<double>(input_spikes), spikes};
}

// The same of a float image. What is zero is added too, which changes no sum.
template <Charge kind, bool multiply, bool hard, int n>
NarrowCounts image_of(const NarrowConv& a, const Constants<float>& settings) {
  const Constants<float> c = settings;
  constexpr int64_t width = Simd<float>::width;
  const int64_t outputs = count_bits(a.valid), pixels = a.height * a.width;
  const int64_t taps = a.window.taps(), channels = a.channels;
  vec<float> bias[n];
  for (int i = 0; i < n; ++i) bias[i] = load(a.bias + i * width);
  double input = 0;
  int64_t spikes = 0;
  each_window(a.window, a.height, a.width, a.strip, 0, [&](int64_t pixel, const Taps& at) {
    float* const state = a.state ? a.state + pixel * outputs : nullptr;
    vec<float> v[n], sum[n];
    load_state<n>(v, a.at_rest ? nullptr : state, outputs, c.v_reset);
    uint64_t* out = a.out + pixel;
    for (int64_t t = 0; t < a.T; ++t, out += a.out_step) {
      if (t == 0 || !a.still) {
        const float* const image = a.image + t * a.step;
        const float* weight = a.weight;
        for (int i = 0; i < n; ++i) sum[i] = bias[i];
        for (int64_t tap = 0; tap < taps; ++tap, weight += channels * panel) {
          const int64_t from = at[tap];
          for (int64_t channel = 0; from >= 0 && channel < channels; ++channel) {
            const vec<float> x = vec<float>{} + image[channel * pixels + from];
            for (int i = 0; i < n; ++i) sum[i] += x * load(weight + channel * panel + i * width);
          }
        }
        for (int64_t channel = 0; at.centre >= 0 && channel < channels; ++channel) {
          input += image[channel * pixels + at.centre];
        }
      }
      const uint64_t fires = step_neurons<kind, multiply, hard, n>(v, sum, c) & a.valid;
      *out = fires;
      spikes += count_bits(fires);
    }
    store_state<n>(v, state, outputs);
  });
  return {input, spikes};
}

// The rows of an image that a strip reads, row by row and channel by channel, with the margin that
// windows see around it: zeros.
void pad_image(const NarrowConv& a, int64_t pitch) {
  const Window& w = a.window;
  const int64_t top = a.strip.top * w.stride_y - w.pad_y;
  const int64_t rows = (a.strip.bottom - a.strip.top - 1) * w.stride_y + w.kernel_y;
  float* to = a.padded;
  for (int64_t row = top; row < top + rows; ++row) {
    for (int64_t channel = 0; channel < a.channels; ++channel, to += pitch) {
      std::fill_n(to, pitch, 0.0f);
      if (row < 0 || row >= a.height) continue;
      std::copy_n(a.image + (channel * a.height + row) * a.width, a.width, to + w.pad_x);
    }
  }
}

// Bit i of each element: whether that neuron of v[i] fires.
template <Charge kind, bool multiply, bool hard, int n>
ATSNN_INLINE Simd<float>::I step_words(vec<float>* v, const vec<float>* x,
                                       const Constants<float>& c) {
  Simd<float>::I word{};
  for (int i = 0; i < n; ++i) {
    const vec<float> u = charge<kind, multiply>(v[i], x[i], c);
    word |= (u >= c.v_threshold) & (1 << i);
    v[i] = reset<hard>(u, c);
  }
  return word;
}

// Words of the first `n` of a vector of neighbours, from bit `first` on.
ATSNN_INLINE void put_words(Simd<float>::I word, int64_t first, int64_t n, uint64_t* out) {
  typedef uint64_t Words __attribute__((vector_size(2 * ATSNN_VECTOR_BYTES)));
  Words words = __builtin_convertvector(word, Words) << first;
  if (first > 0) {
    Words before{};
    std::memcpy(&before, out, n * sizeof(uint64_t));
    words |= before;
  }
  if (n == Simd<float>::width) {
    std::memcpy(out, &words, sizeof words);
  } else {
    std::memcpy(out, &words, n * sizeof(uint64_t));
  }
}

// Apart, as what it counts would not stay in a register there.
ATSNN_NOINLINE int64_t count_row(const uint64_t* words, int64_t n) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) found += count_bits(words[i]);
  return found;
}

// The same of an image that stands still, of neurons that begin at rest and are not kept: a vector
// holds neighbouring places of an output, so that none of it is idle however few outputs are.
template <Charge kind, bool multiply, bool hard>
NarrowCounts still_image_of(const NarrowConv& a, const Constants<float>& settings) {
  const Constants<float> c = settings;
  constexpr int64_t width = Simd<float>::width;
  constexpr int n = 4;  // outputs at a time: their sums and membranes stay in registers
  const Window w = a.window;
  const int64_t outputs = count_bits(a.valid), places = w.width(a.width), channels = a.channels;
  const int64_t pitch = PaddedImage{w, a.width, channels}.pitch();
  pad_image(a, pitch);
  double input = 0;
  int64_t spikes = 0;
  for (int64_t y = a.strip.top; y < a.strip.bottom; ++y) {
    const float* const rows = a.padded + (y - a.strip.top) * w.stride_y * channels * pitch;
    for (int64_t first = 0; first < outputs; first += n) {
      const Simd<float>::I valid = Simd<float>::I{} + int32_t(a.valid >> first & ((1 << n) - 1));
      for (int64_t x = 0; x < places; x += width) {
        const float* weight = a.weight + first;
        vec<float> sum[n], v[n];
        for (int i = 0; i < n; ++i) {
          sum[i] = vec<float>{} + a.bias[first + i];
          v[i] = vec<float>{} + c.v_reset;
        }
        for (int64_t ky = 0; ky < w.kernel_y; ++ky) {
          for (int64_t kx = 0; kx < w.kernel_x; ++kx) {
            for (int64_t channel = 0; channel < channels; ++channel, weight += panel) {
              const vec<float> in = load(rows + (ky * channels + channel) * pitch + x + kx);
              for (int i = 0; i < n; ++i) sum[i] += in * weight[i];
            }
          }
        }
        const int64_t inside = std::min(places - x, width);
        uint64_t* out = a.out + y * places + x;
        for (int64_t t = 0; t < a.T; ++t, out += a.out_step) {
          put_words(step_words<kind, multiply, hard, n>(v, sum, c) & valid, first, inside, out);
        }
      }
    }
    for (int64_t t = 0; t < a.T; ++t)
      spikes += count_row(a.out + t * a.out_step + y * places, places);
    if (w.pad_y >= w.kernel_y || w.pad_x >= w.kernel_x || y * w.stride_y >= a.height) continue;
    const float* const row = a.image + y * w.stride_y * a.width;
    for (int64_t x = 0; x < std::min(places, a.width); ++x) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        input += row[channel * a.height * a.width + x];
      }
    }
  }
  return {input, spikes};
}

template <Charge kind, bool multiply, bool hard, int n>
NarrowCounts conv_of(const NarrowConv& a, const Constants<float>& c) {
  return a.image ? image_of<kind, multiply, hard, n>(a, c)
                 : narrow_of<kind, multiply, hard, n>(a, c);
}

NarrowCounts conv_narrow(const NarrowConv& a, const NeuronParams& p) {
  constexpr int64_t width = Simd<float>::width;
  const int64_t outputs = count_bits(a.valid);
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    constexpr Charge charge = kind.value;
    constexpr bool times = multiply.value, to_reset = hard.value;
    const Constants<float> c(p);
    constexpr int n = panel_vectors;
    if (a.padded) return still_image_of<charge, times, to_reset>(a, c);
    if (outputs <= n / 4 * width) return conv_of<charge, times, to_reset, n / 4>(a, c);
    if (outputs <= n / 2 * width) return conv_of<charge, times, to_reset, n / 2>(a, c);
    return conv_of<charge, times, to_reset, n>(a, c);
  });
}

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
