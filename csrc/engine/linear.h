// Linear map, then neurons over the timesteps: bits in, bits out, no float activation written.
//
// For each row the weight rows of its non-zero inputs are added, in ascending order (in groups of
// four where many are set), to sums that start from the bias; so a row's sums depend on its own
// inputs alone. Rows are taken in chunks of
// whole tokens, outputs in panels of 64, inputs in tiles that stay in the first cache.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace atsnn {

// Weights for adding rows: for each panel of 64 outputs [K, 64], zeros past the last output.
struct PackedLinear {
  int64_t inputs = 0, outputs = 0;
  const float* weight = nullptr;  // [panels, K, 64], in `own` or in memory shared with other maps
  Buffer<float> own;
  Buffer<float> bias;      // [panels, 64]
  Buffer<uint64_t> valid;  // [panels], the outputs that exist

  PackedLinear() = default;
  // weight [outputs, inputs], bias [outputs] or null.
  PackedLinear(const float* weight, const float* bias, int64_t outputs, int64_t inputs);
  int64_t panels() const { return words(outputs); }
  int64_t weights() const { return panels() * inputs * panel; }
  const float* panel_weight(int64_t p) const { return weight + p * inputs * panel; }
  const float* panel_bias(int64_t p) const { return bias.data() + p * panel; }
  int64_t panel_outputs(int64_t p) const { return count_bits(valid.data()[p]); }
};

// Moves the weights of several maps into one piece of memory, which is returned.
Buffer<float> gather_weights(const std::vector<PackedLinear*>& maps);

// Several maps of one input side by side: the outputs of each begin at a panel.
PackedLinear beside(const std::vector<const PackedLinear*>& maps);

// A linear map and the neurons behind it.
struct SpikeLayer {
  PackedLinear map;
  NeuronParams neuron;
};

// Inputs of a kernel are 16-bit indices.
constexpr int64_t most_inputs = (1 << 16) - 1;

// Rows of inputs, in one of three forms.
struct RowInput {
  int64_t channels;
  const uint64_t* bits = nullptr;   // rows `stride` words apart
  const uint8_t* counts = nullptr;  // [R, channels]
  const float* values = nullptr;    // [R, channels]
  int64_t stride = 0;
};

// A token and the timesteps it is active for.
struct Column {
  int32_t image, rank, steps;
};

// The active tokens of a layout in the order of images and ranks.
class Columns {
 public:
  void set(const Layout& layout);
  int64_t size() const { return size_; }
  const Column& operator[](int64_t i) const { return column_.data()[i]; }
  // Rows of the columns before i.
  int64_t rows_before(int64_t i) const { return first_.data()[i]; }
  // The first column of chunk `i` of `chunks` of about as many rows each.
  int64_t chunk_begin(int64_t i, int64_t chunks) const;

 private:
  int64_t size_ = 0;
  Buffer<Column> column_;
  Buffer<int64_t> first_;
};

// What a layer counted.
struct Counted {
  double input = 0;               // sum of its inputs
  int64_t spikes[3] = {0, 0, 0};  // of its outputs, by group

  Counted& operator+=(const Counted& other) {
    input += other.input;
    for (int i = 0; i < 3; ++i) spikes[i] += other.spikes[i];
    return *this;
  }
};

// What a thread needs to run a chunk.
struct ChunkScratch {
  Buffer<uint16_t> index;
  Buffer<float> value;
  Buffer<Job> jobs, sorted;
  Buffer<float> acc, room;
  Buffer<int32_t> first, row, histogram;
  Buffer<float*> state;
  Buffer<uint64_t> gate;
  // Rows of which many inputs are set, and what adding them in groups needs.
  Buffer<const uint64_t*> many_bits;
  Buffer<int32_t> many, few;
  Buffer<uint16_t> code;
  Buffer<float> table;
  Buffer<uint32_t> found;  // where lists begin that are put together (conv.cpp)
  Buffer<uint16_t> part;
  Buffer<float> part_value;
  Buffer<float> patch;   // the inputs of one pixel
  Buffer<uint8_t> read;  // pixels that pooling reads (conv.cpp), and where their sums are
  Buffer<int32_t> sum_of;
  Buffer<uint64_t> windows;  // of narrow maps
  Counted counted;
};

// Jobs of the rows of a chunk, tile by tile of the inputs.
class Lists {
 public:
  Lists(ChunkScratch& scratch, int64_t rows, int64_t inputs, int64_t tiles, bool weighted);
  static void reserve(ChunkScratch& scratch, int64_t rows, int64_t inputs, int64_t tiles,
                      bool weighted);
  // Entries of the row at hand, in ascending order of the index.
  void add_bits(const Kernels& k, const uint64_t* bits, int64_t n, int64_t base) {
    n_ += k.list_bits(bits, n, base, index_ + n_);
  }
  void add_bytes(const Kernels& k, const uint8_t* x, int64_t n, int64_t base) {
    n_ += k.list_bytes(x, n, base, index_ + n_, value_ + n_);
  }
  void add_floats(const Kernels& k, const float* x, int64_t n, int64_t base) {
    n_ += k.list_floats(x, n, base, index_ + n_, value_ + n_);
  }
  // Entries from another list, each index moved by `shift`; up to 16 more elements are touched.
  void append(const uint16_t* from, int64_t count, int64_t shift) {
    uint16_t* to = index_ + n_;
    n_ += count;
    do {  // nearly always once
      for (int64_t i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from[i] + shift);
      to += 16;
      from += 16;
      count -= 16;
    } while (count > 0);
  }
  // The same with their values.
  void append(const uint16_t* from, const float* value, int64_t count, int64_t shift) {
    std::copy_n(value, count, value_ + n_);
    append(from, count, shift);
  }
  // The row the next entries belong to; without it rows come in their order.
  void begin_row(int64_t row) { name_ = row; }
  void end_tile() {
    jobs_[tile_ * rows_ + row_] = {static_cast<uint32_t>(begin_),
                                   static_cast<uint32_t>(n_ - begin_),
                                   static_cast<uint32_t>(name_ >= 0 ? name_ : row_)};
    begin_ = n_;
    if (++tile_ == tiles_) tile_ = 0, ++row_;
  }
  int64_t entries() const { return n_; }
  // Adds all rows into `acc [rows, 64]` for one panel, whose weights the next one's follow.
  void run(const Kernels& k, const PackedLinear& map, int64_t p, float* acc) const;
  // Sorts the jobs of each tile by their number of entries: loops of equal length follow each
  // other, and the processor foresees where they end. To be called once all rows are listed.
  void sort();

 private:
  ChunkScratch& scratch_;
  uint16_t* index_;
  float* value_;
  Job *jobs_, *sorted_;
  int64_t rows_, inputs_, tiles_;
  bool weighted_;
  int64_t n_ = 0, begin_ = 0, row_ = 0, tile_ = 0, name_ = -1;
};

// Inputs of a tile of weights: most of 192 stay in the first cache while all rows of a chunk read
// them. Where less than this share of inputs is not zero there is so little to add that visiting
// the sums of a row again for each tile costs more than weights from the second cache do.
constexpr int64_t first_cache_inputs = 192;
constexpr double first_cache_rate = 0.03;
// A row with more than this share of its inputs set is added in groups of four, which costs the
// same however many are set. It is a matter of the row alone, as the order of its additions is.
constexpr double many_rate = 0.36;
// Inputs of a tile for nearly equal tiles of whole words, at most about `most` each.
constexpr int64_t tile_inputs(int64_t inputs, int64_t most) {
  const int64_t tiles = std::max<int64_t>((inputs + most - 1) / most, 1);
  return std::max<int64_t>(words((inputs + tiles - 1) / tiles), 1) * word_bits;
}

// Threads that share one piece of work where pieces are few, each with panels of its own: so each
// reads a part of the weights, which are more than the rows that all of them list.
constexpr int64_t shares_of(int64_t pieces, int64_t panels, int64_t threads) {
  return std::clamp<int64_t>((threads + pieces - 1) / pieces, 1, std::max<int64_t>(panels, 1));
}

struct LinearLif {
  RowInput in;
  const PackedLinear* map;
  NeuronParams neuron;
  Layout layout;
  const Columns* columns;  // of `layout`
  uint64_t* out;           // [R, panels]
  float* state;            // [B, N, outputs], read and written; null: at rest
  int64_t groups = 1;      // outputs that are counted apart: so many equal runs of panels
  float* sums = nullptr;   // [R, outputs]: the sums themselves, without neurons
  bool at_rest = false;    // neurons begin at rest, and `state` is written only
};

// Sums [n, panel] of one panel to the rows row[i] of `to`, which has rows of all outputs, or maps
// [outputs, pixels] of so many rows each.
void write_sums(const float* acc, const int32_t* row, int64_t n, const PackedLinear& map, int64_t p,
                int64_t pixels, float* to);

// One scratch for each thread.
Counted run_linear_lif(const LinearLif& a, const Kernels& k, std::vector<ChunkScratch>& scratch);

}  // namespace atsnn
