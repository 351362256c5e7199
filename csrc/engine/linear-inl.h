// Linear layers: weight rows added to sums, one after the other or by groups of four. Included by
// per-level files.
#pragma once

#include "../cpu/simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {
namespace {

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

}  // namespace
}  // namespace ATSNN_LEVEL
}  // namespace atsnn
