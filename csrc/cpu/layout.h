// Which rows exist: the active cells of one block (TokenLayout in src/atsnn/layout.py).
//
// Rows are ordered by timestep, then image, then rank; the tokens of an image are ranked by their
// number of active timesteps, descending, ties by index. So each (t, b) is one contiguous run of
// rows, and a token keeps its rank through time. A dense [T, B, N, C] tensor is the layout in which
// every cell is active, so one kernel serves both.
#pragma once

#include <cstdint>
#include <string>

namespace atsnn {

struct Layout {
  int64_t T, B, N;
  const int64_t* offsets;  // [T * B + 1], the first row of each (t, b)
  const int64_t* token;    // [B, N], the token at each rank; null: rank r is token r

  int64_t start(int64_t t, int64_t b) const { return offsets[t * B + b]; }
  int64_t count(int64_t t, int64_t b) const { return offsets[t * B + b + 1] - offsets[t * B + b]; }
  int64_t rows() const { return offsets[T * B]; }
  int64_t runs() const { return T * B; }
  int64_t token_at(int64_t b, int64_t rank) const { return token ? token[b * N + rank] : rank; }
  // Timesteps at which rank `rank` of image `b` is active.
  int64_t steps(int64_t b, int64_t rank) const {
    int64_t t = 0;
    while (t < T && rank < count(t, b)) ++t;
    return t;
  }
};

// What is wrong with a layout of `rows` rows, as "expected ..., got ..."; empty if nothing is. No
// kernel may be given a layout that this refuses. `scratch` holds N elements.
std::string layout_error(const Layout& layout, int64_t rows, int64_t* scratch);

// token [B, N] and offsets [T * B + 1] of active_steps [B, N] in 0 .. T: one stable counting sort
// an image, O(N + T). `scratch` holds T + 2 elements.
void rank_tokens(const int64_t* active_steps, int64_t T, int64_t B, int64_t N, int64_t* token,
                 int64_t* offsets, int64_t* scratch);

// rank [B, N] of each token: the inverse of `token`.
void token_ranks(const Layout& layout, int64_t* rank);

// [R]: where each row lies among the T * B * N cells.
void row_cells(const Layout& layout, int64_t* cell);

// [R']: the row of `from` that each row of `to` is. False if a cell of `to` is not active in
// `from`. `rank` is token_ranks of `from`.
bool find_rows(const Layout& from, const int64_t* rank, const Layout& to, int64_t* row);

}  // namespace atsnn
