// The engine's kernels, written once and compiled for each instruction set (see simd-inl.h).

#include "../cpu/neuron_step-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

// ---- linear -------------------------------------------------------------------------------------

// Vectors of a panel, and those whose sums are kept in registers at a time.
constexpr int panel_vectors = panel / Simd<float>::width;
constexpr int together = panel_vectors < 8 ? panel_vectors : 8;

// `n` vectors from the panel's vector `part` on.
template <bool weighted, int n>
void add_vectors(const AddRows& a, int part) {
  constexpr int64_t width = Simd<float>::width;
  const char* ahead = reinterpret_cast<const char*>(a.ahead);
  for (int64_t j = 0; j < a.num_jobs; ++j) {
    const Job job = a.jobs[j];
    // Nothing is accessed, so the address may lie past the end.
    for (int64_t line = 0; line < a.ahead_lines; ++line, ahead += 64) {
      __builtin_prefetch(ahead, 0, 2);
    }
    const uint16_t* index = a.index + job.entry;
    const float* value = weighted ? a.value + job.entry : nullptr;
    float* const acc = a.acc + job.row * panel + part * width;
    const float* const from = a.bias ? a.bias + part * width : acc;
    const float* const weight = a.weight + part * width;
    vec<float> sum[n];
    for (int i = 0; i < n; ++i) sum[i] = load(from + i * width);
    for (int64_t e = 0; e < job.count; ++e) {
      const float* w = weight + int64_t(index[e]) * panel;
      if constexpr (weighted) {
        // A product rounded on its own: where the value is 1 it is the weight itself.
        const vec<float> x = vec<float>{} + value[e];
        for (int i = 0; i < n; ++i) sum[i] += x * load(w + i * width);
      } else {
        for (int i = 0; i < n; ++i) sum[i] += load(w + i * width);
      }
    }
    for (int i = 0; i < n; ++i) store(acc + i * width, sum[i]);
  }
}

template <bool weighted>
void add_panel(const AddRows& a) {
  constexpr int64_t width = Simd<float>::width;
  for (int part = 0; part < panel_vectors; part += together) {
    const int64_t left = a.outputs - part * width;
    if (left <= 0) return;
    if (left <= together / 4 * width) {
      add_vectors<weighted, together / 4>(a, part);
    } else if (left <= together / 2 * width) {
      add_vectors<weighted, together / 2>(a, part);
    } else {
      add_vectors<weighted, together>(a, part);
    }
  }
}

void add_rows(const AddRows& a) { a.value ? add_panel<true>(a) : add_panel<false>(a); }

// The sums of four weight rows, the first `inputs` of which exist, for `group_columns` outputs.
// Where a sum has no weight it is zero.
void build_table(const float* weight, int64_t inputs, float* table) {
  constexpr int64_t width = Simd<float>::width;
  for (int64_t c = 0; c < group_columns; c += width) {
    vec<float> sum[group_sums];
    sum[0] = vec<float>{};
    for (int64_t i = 0; i < group_inputs; ++i) {
      const vec<float> w = i < inputs ? load(weight + i * panel + c) : vec<float>{};
      const int64_t below = int64_t(1) << i;
      sum[below] = w;
      for (int64_t k = 1; k < below; ++k) sum[below + k] = sum[k] + w;
    }
    for (int64_t k = 0; k < group_sums; ++k) store(table + k * group_columns + c, sum[k]);
  }
}

// Groups of `tile` groups from `first` on, added to one half of the panel by tables.
void add_group_tile(const AddGroups& a, int64_t first, int64_t tile, int64_t column) {
  constexpr int64_t width = Simd<float>::width;
  constexpr int vectors = group_columns / width, few = vectors < 8 ? vectors : 8;
  for (int64_t g = 0; g < tile; ++g) {
    const int64_t input = (first + g) * group_inputs;
    build_table(a.weight + input * panel + column, std::min(group_inputs, a.inputs - input),
                a.table + g * group_sums * group_columns);
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    const uint16_t* code = a.code + first * a.rows + r * group_tile;
    float* const acc = a.acc + a.row[r] * panel + column;
    const float* const from = first == 0 ? a.bias + column : acc;
    for (int part = 0; part < vectors; part += few) {
      vec<float> sum[few];
      for (int i = 0; i < few; ++i) sum[i] = load(from + (part + i) * width);
      for (int64_t g = 0; g < tile; ++g) {
        const float* entry = a.table + (g * group_sums + code[g]) * group_columns + part * width;
        for (int i = 0; i < few; ++i) sum[i] += load(entry + i * width);
      }
      for (int i = 0; i < few; ++i) store(acc + (part + i) * width, sum[i]);
    }
  }
}

// One row, group by group, without tables.
void add_groups_of_row(const AddGroups& a, int64_t r) {
  constexpr int64_t width = Simd<float>::width;
  for (int64_t c = 0; c < panel; c += width) {
    vec<float> sum = load(a.bias + c);
    for (int64_t group = 0; group * group_inputs < a.inputs; ++group) {
      const int64_t input = group * group_inputs;
      uint64_t some = a.bits[r][input / word_bits] >> (input % word_bits) & (group_sums - 1);
      vec<float> four = vec<float>{};
      for (bool begun = false; some; some &= some - 1, begun = true) {
        const vec<float> w = load(a.weight + (input + __builtin_ctzll(some)) * panel + c);
        four = begun ? four + w : w;
      }
      sum += four;
    }
    store(a.acc + a.row[r] * panel + c, sum);
  }
}

// Building the tables costs about as much as this many rows do without them.
constexpr int64_t table_rows = 12;

void list_groups(const uint64_t* const* bits, int64_t rows, int64_t inputs, uint16_t* code) {
  if (rows < table_rows) return;
  const int64_t groups = (inputs + group_inputs - 1) / group_inputs;
  for (int64_t first = 0; first < groups; first += group_tile) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = first; g < std::min(first + group_tile, groups); ++g) {
        const int64_t input = g * group_inputs;
        *code++ = bits[r][input / word_bits] >> (input % word_bits) & (group_sums - 1);
      }
      code += first + group_tile - std::min(first + group_tile, groups);
    }
  }
}

void add_groups(const AddGroups& a) {
  if (a.rows < table_rows) {
    for (int64_t r = 0; r < a.rows; ++r) add_groups_of_row(a, r);
    return;
  }
  const int64_t groups = (a.inputs + group_inputs - 1) / group_inputs;
  for (int64_t first = 0; first < groups; first += group_tile) {
    const int64_t tile = std::min(group_tile, groups - first);
    for (int64_t column = 0; column < a.outputs; column += group_columns) {
      add_group_tile(a, first, tile, column);
    }
  }
}

// ---- neurons ------------------------------------------------------------------------------------

// Potentials after one step of `n` vectors of neurons; returns which fired.
template <Charge kind, bool multiply, bool hard, int n>
ATSNN_INLINE uint64_t step_neurons(vec<float>* v, const vec<float>* x, const Constants<float>& c) {
  constexpr int64_t width = Simd<float>::width;
#if defined(__x86_64__) && ATSNN_VECTOR_BYTES == 64
  // The comparison serves the word and the reset; words are put together without leaving the
  // mask registers.
  __mmask64 fires[n];
  for (int i = 0; i < n; ++i) {
    const vec<float> u = charge<kind, multiply>(v[i], x[i], c);
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(c.v_threshold), _CMP_GE_OQ);
    const __m512 rest = hard ? _mm512_set1_ps(c.v_reset) : (__m512)(u - c.v_threshold);
    v[i] = (vec<float>)_mm512_mask_mov_ps((__m512)u, some, rest);
    fires[i] = some;
  }
  if constexpr (n == 4) {
    return _mm512_kunpackd(_mm512_kunpackw(fires[3], fires[2]),
                           _mm512_kunpackw(fires[1], fires[0]));
  }
  uint64_t word = 0;
  for (int i = 0; i < n; ++i) word |= uint64_t(fires[i]) << (i * width);
  return word;
#else
  uint64_t word = 0;
  for (int i = 0; i < n; ++i) {
    const vec<float> u = charge<kind, multiply>(v[i], x[i], c);
    word |= uint64_t(fired(u, c.v_threshold)) << (i * width);
    v[i] = reset<hard>(u, c);
  }
  return word;
#endif
}

// Membranes of `n` vectors of neurons, `channels` of which exist.
template <int n>
ATSNN_INLINE void load_state(vec<float>* v, const float* state, int64_t channels, float at_rest) {
  constexpr int64_t width = Simd<float>::width;
  for (int i = 0; i < n; ++i) {
    const int64_t left = channels - i * width;
    if (!state || left <= 0) {
      v[i] = vec<float>{} + at_rest;
    } else {
      v[i] = left < width ? load_first(state + i * width, left) : load(state + i * width);
    }
  }
}

template <int n>
ATSNN_INLINE void store_state(const vec<float>* v, float* state, int64_t channels) {
  constexpr int64_t width = Simd<float>::width;
  for (int i = 0; state && i < n; ++i) {
    const int64_t left = channels - i * width;
    if (left <= 0) return;
    if (left < width) {
      store_first(state + i * width, v[i], left);
    } else {
      store(state + i * width, v[i]);
    }
  }
}

// Neurons of the vectors `part` .. `part` + n of a panel.
template <Charge kind, bool multiply, bool hard, int n>
int64_t fire_part(const Fire& a, const Constants<float>& settings, int part) {
  const Constants<float> c = settings;  // a copy, which the stores below cannot alias
  constexpr int64_t width = Simd<float>::width;
  const uint64_t valid = a.valid >> (part * width);
  const int64_t channels = std::min<int64_t>(count_bits(valid), n * width);
  int64_t spikes = 0;
  for (int64_t col = 0; col < a.columns; ++col) {
    float* const state = a.state ? a.state[col] + a.state_offset + part * width : nullptr;
    vec<float> v[n];
    load_state<n>(v, state, channels, c.v_reset);
    for (int32_t step = a.first[col]; step < a.first[col + 1]; ++step) {
      const float* const from = a.acc + (a.still ? col : step) * panel + part * width;
      vec<float> x[n];
      for (int i = 0; i < n; ++i) x[i] = load(from + i * width);
      const uint64_t word = step_neurons<kind, multiply, hard, n>(v, x, c) & valid;
      uint64_t& out = a.spikes[int64_t(a.row[step]) * a.stride];
      out = part == 0 ? word : out | word << (part * width);
      spikes += count_bits(word);
    }
    store_state<n>(v, state, channels);
  }
  return spikes;
}

template <Charge kind, bool multiply, bool hard>
int64_t fire_columns(const Fire& a, const NeuronParams& p) {
  const Constants<float> c(p);
  int64_t spikes = 0;
  for (int part = 0; part < panel_vectors; part += together) {
    const int64_t left = count_bits(a.valid >> (part * Simd<float>::width));
    if (part > 0 && left == 0) break;
    // Narrow maps are a vector or two wide.
    if (left <= together / 4 * Simd<float>::width) {
      spikes += fire_part<kind, multiply, hard, together / 4>(a, c, part);
    } else if (left <= together / 2 * Simd<float>::width) {
      spikes += fire_part<kind, multiply, hard, together / 2>(a, c, part);
    } else {
      spikes += fire_part<kind, multiply, hard, together>(a, c, part);
    }
  }
  return spikes;
}

template <class F>
auto with_neuron(const NeuronParams& p, F f) {
  using std::bool_constant;
  const auto with_reset = [&](auto kind, auto multiply) {
    return p.hard_reset ? f(kind, multiply, bool_constant<true>{})
                        : f(kind, multiply, bool_constant<false>{});
  };
  const auto with_factor = [&](auto kind) {
    return p.multiply ? with_reset(kind, bool_constant<true>{})
                      : with_reset(kind, bool_constant<false>{});
  };
  switch (p.charge) {
    case Charge::integrate:
      return with_reset(std::integral_constant<Charge, Charge::integrate>{}, bool_constant<true>{});
    case Charge::decay:
      return with_factor(std::integral_constant<Charge, Charge::decay>{});
    default:
      return with_factor(std::integral_constant<Charge, Charge::no_decay>{});
  }
}

int64_t fire(const Fire& a, const NeuronParams& p) {
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    return fire_columns<kind.value, multiply.value, hard.value>(a, p);
  });
}

// ---- narrow convolutions ------------------------------------------------------------------------

// Of `n` vectors of outputs.
template <Charge kind, bool multiply, bool hard, int n>
NarrowCounts narrow_of(const NarrowConv& a, const Constants<float>& settings) {
  const Constants<float> c = settings;
  constexpr int64_t width = Simd<float>::width;
  const int64_t taps = a.window.taps(), channels = a.channels;
  const int64_t outputs = count_bits(a.valid);
  const int64_t together_taps = word_bits / channels;  // in a word
  vec<float> bias[n];
  for (int i = 0; i < n; ++i) bias[i] = load(a.bias + i * width);
  NarrowCounts counts{};
  const auto run = [&](int64_t pixel, const Taps& at) {
    float* const state = a.state ? a.state + pixel * outputs : nullptr;
    vec<float> v[n];
    load_state<n>(v, state, outputs, c.v_reset);
    for (int64_t t = 0; t < a.T; ++t) {
      const uint64_t* const frame = a.bits + t * a.step;
      if (at.centre >= 0) counts.input += count_bits(frame[at.centre]);
      vec<float> sum[n];
      for (int i = 0; i < n; ++i) sum[i] = bias[i];
      for (int64_t tap = 0; tap < taps;) {
        // Bits of pixels side by side are inputs in their order.
        const float* const weight = a.weight + tap * channels * panel;
        const int64_t end = std::min(tap + together_taps, taps);
        uint64_t word = 0;
        for (int64_t shift = 0; tap < end; ++tap, shift += channels) {
          if (at[tap] >= 0) word |= frame[at[tap]] << shift;
        }
        each_bit(word, [&](int64_t bit) {
          for (int i = 0; i < n; ++i) sum[i] += load(weight + bit * panel + i * width);
        });
      }
      const uint64_t fires = step_neurons<kind, multiply, hard, n>(v, sum, c) & a.valid;
      a.out[t * a.out_step + pixel] = fires;
      counts.spikes += count_bits(fires);
    }
    store_state<n>(v, state, outputs);
  };
  each_window(a.window, a.height, a.width, a.strip, 0, run);
  return counts;
}

NarrowCounts conv_narrow(const NarrowConv& a, const NeuronParams& p) {
  constexpr int64_t width = Simd<float>::width;
  const int64_t outputs = count_bits(a.valid);
  return with_neuron(p, [&](auto kind, auto multiply, auto hard) {
    constexpr Charge charge = kind.value;
    constexpr bool times = multiply.value, to_reset = hard.value;
    const Constants<float> c(p);
    constexpr int n = panel_vectors;
    if (outputs <= n / 4 * width) return narrow_of<charge, times, to_reset, n / 4>(a, c);
    if (outputs <= n / 2 * width) return narrow_of<charge, times, to_reset, n / 2>(a, c);
    return narrow_of<charge, times, to_reset, n>(a, c);
  });
}

// ---- attention ----------------------------------------------------------------------------------

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
      if (a.state) {
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

// ---- head ---------------------------------------------------------------------------------------

// `n` outputs of a row from `o` on, whose sums stay in registers.
template <int n>
void head_outputs(const Head& a, int64_t row, int64_t o) {
  double sum[n] = {};
  for (int64_t i = 0; i < a.inputs; ++i) {
    const double x = a.x[row * a.inputs + i];
    const double* weight = a.weight + i * a.outputs + o;
    for (int j = 0; j < n; ++j) sum[j] += x * weight[j];
  }
  float* out = a.out + row * a.outputs + o;
  for (int j = 0; j < n; ++j) out[j] = static_cast<float>(sum[j] + a.bias[o + j]);
}

void head(const Head& a, int64_t begin, int64_t end) {
  constexpr int most = 4 * ATSNN_VECTOR_BYTES / sizeof(double);
  for (int64_t row = begin; row < end; ++row) {
    int64_t o = 0;
    for (; o + most <= a.outputs; o += most) head_outputs<most>(a, row, o);
    for (; o + 4 <= a.outputs; o += 4) head_outputs<4>(a, row, o);
    for (; o < a.outputs; ++o) head_outputs<1>(a, row, o);
  }
}

// ---- what is not zero ---------------------------------------------------------------------------

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
    list_lanes(_mm512_set1_epi32(static_cast<int>(base + i)), some, index + found);
    _mm512_storeu_ps(value + found, _mm512_maskz_compress_ps(some, wide));
    found += count_bits(some);
  }
#else
  const auto list = [&](uint64_t some, int64_t i) {
    each_bit(some, [&](int64_t bit) {
      index[found] = static_cast<uint16_t>(base + i + bit);
      value[found++] = x[i + bit];
    });
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
    list_lanes(_mm512_set1_epi32(static_cast<int>(base + i)), some, index + found);
    _mm512_storeu_ps(value + found, _mm512_maskz_compress_ps(some, v));
    found += count_bits(some);
  }
#else
  constexpr int64_t width = Simd<float>::width;
  const auto list = [&](uint64_t some, int64_t i) {
    each_bit(some, [&](int64_t bit) {
      index[found] = static_cast<uint16_t>(base + i + bit);
      value[found++] = x[i + bit];
    });
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

#define ATSNN_KERNELS_(LEVEL) LEVEL##_kernels
#define ATSNN_KERNELS(LEVEL) ATSNN_KERNELS_(LEVEL)
#define ATSNN_NAME_(LEVEL) #LEVEL
#define ATSNN_NAME(LEVEL) ATSNN_NAME_(LEVEL)

}  // namespace ATSNN_LEVEL

const Kernels ATSNN_KERNELS(ATSNN_LEVEL) = {
    ATSNN_NAME(ATSNN_LEVEL),
    ATSNN_LEVEL::add_rows,
    ATSNN_LEVEL::add_groups,
    ATSNN_LEVEL::list_groups,
    ATSNN_LEVEL::fire,
    ATSNN_LEVEL::conv_narrow,
    ATSNN_LEVEL::attend,
    ATSNN_LEVEL::head,
    ATSNN_LEVEL::count,
    ATSNN_LEVEL::list_bits,
    ATSNN_LEVEL::list_bytes,
    ATSNN_LEVEL::list_floats,
    ATSNN_LEVEL::pack,
    ATSNN_LEVEL::unpack,
    ATSNN_LEVEL::pack_pixels,
    ATSNN_LEVEL::unpack_pixels,
    ATSNN_LEVEL::scores_forward<float>,
    ATSNN_LEVEL::scores_forward<uint8_t>,
    ATSNN_LEVEL::readout_forward<float>,
    ATSNN_LEVEL::readout_forward<uint8_t>,
    ATSNN_LEVEL::combine_rows<float>,
    ATSNN_LEVEL::dots<float>,
};

}  // namespace atsnn
