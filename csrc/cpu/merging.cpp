#include "merging.h"

#include <algorithm>
#include <numeric>

namespace atsnn {

std::string target_error(const int64_t* target, int64_t B, int64_t N) {
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t k = 0; k < N; ++k) {
      const int64_t held = target[b * N + k];
      if (held < 0 || held >= N) {
        return "targets must lie in 0 .. " + std::to_string(N - 1) + ", got " +
               std::to_string(held) + " for token " + std::to_string(k) + " of image " +
               std::to_string(b);
      }
      if (target[b * N + held] != held) {
        return "a token that takes others in must stay, got token " + std::to_string(held) +
               " of image " + std::to_string(b) + ", which merges into " +
               std::to_string(target[b * N + held]);
      }
    }
  }
  return {};
}

std::string merge_error(const Merge& m, int64_t* scratch) {
  const int64_t N = m.from.N;
  for (int64_t b = 0; b < m.from.B; ++b) {
    for (int64_t r = 0; r < N; ++r) scratch[m.to.token_at(b, r)] = m.to.steps(b, r);
    for (int64_t k = 0; k < N; ++k) {
      const int64_t held = m.target[b * N + k];
      const int64_t steps = m.from.steps(b, m.rank[b * N + k]);
      if (steps < scratch[held]) {
        return "token " + std::to_string(k) + " of image " + std::to_string(b) +
               " must be active for the " + std::to_string(scratch[held]) +
               " timesteps of the token that holds it, " + std::to_string(held) + ", got " +
               std::to_string(steps);
      }
    }
  }
  return {};
}

void merge_entries(const Merge& m, int64_t* first, int64_t* source, double* weight,
                   int64_t* scratch) {
  const int64_t N = m.from.N;
  int64_t* const begin = scratch;           // [N + 1]: members of each token, ...
  int64_t* const member = scratch + N + 1;  // [N]: ... in index order
  first[0] = 0;
  // first holds the number of entries of each row until all are known.
  for (int64_t pass = 0; pass < 2; ++pass) {
    for (int64_t b = 0; b < m.from.B; ++b) {
      const int64_t* target = m.target + b * N;
      group_by_row(target, N, N, begin, member);
      for (int64_t t = 0; t < m.to.T; ++t) {
        for (int64_t r = 0; r < m.to.count(t, b); ++r) {
          const int64_t row = m.to.start(t, b) + r, k = m.to.token_at(b, r);
          if (pass == 0) {
            first[row + 1] = begin[k + 1] - begin[k];
            continue;
          }
          int64_t entry = first[row];
          for (int64_t i = begin[k]; i < begin[k + 1]; ++i, ++entry) {
            source[entry] = m.from.start(t, b) + m.rank[b * N + member[i]];
            weight[entry] = m.sizes[b * N + member[i]];
          }
        }
      }
    }
    if (pass == 0) std::partial_sum(first, first + m.to.rows() + 1, first);
  }
}

void merge_shares(const Merge& m, const int64_t* to_rank, int64_t* row, double* share,
                  double* total) {
  const int64_t N = m.from.N;
  for (int64_t b = 0; b < m.from.B; ++b) {
    const int64_t* target = m.target + b * N;
    double* const members = total + N;
    std::fill(total, total + 2 * N, 0.0);
    for (int64_t k = 0; k < N; ++k) {
      total[target[k]] += m.sizes[b * N + k];
      members[target[k]] += 1;
    }
    for (int64_t t = 0; t < m.from.T; ++t) {
      for (int64_t r = 0; r < m.from.count(t, b); ++r) {
        const int64_t i = m.from.start(t, b) + r, k = m.from.token_at(b, r), held = target[k];
        const int64_t rank = to_rank[b * N + held];
        row[i] = rank < m.to.count(t, b) ? m.to.start(t, b) + rank : -1;
        // A token alone is copied, whatever its size.
        share[i] =
            members[held] == 1 ? 1.0 : m.sizes[b * N + k] / (total[held] == 0 ? 1.0 : total[held]);
      }
    }
  }
}

void unmerge_rows(const Layout& merged, const int64_t* rank, const Layout& original,
                  const int64_t* target, int64_t* row) {
  for (int64_t t = 0; t < original.T; ++t) {
    for (int64_t b = 0; b < original.B; ++b) {
      for (int64_t r = 0; r < original.count(t, b); ++r) {
        const int64_t held = target[b * original.N + original.token_at(b, r)];
        const int64_t at = rank[b * original.N + held];
        row[original.start(t, b) + r] = at < merged.count(t, b) ? merged.start(t, b) + at : -1;
      }
    }
  }
}

void group_by_row(const int64_t* index, int64_t n, int64_t rows, int64_t* first, int64_t* source) {
  std::fill(first, first + rows + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] >= 0) ++first[index[i] + 1];
  }
  std::partial_sum(first, first + rows + 1, first);
  // Places are filled from the back, each one moving its row's end to its begin; what was an end
  // is the next row's begin, so all begins shift by one afterwards.
  for (int64_t i = n; i-- > 0;) {
    if (index[i] >= 0) source[--first[index[i] + 1]] = i;
  }
  const int64_t total = std::count_if(index, index + n, [](int64_t i) { return i >= 0; });
  for (int64_t i = 0; i < rows; ++i) first[i] = first[i + 1];
  first[rows] = total;
}

template <class A>
void best_partners(const A* counts, const int64_t* lifetime, int64_t N, int64_t C, Dots<A> dots,
                   int64_t* partner, double* similarity, int64_t* scratch_index,
                   const A** scratch_rows, double* scratch_values) {
  int64_t* const order = scratch_index;
  int64_t* const second = scratch_index + N;
  double* const square = scratch_values;
  double* const dot = scratch_values + N;
  for (int64_t k = 0; k < N; ++k) {
    order[k] = k;
    partner[k] = -1;
    similarity[k] = -1.0;
    const A* row = counts + k * C;
    dots(row, &row, 1, C, square + k);
  }
  std::sort(order, order + N, [&](int64_t a, int64_t b) {
    return lifetime[a] != lifetime[b] ? lifetime[a] < lifetime[b] : a < b;
  });
  for (int64_t begin = 0, end; begin < N; begin = end) {
    const int64_t n = lifetime[order[begin]];
    end = begin + 1;
    while (end < N && lifetime[order[end]] == n) ++end;
    if (n <= 0) continue;
    int64_t others = 0;
    for (int64_t i = begin + 1; i < end; i += 2) {
      second[others] = order[i];
      scratch_rows[others++] = counts + order[i] * C;
    }
    for (int64_t i = begin; i < end && others > 0; i += 2) {
      const int64_t a = order[i];
      dots(counts + a * C, scratch_rows, others, C, dot);
      for (int64_t j = 0; j < others; ++j) {
        // No square root: equal ratios of whole numbers are then equal bits. Where a token is
        // silent there is no ratio, and equal squares are those of two silent tokens.
        const double other = square[second[j]], norm = square[a] * other;
        const double cosine2 = norm > 0 ? dot[j] * dot[j] / norm : square[a] == other ? 1.0 : 0.0;
        if (cosine2 > similarity[a]) {
          similarity[a] = cosine2;
          partner[a] = second[j];
        }
      }
    }
  }
}

template void best_partners<float>(const float*, const int64_t*, int64_t, int64_t, Dots<float>,
                                   int64_t*, double*, int64_t*, const float**, double*);
template void best_partners<double>(const double*, const int64_t*, int64_t, int64_t, Dots<double>,
                                    int64_t*, double*, int64_t*, const double**, double*);

void choose_pairs(const int64_t* partner, const double* similarity, int64_t N, int64_t r,
                  double threshold, int64_t* target, int64_t* order) {
  std::iota(target, target + N, 0);
  int64_t pairs = 0;
  for (int64_t k = 0; k < N; ++k) {
    if (partner[k] >= 0 && (r >= 0 || similarity[k] > threshold)) order[pairs++] = k;
  }
  if (r >= 0 && r < pairs) {
    std::partial_sort(order, order + r, order + pairs, [&](int64_t a, int64_t b) {
      return similarity[a] != similarity[b] ? similarity[a] > similarity[b] : a < b;
    });
    pairs = r;
  }
  for (int64_t i = 0; i < pairs; ++i) target[order[i]] = partner[order[i]];
}

}  // namespace atsnn
