#include "layout.h"

#include <algorithm>
#include <numeric>

namespace atsnn {
namespace {

std::string at(const char* name, int64_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

}  // namespace

std::string layout_error(const Layout& layout, int64_t rows, int64_t* scratch) {
  const auto [T, B, N, offsets, token] = layout;
  if (offsets[0] != 0) return "offsets[0] must be 0, got " + std::to_string(offsets[0]);
  for (int64_t i = 0; i < T * B; ++i) {
    // Compared without a difference, which could overflow.
    if (offsets[i + 1] < offsets[i]) {
      return "offsets must not decrease, got " + std::to_string(offsets[i]) + " before " +
             at("offsets", i + 1) + " = " + std::to_string(offsets[i + 1]);
    }
    if (offsets[i] > rows || offsets[i + 1] > rows) {
      return "offsets must end at the number of rows, " + std::to_string(rows) + ", got " +
             at("offsets", i + 1) + " = " + std::to_string(offsets[i + 1]);
    }
    const int64_t most = i < B ? N : layout.count(i / B - 1, i % B);
    if (layout.count(i / B, i % B) > most) {
      return "an image must have at most " + std::to_string(most) + " active tokens at timestep " +
             std::to_string(i / B) + (i < B ? "" : ", as many as before it") + ", got " +
             std::to_string(layout.count(i / B, i % B)) + " in image " + std::to_string(i % B);
    }
  }
  if (offsets[T * B] != rows) {
    return "offsets must end at the number of rows, " + std::to_string(rows) + ", got " +
           std::to_string(offsets[T * B]);
  }
  for (int64_t b = 0; token && b < B; ++b) {
    std::fill(scratch, scratch + N, 0);
    for (int64_t r = 0; r < N; ++r) {
      const int64_t k = token[b * N + r];
      if (k < 0 || k >= N || scratch[k]++) {
        return "the ranks of an image must hold each token 0 .. " + std::to_string(N - 1) +
               " once, got " + std::to_string(k) + " at rank " + std::to_string(r) + " of image " +
               std::to_string(b);
      }
    }
  }
  return {};
}

void rank_tokens(const int64_t* active_steps, int64_t T, int64_t B, int64_t N, int64_t* token,
                 int64_t* offsets, int64_t* scratch) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* n = active_steps + b * N;
    std::fill(scratch, scratch + T + 2, 0);
    for (int64_t k = 0; k < N; ++k) ++scratch[T - n[k] + 1];  // longest first
    std::partial_sum(scratch, scratch + T + 2, scratch);
    // Now scratch[T - m + 1] tokens are active for at least m timesteps.
    for (int64_t t = 0; t < T; ++t) offsets[t * B + b + 1] = scratch[T - t];
    for (int64_t k = 0; k < N; ++k) token[b * N + scratch[T - n[k]]++] = k;
  }
  offsets[0] = 0;
  std::partial_sum(offsets, offsets + T * B + 1, offsets);
}

void token_ranks(const Layout& layout, int64_t* rank) {
  for (int64_t b = 0; b < layout.B; ++b) {
    for (int64_t r = 0; r < layout.N; ++r) rank[b * layout.N + layout.token_at(b, r)] = r;
  }
}

void row_cells(const Layout& layout, int64_t* cell) {
  for (int64_t run = 0; run < layout.runs(); ++run) {
    const int64_t b = run % layout.B, first = layout.offsets[run];
    for (int64_t r = 0; first + r < layout.offsets[run + 1]; ++r) {
      cell[first + r] = run * layout.N + layout.token_at(b, r);
    }
  }
}

bool find_rows(const Layout& from, const int64_t* rank, const Layout& to, int64_t* row) {
  for (int64_t t = 0; t < to.T; ++t) {
    for (int64_t b = 0; b < to.B; ++b) {
      const int64_t first = to.start(t, b);
      for (int64_t r = 0; r < to.count(t, b); ++r) {
        const int64_t old = rank[b * to.N + to.token_at(b, r)];
        if (old >= from.count(t, b)) return false;
        row[first + r] = from.start(t, b) + old;
      }
    }
  }
  return true;
}

}  // namespace atsnn
