// layout.h: which rows exist, and which layouts are refused.
#include <algorithm>
#include <limits>

#include "inputs.h"

namespace atsnn {
namespace {

constexpr int cases = 1000, corruptions = 40000;

std::string error_of(const Layout& layout, int64_t rows) {
  Array<int64_t> scratch(layout.N);
  return layout_error(layout, rows, scratch.data());
}

std::vector<int64_t> ranks_of(const Cells& cells) {
  std::vector<int64_t> rank;
  for (int64_t b = 0; b < cells.B; ++b) {
    for (int64_t k = 0; k < cells.N; ++k) rank.push_back(cells.rank(b, k));
  }
  return rank;
}

TEST(layout_accepted) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Cells cells = random_cells(random);
    describe("case " + std::to_string(i) + ": " + shown(cells));
    const Layout layout = cells.layout();
    CHECK(error_of(layout, cells.rows) == "");
    CHECK(layout.rows() == cells.rows);

    Array<int64_t> rank(cells.B * cells.N), cell(cells.rows);
    token_ranks(layout, rank.data());
    CHECK_SAME(rank, ranks_of(cells));
    row_cells(layout, cell.data());
    std::vector<int64_t> want(cells.rows);
    each_cell(cells, [&](int64_t t, int64_t b, int64_t k, int64_t row) {
      want[row] = (t * cells.B + b) * cells.N + k;
    });
    CHECK_SAME(cell, want);
    for (int64_t b = 0; b < cells.B; ++b) {
      for (int64_t k = 0; k < cells.N; ++k) {
        CHECK(layout.steps(b, cells.rank(b, k)) == cells.steps[b * cells.N + k]);
      }
    }
  }
}

TEST(layout_rank_tokens) {
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Cells any = random_cells(random);
    const Cells cells = make_cells(any.T, any.B, any.N, any.steps, nullptr);
    describe("case " + std::to_string(i) + ": " + shown(cells));
    const Array<int64_t> steps(cells.steps);
    Array<int64_t> token(cells.B * cells.N), offsets(cells.T * cells.B + 1), scratch(cells.T + 2);
    rank_tokens(steps.data(), cells.T, cells.B, cells.N, token.data(), offsets.data(),
                scratch.data());
    CHECK_SAME(token, copied(cells.token));
    CHECK_SAME(offsets, copied(cells.offsets));
  }
}

TEST(layout_find_rows) {
  int found = 0, missing = 0;
  for (int i = 0; i < cases; ++i) {
    Random random(i);
    const Cells from = random_cells(random);
    std::vector<int64_t> fewer;
    for (int64_t n : from.steps) {
      fewer.push_back(random.chance(0.02) ? random.between(0, from.T) : random.between(0, n));
    }
    const Cells to = make_cells(from.T, from.B, from.N, fewer, &random);
    describe("case " + std::to_string(i) + ": " + shown(from) + " to " + shown(to));
    std::vector<int64_t> want(to.rows);
    each_cell(to,
              [&](int64_t t, int64_t b, int64_t k, int64_t row) { want[row] = from.at(t, b, k); });
    const bool all = std::find(want.begin(), want.end(), -1) == want.end();
    const Array<int64_t> rank(ranks_of(from));
    Array<int64_t> row(to.rows);
    CHECK(find_rows(from.layout(), rank.data(), to.layout(), row.data()) == all);
    if (all) CHECK_SAME(row, want);
    ++(all ? found : missing);
  }
  CHECK(found > cases / 4 && missing > cases / 20);
}

// ---- corrupted layouts

// What layout_error must find, in arithmetic that cannot overflow.
bool is_layout(const Layout& layout, int64_t rows) {
  const auto [T, B, N, offsets, token] = layout;
  if (offsets[0] != 0 || offsets[T * B] != rows) return false;
  for (int64_t i = 0; i < T * B; ++i) {
    const __int128 count = __int128(offsets[i + 1]) - offsets[i];
    const __int128 most = i < B ? N : __int128(offsets[i - B + 1]) - offsets[i - B];
    if (count < 0 || count > most) return false;
  }
  for (int64_t b = 0; token && b < B; ++b) {
    std::vector<int64_t> sorted(token + b * N, token + (b + 1) * N);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t k = 0; k < N; ++k) {
      if (sorted[k] != k) return false;
    }
  }
  return true;
}

void corrupt(Random& random, Array<int64_t>& values) {
  constexpr int64_t least = std::numeric_limits<int64_t>::min();
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  if (values.size() == 0) return;
  int64_t& value = values[random.between(0, values.size() - 1)];
  int64_t& other = values[random.between(0, values.size() - 1)];
  switch (random.between(0, 4)) {
    case 0:
      value = int64_t(uint64_t(value) + (random.chance(0.5) ? 1 : -1));
      break;
    case 1:
      value = random.pick<int64_t>({least, least + 1, -1, most - 1, most, most / 2 + 1});
      break;
    case 2:
      value = int64_t(random.bits());
      break;
    case 3:
      value = other;
      break;
    case 4:
      std::swap(value, other);
      break;
  }
}

TEST(layout_refused) {
  int refused = 0;
  for (int i = 0; i < corruptions; ++i) {
    Random random(i);
    const Cells cells = random_cells(random);
    describe("case " + std::to_string(i) + ": " + shown(cells) + ", corrupted");
    Array<int64_t> offsets(copied(cells.offsets)), token(copied(cells.token));
    int64_t rows = cells.rows;
    for (int64_t times = random.between(1, 2); times > 0; --times) {
      if (random.chance(0.1)) {
        constexpr int64_t most = std::numeric_limits<int64_t>::max();
        rows = random.pick<int64_t>({cells.rows + 1, std::max<int64_t>(cells.rows - 1, 0), most});
      } else {
        corrupt(random, cells.dense || random.chance(0.6) ? offsets : token);
      }
    }
    const Layout layout{cells.T, cells.B, cells.N, offsets.data(),
                        cells.dense ? nullptr : token.data()};
    const bool good = is_layout(layout, rows);
    CHECK((error_of(layout, rows) == "") == good);
    refused += !good;
    if (!good) continue;
    // What is accepted is safe to use: every row of a layout is found in itself.
    Array<int64_t> rank(cells.B * cells.N), row(rows), cell(rows);
    token_ranks(layout, rank.data());
    row_cells(layout, cell.data());
    CHECK(find_rows(layout, rank.data(), layout, row.data()));
    for (int64_t r = 0; r < rows; ++r) CHECK(row[r] == r);
  }
  CHECK(refused > corruptions / 2);
}

}  // namespace
}  // namespace atsnn
