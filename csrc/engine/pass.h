#pragma once

// A group of images on their way through the network, in the buffers of one call. The class lies
// in four files: the stem, what a block does, halting and merging between blocks, and the
// sequential accumulator's order of them.

#include <algorithm>
#include <chrono>
#include <vector>

#include "../cpu/halting.h"
#include "../cpu/merging.h"
#include "attention.h"
#include "engine.h"
#include "parallel.h"
#include "rows.h"

namespace atsnn {

// A layout that owns its arrays.
struct OwnedLayout {
  Layout view{};
  Buffer<int64_t> steps, token, offsets, rank;

  void set(int64_t T, int64_t B, int64_t N, const int64_t* active_steps, int64_t* scratch) {
    std::copy_n(active_steps, B * N, steps.reserve(B * N));
    rank_tokens(steps.data(), T, B, N, token.reserve(B * N), offsets.reserve(T * B + 1), scratch);
    view = {T, B, N, offsets.data(), token.data()};
    token_ranks(view, rank.reserve(B * N));
  }
};

template <class T>
void larger_first(Buffer<T>& a, Buffer<T>& b) {
  if (a.capacity() < b.capacity()) std::swap(a, b);
}

// Merged accumulators and rows are multiples of 2^-bits: SCORE_BITS and ROW_BITS of
// src/atsnn/reference.py.
inline constexpr int score_bits = 18, row_bits = 8;

inline constexpr int64_t rows_a_task = 64;  // where rows are handed to threads

// What matching the tokens of one image takes.
struct MatchScratch {
  Buffer<int64_t> order, partner;
  Buffer<double> similarity, squares;
  Buffer<const float*> partners;

  void reserve(int64_t tokens) {
    order.reserve(2 * tokens);
    partner.reserve(tokens);
    similarity.reserve(tokens);
    squares.reserve(2 * tokens);
    partners.reserve(tokens);
  }
};

// The pixels of a layer of the stem that are wanted, [B, side, side] bytes: of what leaves it, and,
// where that is half as large, of the map before the pooling.
struct StemPixels {
  Buffer<uint8_t> after, before;
  const uint8_t* sums(const StemMap& m) const { return m.halves ? before.data() : after.data(); }
  const uint8_t* neurons(const StemMap& m) const {
    return m.neurons == m.side ? sums(m) : after.data();
  }
};

struct Workspace {
  std::vector<ChunkScratch> thread;
  std::vector<Buffer<float>> attend;  // of each thread
  Buffer<uint64_t> map[2], shown, tokens, qkv, attended, branch, hidden;
  std::array<StemPixels, 5> stem;
  // The residual stream: integers, until a merge makes means of them.
  Buffer<uint8_t> counts, counts_next, all_counts;
  Buffer<float> values, values_next;
  OwnedLayout full, active, next;
  Columns columns;
  Buffer<int64_t> cell, scratch, index, steps, target, source;
  Buffer<float> h, H, H_next, w, used, sizes, sizes_next, halt_scratch, firing;
  Buffer<uint8_t> last;
  Buffer<double> features, read, weight;
  Buffer<int64_t> first, entry;
  std::vector<MatchScratch> match;  // of each thread
  StreamState sequential;           // of a pass that nobody streams
};

// Adds the time of its life to a sum.
class Timer {
  using Clock = std::chrono::steady_clock;

 public:
  explicit Timer(double& seconds) : at_(seconds), begin_(Clock::now()) {}
  ~Timer() { at_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  double& at_;
  Clock::time_point begin_;
};

// A group of images on their way through the network.
class Pass {
 public:
  Pass(const Network& net, Workspace& ws, const Engine::Options& options, const Images& images,
       const Outputs& out, int64_t first_image, int64_t num_images, Report& report)
      : net_(net),
        c_(net.config),
        ws_(ws),
        k_(*options.kernels),
        options_(options),
        images_(images),
        out_(out),
        report_(report),
        b0_(first_image),
        B_(num_images),
        T_(images.T),
        N_(c_.grid() * c_.grid()),
        C_(c_.embed_dim),
        W_(words(C_)),
        masked_(options.masked && c_.adaptive()),
        by_step_(c_.halting == Accumulator::sequential && !masked_ && !options.record),
        maps_(c_.stem_maps()),
        state_(options.state) {}

  void run() {
    if (!by_step_) stem();
    start();
    c_.halting == Accumulator::sequential ? run_sequential() : run_parallel();
    // Where the next call begins is the larger one, so that a repeated shape grows nothing.
    larger_first(ws_.counts, ws_.counts_next);
    larger_first(ws_.values, ws_.values_next);
  }

 private:
  const Network& net_;
  const NetworkConfig& c_;
  Workspace& ws_;
  const Kernels& k_;
  const Engine::Options& options_;
  const Images& images_;
  const Outputs& out_;
  Report& report_;
  const int64_t b0_, B_, T_, N_, C_, W_;
  const bool masked_;
  // Whether the stem runs timestep by timestep, around the tokens that go on alone.
  const bool by_step_;
  const std::array<StemMap, 5> maps_;
  StreamState* state_;
  int64_t step_ = 0;  // the first timestep of the layouts at hand
  // Whether no neuron has run yet: what lies where membranes are kept is of another call. Tokens
  // that miss the first timestep miss all, so none of it is read later either.
  bool at_rest_ = false;
  bool floats_ = false;            // whether the residual stream is `values` rather than `counts`
  Layout layout_{};                // of the rows that are computed: in the masked form all of them
  const int64_t* cell_ = nullptr;  // the computed row of each active row; null: the same

  int threads() const { return options_.threads; }
  double& seconds(int64_t l, Piece piece) { return report_.block_seconds[l][size_t(piece)]; }
  void poll() const {
    if (options_.stop && options_.stop()) throw Stopped();
  }

  // ---- stem -------------------------------------------------------------------------------------

  // All of it, at every timestep: tokens into ws_.counts.
  void stem();

  // The same a timestep at a time, for tokens that are active then: into ws_.all_counts. Those that
  // have halted stay so, and what none of the others will look at need not be known.
  void start_stem();
  void stem_step(int64_t t, StreamState* state, const int64_t* active);
  void want_stem(const int64_t* active);

  void reserve_stem(int64_t T);
  int64_t image_floats() const { return c_.in_channels * c_.image_size * c_.image_size; }
  float* stem_state(StreamState* state, int i) const;
  // One layer for T timesteps, of images or of spikes; returns what leaves it.
  const uint64_t* stem_layer(int i, int64_t T, const float* images, const uint64_t* in,
                             float* state, const StemPixels* wanted);

  // ---- what all accumulators share --------------------------------------------------------------

  void start();

  // The layout of the next rows, from the active steps of each token.
  void lay_out(OwnedLayout& layout, int64_t T, const int64_t* steps) {
    layout.set(T, B_, N_, steps, ws_.scratch.data());
  }

  // What is computed for the active cells.
  void compute(const OwnedLayout& active);

  // In the masked form, zeroes spikes of halted cells and counts those that are left.
  int64_t settle(uint64_t* spikes, int64_t stride, const OwnedLayout& active, int64_t counted);

  Counted linear(const RowInput& in, const SpikeLayer& layer, uint64_t* out, float* state,
                 int64_t groups = 1);
  RowInput residual() const;

  static RowInput spikes(const uint64_t* bits, int64_t channels) {
    RowInput in{channels};
    in.bits = bits;
    in.stride = words(channels);
    return in;
  }

  void add_to_residual(const uint64_t* bits);

  void record(int64_t l, layer::Block layer, const uint64_t* bits, int64_t stride,
              int64_t channels) const {
    if (options_.record) {
      options_.record({l, layer, bits, stride, channels, layout_, b0_, step_});
    }
  }

  // One block on the rows of `active`; `state` holds membranes of this group's images, or null.
  void run_block(int64_t l, const OwnedLayout& active, StreamState* state);
  void count_groups(const uint64_t* qkv, int64_t rows, Counted& found) const;

  // Of the active rows alone.
  double sum_residual(const OwnedLayout& active) const;

  // The active rows, as the residual stream has them: integers, or floats.
  struct Rows {
    const uint8_t* bytes;
    const float* floats;
  };
  Rows active_rows(const OwnedLayout& active);

  // Rows of the residual stream by their index.
  void copy_rows(const int64_t* index, int64_t rows, uint8_t* bytes, float* floats);
  void score(Rows x, int64_t n, float* h);

  // Adds sum of w * x over the rows to the features, of images or of original tokens.
  void read(Rows x, const float* w, const Layout& layout, double* features);
  void read_tokens(Rows x, const float* w, const Layout& layout, double* features);
  // Of the mean over so many cells, for each of `rows` images or tokens from the group's first on.
  void write_logits(const double* total, double cells, int64_t rows);

  // ---- all timesteps of a block at once ---------------------------------------------------------

  void run_parallel();

  // Halting and readout; afterwards ws_.steps says what goes on.
  void finish_block(int64_t l, double* features);
  void take_given_scores(int64_t l, const Layout& layout, float* h) const;

  // Rows of one layout into the arrays of the whole batch, from timestep `t0` on.
  void trace_block(int64_t l, const Layout& layout, const float* h, const float* w,
                   const uint8_t* last, int64_t t0 = 0);

  // On to the next block: the tokens that go on, merged where they are to be.
  void advance(int64_t l, bool ran);
  void take_rows(const int64_t* index, int64_t rows);

  // Which tokens merge: ws_.target, by the firing counts of the keys.
  void match(int64_t l);
  void merge();

  void combine(const Layout& from, const int64_t* rank, const Layout& to, const float* x,
               int64_t channels, int bits, Buffer<float>& out);

  // ---- one timestep after the other -------------------------------------------------------------

  void run_sequential();

  void sequential_step(int64_t t, StreamState* state, float* total, double* features, int64_t* ran,
                       float threshold);

  // One timestep's scores after a block: which tokens go on, and what the readout takes of them.
  void accumulate(Rows x, const float* h, float* w, uint8_t* last, float* total, float* before,
                  double* features, float threshold, bool final);

  // The rows of a timestep that are computed, of all its tokens.
  void gather_step(const uint8_t* all);
};

}  // namespace atsnn
