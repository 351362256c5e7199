// The kernels of the engine, one table for each instruction set. All levels give the same bits:
// every operation is elementwise and rounded once, in an order that a row's own bits decide.
#pragma once

#include <cstdint>

#include "../cpu/layout.h"
#include "../cpu/merging.h"
#include "../cpu/neuron.h"
#include "../cpu/rows.h"
#include "spikes.h"
#include "window.h"

namespace atsnn {

constexpr int64_t panel = word_bits;  // output channels of a panel: those of a word of spikes

// A row of the accumulators and the inputs to be added to it: entries entry .. entry + count.
struct Job {
  uint32_t entry, count, row;
};

// acc[row] = from + sum over the entries of value * weight[index], [rows, panel]; `from` is the
// bias, or acc itself where that is null. Entries are added in order, one after the other.
struct AddRows {
  int64_t outputs;        // that exist, of the panel; others may be left as they are
  const float* weight;    // [K, panel]
  const uint16_t* index;  // below K
  const float* value;     // null: all 1
  const Job* jobs;
  int64_t num_jobs;
  const float* bias;  // [panel], or null
  float* acc;         // [rows, panel]
  // Lines of memory each job asks for meanwhile, from here on: the weights that come next, which
  // are read in no order that the hardware could foresee.
  const float* ahead;
  int64_t ahead_lines;
};

// The same for rows of which many inputs are set: four inputs at a time are looked up in a table of
// their sixteen sums. A row's sum is that over its groups of four, in order, each group's weights
// added in order first; with few rows the groups are added without a table, to the same bits.
struct AddGroups {
  int64_t outputs, inputs;
  const float* weight;          // [inputs, panel]
  const uint64_t* const* bits;  // of each row
  const uint16_t* code;         // of list_groups
  const int32_t* row;           // in acc
  int64_t rows;
  const float* bias;  // [panel]
  float* acc;
  float* table;  // scratch: group_table
};
constexpr int64_t group_inputs = 4, group_sums = 1 << group_inputs, group_tile = 12;
constexpr int64_t group_columns = panel / 2;  // a tile of tables, 24 KB, stays in the first cache
// Codes of one row.
constexpr int64_t group_codes(int64_t inputs) {
  constexpr int64_t step = group_inputs * group_tile;
  return (inputs + step - 1) / step * group_tile;
}
constexpr int64_t group_table = group_tile * group_sums * group_columns;

// Neurons over the timesteps of columns: a column is 64 channels of one token. Column i has the
// timesteps first[i] .. first[i + 1], each with a row of `acc` (where `still`, row i for all of
// them), and writes one word at each: spikes[row[step] * stride].
struct Fire {
  const float* acc;
  bool still;
  const int32_t *first, *row;
  int64_t columns;
  uint64_t* spikes;
  int64_t stride;
  uint64_t valid;        // channels that exist
  float* const* state;   // of each column, `valid` channels, read and written; null: at rest
  int64_t state_offset;  // where this panel begins in it
  bool at_rest = false;  // neurons begin at rest, and `state` is written only
};

// How the windows of a map of so many channels, a word at most, are put into words: the taps of a
// row of the window side by side in `parts` words, and those of `rows` rows in one where they fit.
struct NarrowWords {
  NarrowWords(const Window& w, int64_t channels)
      : kernel_y(w.kernel_y),
        stride_y(w.stride_y),
        taps(std::min(word_bits / channels, w.kernel_x)),
        parts((w.kernel_x + taps - 1) / taps),
        rows(parts > 1 ? 1 : std::min(word_bits / (w.kernel_x * channels), w.kernel_y)),
        row_bits(w.kernel_x * channels),
        part_bits(taps * channels) {}
  // Of a window.
  int64_t count() const { return (kernel_y + rows - 1) / rows * parts; }
  // Words of scratch for a strip of so many rows and pixels a row of the output: those of the rows,
  // and of the windows of one row.
  int64_t room(int64_t strip, int64_t width, int64_t T) const {
    return T * (((strip - 1) * stride_y + kernel_y) * parts + count()) * width;
  }

  int64_t kernel_y, stride_y, taps, parts, rows, row_bits, part_bits;
};

// The rows of an image that a strip of windows reads, with the margin around it: zeros.
struct PaddedImage {
  Window window;
  int64_t width, channels;  // of the image

  // Floats from a row, or a channel of one, to the next.
  int64_t pitch() const {
    constexpr int64_t together = 16;  // neighbours at a time in the widest vector
    const int64_t read = (window.width(width) + together - 1) / together * together;
    return std::max(read + window.kernel_x - 1, window.pad_x + width);
  }
  int64_t room(int64_t rows) const {
    return ((rows - 1) * window.stride_y + window.kernel_y) * channels * pitch();
  }
};

// A convolution of narrow maps, a word a pixel, or of a float image, to one panel of outputs, and
// its neurons, for a strip of one image: nothing is listed or stored in between. Sums and neurons
// are those of AddRows and Fire.
struct NarrowConv {
  const uint64_t* bits;  // pixel p at timestep t: bits[t * step + p]
  const float* image;    // instead: [channels, height, width] at image + t * step
  bool still;            // the first one is that of all timesteps
  int64_t step, height, width, channels, T;
  Window window;
  Strip strip;
  const float *weight, *bias;  // [taps * channels, panel], [panel]
  uint64_t valid;              // outputs that exist
  uint64_t* out;               // pixel p at timestep t: out[t * out_step + p]
  int64_t out_step;
  float* state;    // of each pixel of the image, `valid` channels, read and written; null: at rest
  uint64_t* room;  // NarrowWords::room of scratch, for bits
  bool at_rest = false;  // neurons begin at rest, and `state` is written only
  // PaddedImage::room of scratch, or null. With it neighbouring places run side by side; for an
  // image that stands still, neurons that begin at rest and are not kept, every place wanted, and
  // windows that move by one place.
  float* padded = nullptr;
};
struct NarrowCounts {
  double input;
  int64_t spikes;
};

// Spiking attention of the heads of one image, in bits: see spiking_attention in
// src/atsnn/reference.py, followed by neurons. Rows are those of `layout`.
struct Attend {
  const uint64_t *q, *k, *v;  // rows `in_stride` words apart
  int64_t in_stride;
  uint64_t* out;  // rows `out_stride` words apart; words of the heads at hand are overwritten
  int64_t out_stride;
  const float* sizes;  // [B, N] in token order, or null: all 1
  Layout layout;
  int64_t C, heads;
  float scale;
  float* state;          // [B, N, C] in token order, read and written; null: at rest
  bool at_rest = false;  // neurons begin at rest, and `state` is written only
};

// The linear layer behind the readout, in float64, each sum rounded once: inputs are added in
// order.
struct Head {
  const double* x;       // [rows, inputs]
  const double* weight;  // [inputs, outputs]
  const double* bias;    // [outputs]
  int64_t inputs, outputs;
  float* out;  // [rows, outputs]
};

// Heads that share no word of spikes with others: gcd(d, 64) divides so many.
int64_t heads_together(int64_t head_dim);
// Floats of scratch for one image of at most `tokens` tokens.
int64_t attend_scratch(int64_t tokens, int64_t head_dim);

struct Kernels {
  const char* name;
  void (*add_rows)(const AddRows&);
  void (*add_groups)(const AddGroups&);
  // Which sums the groups of each row are: for tile after tile of groups, `group_tile` a row.
  void (*list_groups)(const uint64_t* const* bits, int64_t rows, int64_t inputs, uint16_t* code);
  // Returns the number of spikes.
  int64_t (*fire)(const Fire&, const NeuronParams&);
  NarrowCounts (*conv_narrow)(const NarrowConv&, const NeuronParams&);
  int64_t (*attend)(const Attend&, const NeuronParams&, int64_t image, int64_t first_head,
                    int64_t heads, float* scratch);
  void (*head)(const Head&, int64_t begin, int64_t end);
  // Set bits of n words.
  int64_t (*count)(const uint64_t* bits, int64_t n);
  // Lists the set bits of n words, as base + bit, and returns how many there are. Up to 16 more
  // entries are overwritten, here and below.
  int64_t (*list_bits)(const uint64_t* bits, int64_t n, int64_t base, uint16_t* index);
  // The same of n bytes, or floats, that are not zero, with their values.
  int64_t (*list_bytes)(const uint8_t* x, int64_t n, int64_t base, uint16_t* index, float* value);
  int64_t (*list_floats)(const float* x, int64_t n, int64_t base, uint16_t* index, float* value);
  // Bits of n values, set where they are not zero; returns whether those are all 1.
  bool (*pack)(const float* x, int64_t n, uint64_t* bits);
  // n values, 1 or 0.
  void (*unpack)(const uint64_t* bits, int64_t n, float* x);
  // The same of pixels [begin, end) of maps x [channels, pixels]: bits are rows of pixels.
  bool (*pack_pixels)(const float* x, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                      uint64_t* bits);
  void (*unpack_pixels)(const uint64_t* bits, int64_t channels, int64_t pixels, int64_t begin,
                        int64_t end, float* x);
  // The row kernels that the operators run too (rows.h).
  void (*scores)(const Scores<float>&, float* h, int64_t begin, int64_t end);
  void (*scores_of_bytes)(const Scores<uint8_t>&, float* h, int64_t begin, int64_t end);
  void (*readout)(const Readout<float>&, double* out, int64_t begin, int64_t end);
  void (*readout_of_bytes)(const Readout<uint8_t>&, double* out, int64_t begin, int64_t end);
  void (*combine_rows)(const CombineRows<float>&, int64_t begin, int64_t end);
  Dots<float> dots;
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

}  // namespace atsnn
