// Token matching and merging: which rows become which. The formulas' home is
// src/atsnn/reference.py: `match_tokens`, `merge_tokens`, `unmerge_tokens`.
#pragma once

#include <cstdint>
#include <string>

#include "layout.h"

namespace atsnn {

// What is wrong with target [B, N], the token each token is held in; empty if nothing is.
std::string target_error(const int64_t* target, int64_t B, int64_t N);

// A merge from the rows of one layout to those of another of the same T, B, N (see merge_error).
// Where `to` still has a token that merged away, its rows are zero.
struct Merge {
  Layout from, to;
  const int64_t* rank;    // token_ranks of `from`
  const int64_t* target;  // [B, N]
  const float* sizes;     // [B, N] before the merge
};

// What is wrong with a merge, empty if nothing is: every token must be active in `from` wherever
// the token that holds it is active in `to`. `scratch` holds N elements.
std::string merge_error(const Merge& m, int64_t* scratch);

// The rows of `from`, with the sizes of their tokens, that make each row of `to`: entries
// first[row] .. first[row + 1]. One entry is a row that stays as it is. first [R' + 1]; source and
// weight [R]. `scratch` holds 2 * N + 1 elements.
void merge_entries(const Merge& m, int64_t* first, int64_t* source, double* weight,
                   int64_t* scratch);

// For the way back: the row of `to` that each row of `from` went into, -1 if none, and its share in
// it. `to_rank` is token_ranks of `to`; `total` holds 2 * N elements.
void merge_shares(const Merge& m, const int64_t* to_rank, int64_t* row, double* share,
                  double* total);

// The row of `merged` (-1: none, it is not active there) that holds each row of `original`.
// `rank` is token_ranks of `merged`.
void unmerge_rows(const Layout& merged, const int64_t* rank, const Layout& original,
                  const int64_t* target, int64_t* row);

// The inverse of row lists: entries first[i] .. first[i + 1] of `source` are the n places at which
// index is i, in order. first [rows + 1], source [n]; places with index -1 are left out.
void group_by_row(const int64_t* index, int64_t n, int64_t rows, int64_t* first, int64_t* source);

// dots[j] = sum over c of a[c] * b[j][c] for j < n.
template <class A>
using Dots = void (*)(const A* a, const A* const* b, int64_t n, int64_t C, double* dots);

// The best partner of each token and the square of their cosine, in one image (ties to the lower
// index; counts are not negative, so the square orders as the cosine does). Of two silent tokens it
// is 1, of a silent and a firing one 0. Tokens of equal lifetime > 0, in index order, are split
// alternately into two sets; partner[k] is -1 for tokens of the second set and those without one.
// counts [N, C]; scratch_rows holds N elements, the other scratch_* 2 * N each.
template <class A>
void best_partners(const A* counts, const int64_t* lifetime, int64_t N, int64_t C, Dots<A> dots,
                   int64_t* partner, double* similarity, int64_t* scratch_index,
                   const A** scratch_rows, double* scratch_values);

// target [N] of the `r` best pairs of an image (ties to the lower index), or, if r < 0, of all
// pairs above `threshold`. `order` holds N elements.
void choose_pairs(const int64_t* partner, const double* similarity, int64_t N, int64_t r,
                  double threshold, int64_t* target, int64_t* order);

}  // namespace atsnn
