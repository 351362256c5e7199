#include "linear.h"

#include <numeric>

#include "parallel.h"

namespace atsnn {

namespace {

constexpr int64_t chunk_rows = 256;  // their sums, 64 KB, stay in the second cache
constexpr int64_t append_room = 16;

}  // namespace

PackedLinear::PackedLinear(const float* w, const float* b, int64_t outputs_, int64_t inputs_)
    : inputs(inputs_), outputs(outputs_) {
  float* to = own.reserve_zeros(weights());
  weight = to;
  float* at = bias.reserve_zeros(panels() * panel);
  uint64_t* exist = valid.reserve(panels());
  for (int64_t p = 0; p < panels(); ++p) exist[p] = valid_bits(outputs, p);
  for (int64_t o = 0; o < outputs; ++o) {
    float* column = to + o / panel * inputs * panel + o % panel;
    for (int64_t i = 0; i < inputs; ++i) column[i * panel] = w[o * inputs + i];
    if (b) at[o] = b[o];
  }
}

PackedLinear beside(const std::vector<const PackedLinear*>& maps) {
  PackedLinear all;
  all.inputs = maps.front()->inputs;
  int64_t panels = 0;
  for (const PackedLinear* m : maps) panels += m->panels();
  all.outputs = panels * panel;
  float* w = all.own.reserve(panels * all.inputs * panel);
  all.weight = w;
  float* b = all.bias.reserve(panels * panel);
  uint64_t* exist = all.valid.reserve(panels);
  for (const PackedLinear* m : maps) {
    w = std::copy_n(m->weight, m->weights(), w);
    b = std::copy_n(m->bias.data(), m->panels() * panel, b);
    exist = std::copy_n(m->valid.data(), m->panels(), exist);
  }
  return all;
}

Buffer<float> gather_weights(const std::vector<PackedLinear*>& maps) {
  int64_t total = 0;
  for (const PackedLinear* m : maps) total += m->weights();
  Buffer<float> all;
  float* to = all.reserve(total);
  for (PackedLinear* m : maps) {
    float* const end = std::copy_n(m->weight, m->weights(), to);
    m->weight = to;
    m->own = {};
    to = end;
  }
  return all;
}

void Columns::set(const Layout& layout) {
  const int64_t most = layout.B * layout.N;
  Column* column = column_.reserve(most);
  int64_t* first = first_.reserve(most + 1);
  size_ = 0;
  first[0] = 0;
  for (int64_t b = 0; b < layout.B; ++b) {
    int64_t steps = layout.T;
    for (int64_t r = 0; layout.T && r < layout.count(0, b); ++r) {
      while (layout.count(steps - 1, b) <= r) --steps;
      column[size_] = {static_cast<int32_t>(b), static_cast<int32_t>(r),
                       static_cast<int32_t>(steps)};
      first[size_ + 1] = first[size_] + steps;
      ++size_;
    }
  }
}

int64_t Columns::chunk_begin(int64_t i, int64_t chunks) const {
  const int64_t* first = first_.data();
  const int64_t row = first[size_] / chunks * i + first[size_] % chunks * i / chunks;
  return std::lower_bound(first, first + size_, row) - first;
}

void Lists::reserve(ChunkScratch& s, int64_t rows, int64_t inputs, int64_t tiles, bool weighted) {
  s.index.reserve(rows * inputs + append_room);
  if (weighted) s.value.reserve(rows * inputs + append_room);
  s.jobs.reserve(rows * tiles);
  s.sorted.reserve(rows * tiles);
  s.histogram.reserve(inputs + 2);
  s.acc.reserve(rows * panel);
}

Lists::Lists(ChunkScratch& s, int64_t rows, int64_t inputs, int64_t tiles, bool weighted)
    : scratch_(s), rows_(rows), inputs_(inputs), tiles_(tiles), weighted_(weighted) {
  reserve(s, rows, inputs, tiles, weighted);
  index_ = s.index.data();
  value_ = s.value.data();
  jobs_ = s.jobs.data();
  sorted_ = s.sorted.data();
}

void Lists::sort() {
  int32_t* const at = scratch_.histogram.data();
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    const Job* jobs = jobs_ + tile * rows_;
    Job* sorted = sorted_ + tile * rows_;
    int64_t most = 0;
    for (int64_t r = 0; r < rows_; ++r) most = std::max<int64_t>(most, jobs[r].count);
    std::fill_n(at, most + 2, 0);
    for (int64_t r = 0; r < rows_; ++r) ++at[jobs[r].count + 1];
    for (int64_t c = 0; c <= most; ++c) at[c + 1] += at[c];
    for (int64_t r = 0; r < rows_; ++r) sorted[at[jobs[r].count]++] = jobs[r];
  }
}

void Lists::run(const Kernels& k, const PackedLinear& map, int64_t p, float* acc) const {
  const float* const weight = map.panel_weight(p);
  const float* const bias = map.panel_bias(p);
  const int64_t tile_floats = inputs_ * panel / tiles_;  // about so many
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    const Job* jobs = sorted_ + tile * rows_;
    int64_t n = rows_;
    // The first tile starts every sum; later ones pass over the rows without entries.
    if (tile > 0) {
      const Job* some = std::lower_bound(
          jobs, jobs + rows_, 1u, [](const Job& j, uint32_t least) { return j.count < least; });
      n -= some - jobs;
      jobs = some;
    }
    const int64_t lines = n ? (tile_floats / 16 + n - 1) / n : 0;
    k.add_rows({map.panel_outputs(p), weight, index_, weighted_ ? value_ : nullptr, jobs, n,
                tile == 0 ? bias : nullptr, acc, weight + (tile + 1) * tile_floats, lines});
  }
}

void write_sums(const float* acc, const int32_t* row, int64_t n, const PackedLinear& map, int64_t p,
                int64_t pixels, float* to) {
  const int64_t outputs = map.panel_outputs(p);
  for (int64_t i = 0; i < n; ++i, acc += panel) {
    if (pixels == 1) {
      std::copy_n(acc, outputs, to + row[i] * map.outputs + p * panel);
      continue;
    }
    const int64_t image = row[i] / pixels, pixel = row[i] % pixels;
    float* at = to + (image * map.outputs + p * panel) * pixels + pixel;
    for (int64_t o = 0; o < outputs; ++o) at[o * pixels] = acc[o];
  }
}

namespace {

// About how many inputs of these rows of integers or floats are not zero.
double expected_entries(const RowInput& in, const int32_t* row, int64_t rows, const Kernels& k,
                        ChunkScratch& s) {
  // Every eighth row tells the rate well enough.
  int64_t count = 0, looked = 0;
  for (int64_t i = 0; i < rows; i += 8, ++looked) {
    const int64_t C = in.channels, at = row[i] * C;
    count += in.counts ? k.list_bytes(in.counts + at, C, 0, s.index.data(), s.value.data())
                       : k.list_floats(in.values + at, C, 0, s.index.data(), s.value.data());
  }
  return static_cast<double>(count) * rows / std::max<int64_t>(looked, 1);
}

// Lists the inputs of one row and returns their sum; `tile` is a multiple of 64.
double list_row(const RowInput& in, int64_t row, int64_t tile, const Kernels& k, Lists& lists) {
  const int64_t C = in.channels, before = lists.entries();
  double sum = 0;
  // A row without inputs has its tile too.
  for (int64_t c = 0; c == 0 || c < C; c += tile) {
    const int64_t n = std::min(tile, C - c);
    if (in.bits) {
      lists.add_bits(k, in.bits + row * in.stride + c / word_bits, words(n), c);
    } else if (in.counts) {
      const uint8_t* x = in.counts + row * C + c;
      lists.add_bytes(k, x, n, c);
      int64_t total = 0;
      for (int64_t i = 0; i < n; ++i) total += x[i];
      sum += total;
    } else {
      const float* x = in.values + row * C + c;
      lists.add_floats(k, x, n, c);
      for (int64_t i = 0; i < n; ++i) sum += x[i];
    }
    lists.end_tile();
  }
  return in.bits ? lists.entries() - before : sum;
}

}  // namespace

Counted run_linear_lif(const LinearLif& a, const Kernels& k, std::vector<ChunkScratch>& scratch) {
  const Columns& columns = *a.columns;
  const PackedLinear& map = *a.map;
  const int threads = static_cast<int>(scratch.size());
  const int64_t rows = a.layout.rows(), C = a.in.channels;
  if (columns.size() == 0) return {};
  int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int64_t shares = shares_of(chunks, map.panels(), threads);
  if (shares == 1) chunks = std::min((chunks + threads - 1) / threads * threads, columns.size());
  const int64_t small = tile_inputs(C, first_cache_inputs);
  const int64_t most_tiles = std::max<int64_t>((C + small - 1) / small, 1);
  const bool weighted = !a.in.bits;
  // A chunk ends with a whole token.
  const int64_t most_rows = (rows + chunks - 1) / chunks + a.layout.T;
  for (ChunkScratch& s : scratch) {
    Lists::reserve(s, most_rows, C, most_tiles, weighted);
    s.first.reserve(most_rows + 1);
    s.row.reserve(most_rows);
    s.state.reserve(most_rows);
    s.few.reserve(most_rows);
    if (a.in.bits) {
      s.many.reserve(most_rows);
      s.many_bits.reserve(most_rows);
      s.code.reserve(most_rows * group_codes(C));
      s.table.reserve(group_table);
    }
    s.counted = {};
  }
  parallel(threads, chunks * shares, [&](int64_t item, int thread) {
    ChunkScratch& s = scratch[thread];
    const int64_t chunk = item / shares, share = item % shares;
    const double input = s.counted.input;
    const int64_t begin = columns.chunk_begin(chunk, chunks);
    const int64_t end = columns.chunk_begin(chunk + 1, chunks);
    if (begin == end) return;
    const int64_t n = columns.rows_before(end) - columns.rows_before(begin);
    int32_t* const first = s.first.data();
    int32_t* const row = s.row.data();
    int64_t local = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto [image, rank, steps] = columns[i];
      first[i - begin] = static_cast<int32_t>(local);
      if (a.state) {
        s.state.data()[i - begin] =
            a.state + (image * a.layout.N + a.layout.token_at(image, rank)) * map.outputs;
      }
      for (int64_t t = 0; t < steps; ++t, ++local) {
        row[local] = static_cast<int32_t>(a.layout.start(t, image) + rank);
      }
    }
    first[end - begin] = static_cast<int32_t>(local);
    // Rows with many inputs apart.
    int64_t few = 0, many = 0;
    double entries = 0;
    if (a.in.bits) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t* bits = a.in.bits + row[i] * a.in.stride;
        const int64_t count = k.count(bits, words(C));
        if (count > many_rate * C && C >= word_bits) {
          s.many_bits.data()[many] = bits;
          s.many.data()[many++] = static_cast<int32_t>(i);
          s.counted.input += count;
        } else {
          s.few.data()[few++] = static_cast<int32_t>(i);
          entries += count;
        }
      }
    } else {
      std::iota(s.few.data(), s.few.data() + n, 0);
      few = n;
      entries = expected_entries(a.in, row, n, k, s);
    }
    const bool tiled = entries > first_cache_rate * few * C;
    const int64_t tile = tiled ? small : std::max<int64_t>(words(C), 1) * word_bits;
    Lists lists(s, few, C, tiled ? most_tiles : 1, weighted);
    for (int64_t i = 0; i < few; ++i) {
      const int32_t local = s.few.data()[i];
      lists.begin_row(local);
      s.counted.input += list_row(a.in, row[local], tile, k, lists);
    }
    lists.sort();
    if (many) k.list_groups(s.many_bits.data(), many, C, s.code.data());
    float* const acc = s.acc.data();
    for (int64_t p = map.panels() * share / shares; p < map.panels() * (share + 1) / shares; ++p) {
      lists.run(k, map, p, acc);
      if (many) {
        k.add_groups({map.panel_outputs(p), C, map.panel_weight(p), s.many_bits.data(),
                      s.code.data(), s.many.data(), many, map.panel_bias(p), acc, s.table.data()});
      }
      if (a.sums) {
        write_sums(acc, row, n, map, p, 1, a.sums);
        continue;
      }
      s.counted.spikes[p * a.groups / map.panels()] +=
          k.fire({acc, false, first, row, end - begin, a.out + p, map.panels(), map.valid.data()[p],
                  a.state ? s.state.data() : nullptr, p * panel, a.at_rest},
                 a.neuron);
    }
    if (share > 0) s.counted.input = input;  // counted once
  });
  Counted counted;
  for (const ChunkScratch& s : scratch) counted += s.counted;
  return counted;
}

}  // namespace atsnn
