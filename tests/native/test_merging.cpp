// merging.h: matching, plans that are refused, and which rows become which.
#include <algorithm>
#include <limits>
#include <numeric>

#include "../../csrc/cpu/merging.h"
#include "../../csrc/cpu/rows.h"
#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 1500, corruptions = 30000;

std::vector<int64_t> random_target(Random& random, int64_t B, int64_t N) {
  std::vector<int64_t> target;
  for (int64_t b = 0; b < B; ++b) {
    const double staying = random.pick({0.1, 0.5, 0.9});
    std::vector<int64_t> held(N, -1), stay;
    for (int64_t k = 0; k < N; ++k) {
      if (random.chance(staying) || (stay.empty() && k == N - 1)) stay.push_back(k);
    }
    for (int64_t k : stay) held[k] = k;
    for (int64_t& k : held) {
      if (k < 0) k = stay[random.between(0, stay.size() - 1)];
    }
    target.insert(target.end(), held.begin(), held.end());
  }
  return target;
}

// A plan that merge_error must accept. Tokens that merged away mostly have no rows any more.
struct Plan {
  Cells from, to;
  std::vector<int64_t> target;
  Array<int64_t> held, from_rank, to_rank;
  Array<float> sizes;

  explicit Plan(Random& random)
      : from(random_cells(random)),
        target(random_target(random, from.B, from.N)),
        held(target),
        from_rank(from.B * from.N),
        to_rank(from.B * from.N),
        sizes(from.B * from.N) {
    const auto [T, B, N, offsets, token] = from.layout();
    std::vector<int64_t> steps(B * N);
    const bool leave = random.chance(0.8);
    for (int64_t i = 0; i < B * N; ++i) {
      steps[i] = leave ? 0 : random.between(0, T);
      sizes[i] = random.between(0, 4);
      if (target[i] != i % N) continue;
      steps[i] = T;
      for (int64_t k = 0; k < N; ++k) {
        const int64_t member = i / N * N + k;
        if (target[member] == i % N) steps[i] = std::min(steps[i], from.steps[member]);
      }
      if (random.chance(0.2)) steps[i] = random.between(0, steps[i]);
    }
    to = from.dense && random.chance(0.5) ? dense_cells(T, B, N)
                                          : make_cells(T, B, N, steps, &random);
    token_ranks(from.layout(), from_rank.data());
    token_ranks(to.layout(), to_rank.data());
  }
  Merge merge() const {
    return {from.layout(), to.layout(), from_rank.data(), held.data(), sizes.data()};
  }
  int64_t holder(int64_t b, int64_t k) const { return target[b * from.N + k]; }
};

std::string error_of(const Merge& merge) {
  Array<int64_t> scratch(merge.from.N);
  return merge_error(merge, scratch.data());
}

TEST(merging_rows) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Plan plan(random);
    const auto& [from, to, target, held, from_rank, to_rank, sizes] = plan;
    const int64_t B = from.B, N = from.N;
    describe("case " + std::to_string(i) + ": " + shown(from) + " to " + shown(to));
    const Merge merge = plan.merge();
    CHECK(target_error(held.data(), B, N) == "");
    CHECK(error_of(merge) == "");

    std::vector<std::vector<int64_t>> members(to.rows);
    std::vector<double> total(B * N), count(B * N);
    for (int64_t k = 0; k < B * N; ++k) {
      total[k / N * N + target[k]] += sizes[k];
      ++count[k / N * N + target[k]];
    }
    std::vector<int64_t> want_row(from.rows);
    std::vector<double> want_share(from.rows);
    each_cell(from, [&](int64_t t, int64_t b, int64_t k, int64_t row) {
      const int64_t holder = b * N + plan.holder(b, k), into = to.at(t, b, plan.holder(b, k));
      want_row[row] = into;
      want_share[row] = count[holder] == 1   ? 1
                        : total[holder] == 0 ? 0
                                             : sizes[b * N + k] / total[holder];
      if (into >= 0) members[into].push_back(row);
    });
    std::vector<int64_t> want_first{0}, want_source;
    std::vector<double> want_weight;
    std::vector<double> size_of_row(from.rows);
    each_cell(from, [&](int64_t, int64_t b, int64_t k, int64_t row) {
      size_of_row[row] = sizes[b * N + k];
    });
    for (const auto& rows : members) {
      for (int64_t row : rows) {
        want_source.push_back(row);
        want_weight.push_back(size_of_row[row]);
      }
      want_first.push_back(want_source.size());
    }

    Array<int64_t> first(to.rows + 1), source(from.rows), scratch(2 * N + 1), row(from.rows);
    Array<double> weight(from.rows), share(from.rows), room(2 * N);
    merge_entries(merge, first.data(), source.data(), weight.data(), scratch.data());
    CHECK_SAME(first, want_first);
    CHECK_SAME(source, want_source);
    CHECK_SAME(weight, want_weight);
    merge_shares(merge, to_rank.data(), row.data(), share.data(), room.data());
    CHECK_SAME(row, want_row);
    CHECK_SAME(share, want_share);

    Array<int64_t> back(from.rows);
    unmerge_rows(to.layout(), to_rank.data(), from.layout(), held.data(), back.data());
    CHECK_SAME(back, want_row);
  }
}

TEST(merging_group_by_row) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const int64_t rows = random.between(0, 12), n = random.between(0, 40);
    describe("case " + std::to_string(i));
    Array<int64_t> index(n), first(rows + 1);
    std::vector<std::vector<int64_t>> places(rows);
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
      index[j] = random.between(-1, rows - 1);
      if (index[j] < 0) continue;
      places[index[j]].push_back(j);
      ++kept;
    }
    std::vector<int64_t> want_first{0}, want_source;
    for (const auto& at : places) {
      want_source.insert(want_source.end(), at.begin(), at.end());
      want_first.push_back(want_source.size());
    }
    Array<int64_t> source(kept);
    group_by_row(index.data(), n, rows, first.data(), source.data());
    CHECK_SAME(first, want_first);
    CHECK_SAME(source, want_source);
  }
}

// ---- refused plans

void corrupt(Random& random, int64_t& value, int64_t N) {
  constexpr int64_t least = std::numeric_limits<int64_t>::min();
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  value = random.chance(0.5) ? random.between(0, N - 1)
                             : random.pick<int64_t>({-1, N, N + 1, least, most, most / N, least / N,
                                                     int64_t(random.bits())});
}

TEST(merging_target_refused) {
  int refused = 0;
  for (int i = 0; i < corruptions; ++i) {
    Random random(i);
    const int64_t B = random.between(1, 3), N = random.between(1, 12);
    describe("case " + std::to_string(i));
    std::vector<int64_t> target = random_target(random, B, N);
    corrupt(random, target[random.between(0, B * N - 1)], N);
    bool good = true;
    for (int64_t k = 0; k < B * N; ++k) {
      good = good && target[k] >= 0 && target[k] < N;
      good = good && target[k / N * N + target[k]] == target[k];
    }
    const Array<int64_t> held(target);
    CHECK((target_error(held.data(), B, N) == "") == good);
    refused += !good;
  }
  CHECK(refused > corruptions / 2);
}

TEST(merging_plan_refused) {
  int refused = 0;
  for (int i = 0; i < corruptions; ++i) {
    Random random(i);
    Plan plan(random);
    const int64_t T = plan.from.T, B = plan.from.B, N = plan.from.N;
    describe("case " + std::to_string(i) + ": " + shown(plan.from) + " to " + shown(plan.to));
    // The plan stays one, but a token may outlive those that it takes in.
    if (random.chance(0.5)) {
      plan.target = random_target(random, B, N);
      plan.held = Array<int64_t>(plan.target);
    } else if (B * N > 0) {
      std::vector<int64_t> steps = plan.to.steps;
      steps[random.between(0, B * N - 1)] = random.between(0, T);
      plan.to = make_cells(T, B, N, steps, &random);
    }
    bool good = true;
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t k = 0; k < N; ++k) {
          good = good && (plan.to.at(t, b, plan.holder(b, k)) < 0 || plan.from.at(t, b, k) >= 0);
        }
      }
    }
    CHECK((error_of(plan.merge()) == "") == good);
    refused += !good;
  }
  CHECK(refused > corruptions / 10);
}

// ---- matching

template <class A>
void check_partners(int i, Level level) {
  Random random(i);
  const int64_t N = random.between(0, 24), C = random_channels(random);
  const Dots<A> dots_at = AT_LEVEL(level, dots<A>);
  describe("case " + std::to_string(i) + ", N = " + std::to_string(N) + ", " + level_name(level));
  Array<A> counts(N * C);
  Array<int64_t> lifetime(N);
  for (int64_t j = 0; j < N * C; ++j) counts[j] = random.chance(0.7) ? 0 : random.between(0, 3);
  for (int64_t k = 0; k < N; ++k) {
    lifetime[k] = random.between(0, 2);
    // Silent tokens and equal ones, for what is not defined by a cosine and for ties.
    if (random.chance(0.1)) std::fill_n(counts.data() + k * C, C, A(0));
    if (k > 0 && random.chance(0.2)) std::copy_n(counts.data(), C, counts.data() + k * C);
  }
  Array<int64_t> partner(N), index(2 * N);
  Array<double> similarity(N), values(2 * N);
  Array<const A*> rows(N);
  best_partners<A>(counts.data(), lifetime.data(), N, C, dots_at, partner.data(), similarity.data(),
                   index.data(), rows.data(), values.data());

  const auto dot = [&](int64_t a, int64_t b) {
    double sum = 0;
    for (int64_t c = 0; c < C; ++c) sum += double(counts[a * C + c]) * counts[b * C + c];
    return sum;
  };
  // Whether a token comes first, third, ... among those of its lifetime.
  const auto in_first_set = [&](int64_t k) {
    return std::count(lifetime.data(), lifetime.data() + k, lifetime[k]) % 2 == 0;
  };
  std::vector<int64_t> want(N, -1);
  for (int64_t a = 0; a < N; ++a) {
    double best = -1;
    for (int64_t b = 0; b < N && in_first_set(a) && lifetime[a] > 0; ++b) {
      if (lifetime[b] != lifetime[a] || in_first_set(b)) continue;
      const double norm = dot(a, a) * dot(b, b);
      const bool alike = dot(a, a) == 0 && dot(b, b) == 0;
      const double cosine2 = norm > 0 ? dot(a, b) * dot(a, b) / norm : alike;
      if (cosine2 <= best) continue;
      best = cosine2;
      want[a] = b;
    }
    CHECK(want[a] < 0 || similarity[a] == best);
  }
  CHECK_SAME(partner, want);
}

TEST(merging_best_partners) {
  for (int i = 0; i < cases; ++i) {
    for (Level level : levels()) {
      check_partners<float>(i, level);
      check_partners<double>(i, level);
    }
  }
}

TEST(merging_choose_pairs) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const int64_t N = random.between(0, 24), r = random.between(-1, N + 1);
    const double threshold = random.pick({0.0, 0.5, 2.0});
    describe("case " + std::to_string(i) + ", r = " + std::to_string(r));
    Array<int64_t> partner(N), target(N), order(N);
    Array<double> similarity(N);
    std::vector<int64_t> pairs, want(N);
    for (int64_t k = 0; k < N; ++k) {
      partner[k] = random.between(-1, N - 1);
      similarity[k] = partner[k] < 0 ? -1 : 0.25 * random.between(0, 4);
      want[k] = k;
      if (partner[k] >= 0 && (r >= 0 || similarity[k] > threshold)) pairs.push_back(k);
    }
    std::stable_sort(pairs.begin(), pairs.end(),
                     [&](int64_t a, int64_t b) { return similarity[a] > similarity[b]; });
    if (r >= 0 && r < int64_t(pairs.size())) pairs.resize(r);
    for (int64_t k : pairs) want[k] = partner[k];
    choose_pairs(partner.data(), similarity.data(), N, r, threshold, target.data(), order.data());
    CHECK_SAME(target, want);
  }
}

}  // namespace
}  // namespace atsnn
