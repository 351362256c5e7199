#include "engine.h"

#include <chrono>
#include <cmath>
#include <numeric>

#include "../cpu/halting.h"
#include "../cpu/merging.h"
#include "attention.h"
#include "parallel.h"
#include "rows.h"

namespace atsnn {

int64_t NetworkConfig::grid() const {
  int64_t size = image_size;
  for (bool halves : pooled) {
    if (halves) size = halved(size);
  }
  return size;
}

void StreamState::start(const Network& net, int64_t images, bool stem) {
  const NetworkConfig& c = net.config;
  const int64_t N = c.grid() * c.grid(), C = c.embed_dim, tokens = images * N;
  const auto at_rest = [](Buffer<float>& v, int64_t n, const NeuronParams& p) {
    std::fill_n(v.reserve(n), n, static_cast<float>(p.v_reset));
  };
  batch = images;
  steps = 0;
  broken = false;
  int64_t size = c.image_size;
  for (size_t i = 0; stem && i < conv.size(); ++i) {
    // Neurons lie before a pooling of spikes and after a pooling of sums.
    const bool halves = i < c.pooled.size() && c.pooled[i];
    const int64_t after = halves ? halved(size) : size, side = c.pool_spikes ? size : after;
    at_rest(conv[i], images * side * side * net.conv[i].map.outputs, net.conv[i].neuron);
    size = after;
  }
  block.resize(c.depth);
  for (int64_t l = 0; l < c.depth; ++l) {
    Block& b = block[l];
    const BlockLayers& layers = net.block[l];
    at_rest(b.qkv, tokens * layers.qkv.map.outputs, layers.qkv.neuron);
    at_rest(b.attn, (c.spike_driven ? images : tokens) * C, layers.attn);
    at_rest(b.proj, tokens * C, layers.proj.neuron);
    at_rest(b.fc1, tokens * c.hidden, layers.fc1.neuron);
    at_rest(b.fc2, tokens * C, layers.fc2.neuron);
    b.score.reserve_zeros(tokens);
    b.stop.reserve_zeros(tokens);
  }
  const bool sequential = c.halting == Accumulator::sequential;
  features.reserve_zeros((sequential ? tokens : images) * C);
  total.reserve_zeros(tokens);
  ran.reserve_zeros(tokens);
}

namespace {

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
constexpr int score_bits = 18, row_bits = 8;

constexpr int64_t rows_a_task = 64;  // where rows are handed to threads

}  // namespace

struct Workspace {
  std::vector<ChunkScratch> thread;
  std::vector<Buffer<float>> attend;  // of each thread
  Buffer<uint64_t> map[2], tokens, qkv, attended, branch, hidden;
  // The residual stream: integers, until a merge makes means of them.
  Buffer<uint8_t> counts, counts_next, all_counts;
  Buffer<float> values, values_next;
  OwnedLayout full, active, next;
  Columns columns;
  Buffer<int64_t> cell, scratch, index, steps, target, source, order, partner;
  Buffer<float> h, H, H_next, w, used, sizes, sizes_next, halt_scratch, firing;
  Buffer<uint8_t> last;
  Buffer<double> features, read, similarity, squares, weight;
  Buffer<int64_t> first, entry;
  Buffer<const float*> partners;
  StreamState sequential;  // of a pass that nobody streams
};

namespace {

using Clock = std::chrono::steady_clock;

// Adds the time of its life to a sum.
class Timer {
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
        state_(options.state) {}

  void run() {
    stem();
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
  StreamState* state_;
  int64_t step_ = 0;               // the first timestep of the layouts at hand
  bool floats_ = false;            // whether the residual stream is `values` rather than `counts`
  Layout layout_{};                // of the rows that are computed: in the masked form all of them
  const int64_t* cell_ = nullptr;  // the computed row of each active row; null: the same

  int threads() const { return options_.threads; }
  double& seconds(int64_t l, Piece piece) { return report_.block_seconds[l][size_t(piece)]; }
  void poll() const {
    if (options_.stop && options_.stop()) throw Stopped();
  }

  // ---- stem -------------------------------------------------------------------------------------

  void stem() {
    const Timer timer(report_.stem_seconds);
    int64_t side = c_.image_size, channels = c_.in_channels;
    const int64_t shown = images_.still ? 1 : T_;
    const uint64_t* in = nullptr;
    int64_t largest = 0;
    for (size_t i = 0; i < net_.conv.size(); ++i) {
      const int64_t after = i < c_.pooled.size() && c_.pooled[i] ? halved(side) : side;
      largest = std::max(largest, side * side * words(net_.conv[i].map.outputs));
      side = after;
    }
    for (auto& map : ws_.map) map.reserve(T_ * B_ * largest);
    side = c_.image_size;
    // Images of the group follow each other within a timestep only.
    const float* images = images_.data + b0_ * channels * side * side;
    if (shown > 1 && images_.B != B_) {
      const int64_t one = channels * side * side;
      float* copy = ws_.values.reserve(shown * B_ * one);
      for (int64_t t = 0; t < shown; ++t) {
        std::copy_n(images + t * images_.B * one, B_ * one, copy + t * B_ * one);
      }
      images = copy;
    }
    for (size_t i = 0; i < net_.conv.size(); ++i) {
      const PackedLinear& map = net_.conv[i].map;
      const bool halves = i < c_.pooled.size() && c_.pooled[i];
      uint64_t* out = ws_.map[i % 2].data();
      float* state = nullptr;
      if (state_) {
        const int64_t size = halves && !c_.pool_spikes ? halved(side) : side;
        state = state_->conv[i].data() + b0_ * size * size * map.outputs;
      }
      if (i == 4) out = ws_.branch.reserve(T_ * B_ * N_ * W_);
      const Counted counted = run_conv_lif(
          {i == 0 ? images : nullptr, in, channels, T_, B_, side, side, i == 0 && images_.still,
           halves && !c_.pool_spikes, &map, net_.conv[i].neuron, out, state},
          k_, ws_.thread);
      if (options_.record) {
        const int64_t size = halves && !c_.pool_spikes ? halved(side) : side;
        int64_t* offsets = ws_.index.reserve(T_ * B_ + 1);
        for (int64_t run = 0; run <= T_ * B_; ++run) offsets[run] = run * size * size;
        options_.record({-1,
                         static_cast<int>(2 * i + 1),
                         out,
                         words(map.outputs),
                         map.outputs,
                         {T_, B_, size * size, offsets, nullptr},
                         b0_,
                         0});
      }
      report_.stem_spikes[2 * i] += counted.input;
      report_.stem_spikes[2 * i + 1] += counted.spikes[0];
      if (i == 4) break;
      if (halves && c_.pool_spikes) {
        uint64_t* pooled =
            i == 3 ? ws_.tokens.reserve(T_ * B_ * N_ * W_) : ws_.map[(i + 1) % 2].data();
        pool_bits(out, T_ * B_, side, side, words(map.outputs), halving, pooled, threads());
        // The next layer must not write where it reads.
        if (i < 3) std::swap(ws_.map[0], ws_.map[1]);
        out = pooled;
      }
      if (halves) side = halved(side);
      in = out;
      channels = map.outputs;
      poll();
    }
    const int64_t rows = T_ * B_ * N_;
    uint8_t* x = ws_.counts.reserve_zeros(rows * C_);
    for (int64_t r = 0; r < rows; ++r) {
      add_bits(in + r * W_, C_, x + r * C_);
      add_bits(ws_.branch.data() + r * W_, C_, x + r * C_);
    }
  }

  // ---- what all accumulators share --------------------------------------------------------------

  void start() {
    const int64_t tokens = B_ * N_;
    ws_.scratch.reserve(std::max(T_, N_) * 2 + 4);
    std::fill_n(ws_.sizes.reserve(tokens), tokens, 1.0f);
    ws_.sizes_next.reserve(tokens);
    int64_t* source = ws_.source.reserve(tokens);
    for (int64_t i = 0; i < tokens; ++i) source[i] = i % N_;
    ws_.steps.reserve(tokens);
    ws_.halt_scratch.reserve(2 * N_);
    if (out_.trace()) {
      for (int64_t t = 0; t < T_; ++t) {
        std::fill_n(out_.depth + (t * images_.B + b0_) * N_, tokens, 0);
      }
    }
  }

  // The layout of the next rows, from the active steps of each token.
  void lay_out(OwnedLayout& layout, int64_t T, const int64_t* steps) {
    layout.set(T, B_, N_, steps, ws_.scratch.data());
  }

  // What is computed for the active cells.
  void compute(const OwnedLayout& active) {
    layout_ = masked_ ? ws_.full.view : active.view;
    ws_.columns.set(layout_);
    cell_ = nullptr;
    if (masked_) {
      int64_t* cell = ws_.cell.reserve(active.view.rows());
      row_cells(active.view, cell);
      cell_ = cell;
    }
  }

  // In the masked form, zeroes spikes of halted cells and counts those that are left.
  int64_t settle(uint64_t* spikes, int64_t stride, const OwnedLayout& active, int64_t counted) {
    if (!masked_) return counted;
    int64_t left = 0, at = 0;
    const int64_t rows = layout_.rows();
    // Cells of the active rows, in order.
    uint8_t* on = ws_.last.reserve(rows);
    std::fill_n(on, rows, uint8_t(0));
    for (int64_t i = 0; i < active.view.rows(); ++i) on[cell_[i]] = 1;
    for (int64_t r = 0; r < rows; ++r, at += stride) {
      for (int64_t i = 0; i < stride; ++i) {
        if (!on[r]) spikes[at + i] = 0;
        left += count_bits(spikes[at + i]);
      }
    }
    return left;
  }

  Counted linear(const RowInput& in, const SpikeLayer& layer, uint64_t* out, float* state,
                 int64_t groups = 1) {
    return run_linear_lif({in, &layer.map, layer.neuron, layout_, &ws_.columns, out, state, groups},
                          k_, ws_.thread);
  }

  RowInput residual() const {
    RowInput in{C_};
    if (floats_) {
      in.values = ws_.values.data();
    } else {
      in.counts = ws_.counts.data();
    }
    return in;
  }

  static RowInput spikes(const uint64_t* bits, int64_t channels) {
    RowInput in{channels};
    in.bits = bits;
    in.stride = words(channels);
    return in;
  }

  void add_to_residual(const uint64_t* bits) {
    const int64_t rows = layout_.rows(), tasks = (rows + rows_a_task - 1) / rows_a_task;
    parallel(threads(), tasks, [&](int64_t task, int) {
      const int64_t end = std::min(rows, (task + 1) * rows_a_task);
      for (int64_t r = task * rows_a_task; r < end; ++r) {
        if (floats_) {
          add_bits(bits + r * W_, C_, ws_.values.data() + r * C_);
        } else {
          add_bits(bits + r * W_, C_, ws_.counts.data() + r * C_);
        }
      }
    });
  }

  void record(int64_t l, layer::Block layer, const uint64_t* bits, int64_t stride,
              int64_t channels) const {
    if (options_.record) {
      options_.record({l, layer, bits, stride, channels, layout_, b0_, step_});
    }
  }

  // One block on the rows of `active`; `state` holds membranes of this group's images, or null.
  void run_block(int64_t l, const OwnedLayout& active, StreamState* state) {
    const BlockLayers& layers = net_.block[l];
    const int64_t rows = layout_.rows(), Wq = 3 * W_, Wh = words(c_.hidden);
    double* const counts = report_.block_spikes.data() + l * layer::block_layers;
    report_.rows[l] += active.view.rows();
    StreamState::Block* const keep = state ? &state->block[l] : nullptr;
    const int64_t first = state == state_ ? b0_ : 0;  // of the group in the state's batch
    const auto at = [&](Buffer<float>& v, int64_t of_image) { return v.data() + first * of_image; };
    {
      const Timer timer(seconds(l, Piece::attention));
      uint64_t* qkv = ws_.qkv.reserve(rows * Wq);
      uint64_t* attended = ws_.attended.reserve(rows * W_);
      uint64_t* y = ws_.branch.reserve(rows * W_);
      Counted found = linear(residual(), layers.qkv, qkv,
                             keep ? at(keep->qkv, N_ * layers.qkv.map.outputs) : nullptr, 3);
      if (masked_) {
        settle(qkv, Wq, active, 0);
        count_groups(qkv, rows, found);
        found.input = sum_residual(active);
      }
      counts[layer::attn_in] += found.input;
      for (int i = 0; i < 3; ++i) {
        counts[layer::q + i] += found.spikes[i];
        record(l, layer::Block(layer::q + i), qkv + i * W_, Wq, C_);
      }
      const float* sizes = c_.merging && c_.merge_sizes ? ws_.sizes.data() : nullptr;
      const Attend attend{qkv,
                          qkv + W_,
                          qkv + 2 * W_,
                          Wq,
                          attended,
                          W_,
                          sizes,
                          layout_,
                          C_,
                          c_.num_heads,
                          static_cast<float>(c_.attn_scale),
                          keep ? at(keep->attn, c_.spike_driven ? C_ : N_ * C_) : nullptr};
      int64_t fired = c_.spike_driven
                          ? run_spike_driven_attention(attend, layers.attn, k_, ws_.thread)
                          : run_attention(attend, layers.attn, k_, ws_.attend);
      counts[layer::attn] += settle(attended, W_, active, fired);
      record(l, layer::attn, attended, W_, C_);
      found =
          linear(spikes(attended, C_), layers.proj, y, keep ? at(keep->proj, N_ * C_) : nullptr);
      counts[layer::proj] += settle(y, W_, active, found.spikes[0]);
      record(l, layer::proj, y, W_, C_);
      add_to_residual(y);
    }
    poll();
    {
      const Timer timer(seconds(l, Piece::mlp));
      uint64_t* hidden = ws_.hidden.reserve(rows * Wh);
      uint64_t* y = ws_.branch.data();
      Counted found =
          linear(residual(), layers.fc1, hidden, keep ? at(keep->fc1, N_ * c_.hidden) : nullptr);
      counts[layer::mlp_in] += masked_ ? sum_residual(active) : found.input;
      counts[layer::fc1] += settle(hidden, Wh, active, found.spikes[0]);
      record(l, layer::fc1, hidden, Wh, c_.hidden);
      found =
          linear(spikes(hidden, c_.hidden), layers.fc2, y, keep ? at(keep->fc2, N_ * C_) : nullptr);
      counts[layer::fc2] += settle(y, W_, active, found.spikes[0]);
      record(l, layer::fc2, y, W_, C_);
      add_to_residual(y);
    }
    poll();
  }

  void count_groups(const uint64_t* qkv, int64_t rows, Counted& found) const {
    for (int64_t g = 0; g < 3; ++g) {
      found.spikes[g] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < W_; ++i) found.spikes[g] += count_bits(qkv[(3 * r + g) * W_ + i]);
      }
    }
  }

  // Of the active rows alone.
  double sum_residual(const OwnedLayout& active) const {
    double sum = 0;
    for (int64_t i = 0; i < active.view.rows(); ++i) {
      for (int64_t c = 0; c < C_; ++c) {
        sum +=
            floats_ ? ws_.values.data()[cell_[i] * C_ + c] : ws_.counts.data()[cell_[i] * C_ + c];
      }
    }
    return sum;
  }

  // The active rows, as the residual stream has them: integers, or floats.
  struct Rows {
    const uint8_t* bytes;
    const float* floats;
  };

  Rows active_rows(const OwnedLayout& active) {
    if (!cell_) return {floats_ ? nullptr : ws_.counts.data(), ws_.values.data()};
    const int64_t rows = active.view.rows();
    uint8_t* bytes = floats_ ? nullptr : ws_.counts_next.reserve(rows * C_);
    float* floats = floats_ ? ws_.values_next.reserve(rows * C_) : nullptr;
    copy_rows(cell_, rows, bytes, floats);
    return {bytes, floats};
  }

  // Rows of the residual stream by their index.
  void copy_rows(const int64_t* index, int64_t rows, uint8_t* bytes, float* floats) {
    parallel(threads(), (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
      const int64_t end = std::min(rows, (task + 1) * rows_a_task);
      for (int64_t r = task * rows_a_task; r < end; ++r) {
        if (bytes) {
          std::copy_n(ws_.counts.data() + index[r] * C_, C_, bytes + r * C_);
        } else {
          std::copy_n(ws_.values.data() + index[r] * C_, C_, floats + r * C_);
        }
      }
    });
  }

  void score(Rows x, int64_t n, float* h) {
    const double* const weight = net_.score_weight.data();
    const Scores<uint8_t> of_bytes{x.bytes, c_.score, weight, net_.score_bias, C_};
    const Scores<float> of_floats{x.floats, c_.score, weight, net_.score_bias, C_};
    parallel(threads(), (n + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
      const int64_t begin = task * rows_a_task, end = std::min(n, begin + rows_a_task);
      x.bytes ? k_.scores_of_bytes(of_bytes, h, begin, end) : k_.scores(of_floats, h, begin, end);
    });
  }

  // Adds sum of w * x over the rows to the features.
  void read(Rows x, const float* w, const Layout& layout, double* features) {
    double* sums = ws_.read.reserve(B_ * C_);
    const float* sizes = c_.merging ? ws_.sizes.data() : nullptr;
    const Readout<uint8_t> of_bytes{x.bytes, w, sizes, layout, C_};
    const Readout<float> of_floats{x.floats, w, sizes, layout, C_};
    parallel(threads(), B_ * channel_tiles(C_), [&](int64_t item, int) {
      x.bytes ? k_.readout_of_bytes(of_bytes, sums, item, item + 1)
              : k_.readout(of_floats, sums, item, item + 1);
    });
    for (int64_t i = 0; i < B_ * C_; ++i) features[i] += sums[i];
  }

  void write_logits(const double* total, double cells) {
    const Timer timer(report_.head_seconds);
    double* features = ws_.read.reserve(C_);
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t i = 0; i < C_; ++i) features[i] = static_cast<float>(total[b * C_ + i] / cells);
      for (int64_t o = 0; o < c_.num_classes; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < C_; ++i) sum += features[i] * net_.head_weight[o * C_ + i];
        out_.logits[(b0_ + b) * c_.num_classes + o] = static_cast<float>(sum + net_.head_bias[o]);
      }
    }
  }

  // ---- all timesteps of a block at once ---------------------------------------------------------

  void run_parallel() {
    const int64_t tokens = B_ * N_;
    std::fill_n(ws_.steps.data(), tokens, T_);
    lay_out(ws_.full, T_, ws_.steps.data());
    lay_out(ws_.active, T_, ws_.steps.data());
    ws_.H.reserve_zeros(ws_.active.view.rows());
    double* features =
        state_ ? state_->features.data() + b0_ * C_ : ws_.features.reserve_zeros(B_ * C_);
    for (int64_t l = 0; l < c_.depth; ++l) {
      compute(ws_.active);
      const bool runs = ws_.active.view.rows() > 0;
      if (runs) run_block(l, ws_.active, state_);
      finish_block(l, features);
      if (l + 1 < c_.depth) advance(l, runs);
    }
    const int64_t steps = state_ ? state_->steps + T_ : T_;
    write_logits(features, static_cast<double>(std::max<int64_t>(steps * N_, 1)));
  }

  // Halting and readout; afterwards ws_.steps says what goes on.
  void finish_block(int64_t l, double* features) {
    const bool final = l + 1 == c_.depth, halts = c_.halting != Accumulator::none;
    const Layout& layout = ws_.active.view;
    const int64_t rows = layout.rows();
    float* h = ws_.h.reserve_zeros(rows);
    float* w = ws_.w.reserve(rows);
    uint8_t* last = ws_.last.reserve(rows);
    Rows x{};
    {
      const Timer timer(seconds(l, Piece::scores));
      if (halts || final) x = active_rows(ws_.active);
      if (halts) score(x, rows, h);
      if (options_.scores) take_given_scores(l, layout, h);
    }
    {
      const Timer timer(seconds(l, Piece::accumulators));
      HaltForward step{h,
                       ws_.H.data(),
                       layout,
                       c_.halting == Accumulator::rectangle,
                       static_cast<float>(1.0 - c_.eps),
                       final,
                       w,
                       last,
                       ws_.H_next.reserve(rows),
                       ws_.steps.data()};
      if (state_ && halts) {
        step.earlier_score = state_->block[l].score.data() + b0_ * N_;
        step.earlier_stop = state_->block[l].stop.data() + b0_ * N_;
      }
      halt_step(step, ws_.halt_scratch.data());
      std::swap(ws_.H, ws_.H_next);
    }
    if (halts || final) {
      const Timer timer(seconds(l, Piece::readout));
      float* used = w;
      if (!c_.mean_field) {
        used = ws_.used.reserve(rows);
        std::copy_n(last, rows, used);
      }
      read(x, used, layout, features);
    }
    // Not timed: who asks for no trace does not pay for it.
    if (out_.trace()) trace_block(l, layout, h, w, last);
  }

  void take_given_scores(int64_t l, const Layout& layout, float* h) const {
    for (int64_t t = 0; t < layout.T; ++t) {
      const float* given = options_.scores + ((l * T_ + t) * images_.B + b0_) * N_;
      for (int64_t b = 0; b < B_; ++b) {
        for (int64_t r = 0; r < layout.count(t, b); ++r) {
          h[layout.start(t, b) + r] = given[b * N_ + layout.token_at(b, r)];
        }
      }
    }
  }

  // Rows of one layout into the arrays of the whole batch, from timestep `t0` on.
  void trace_block(int64_t l, const Layout& layout, const float* h, const float* w,
                   const uint8_t* last, int64_t t0 = 0) {
    const int64_t all = images_.B * N_;
    const float* sizes = ws_.sizes.data();
    for (int64_t t = 0; t < layout.T; ++t) {
      const int64_t at = (l * T_ + t0 + t) * all + b0_ * N_;
      std::fill_n(out_.active + at, B_ * N_, uint8_t(0));
      std::fill_n(out_.scores + at, B_ * N_, 0.0f);
      std::fill_n(out_.weights + at, B_ * N_, 0.0f);
      for (int64_t b = 0; b < B_; ++b) {
        for (int64_t r = 0; r < layout.count(t, b); ++r) {
          const int64_t row = layout.start(t, b) + r, token = b * N_ + layout.token_at(b, r);
          out_.active[at + token] = 1;
          out_.scores[at + token] = h[row];
          out_.weights[at + token] = w[row];
          if (last[row]) report_.ponder += (double(l + 1) + w[row]) * sizes[token];
        }
        for (int64_t n = 0; n < N_; ++n) {
          out_.depth[(t0 + t) * all + (b0_ + b) * N_ + n] +=
              out_.active[at + b * N_ + ws_.source.data()[b * N_ + n]];
        }
      }
    }
    std::copy_n(sizes, B_ * N_, out_.block_sizes + l * all + b0_ * N_);
    std::copy_n(sizes, B_ * N_, out_.sizes + b0_ * N_);
    std::copy_n(ws_.source.data(), B_ * N_, out_.source + b0_ * N_);
  }

  // On to the next block: the tokens that go on, merged where they are to be.
  void advance(int64_t l, bool ran) {
    const bool merges = c_.merging && ran && (c_.merge_threshold || c_.merge_r[l] > 0);
    if (merges) {
      {
        const Timer timer(seconds(l, Piece::matching));
        match(l);
      }
      const Timer timer(seconds(l, Piece::merging));
      merge();
      std::swap(ws_.active, ws_.next);
      return;
    }
    const Timer timer(seconds(l, Piece::moves));
    lay_out(ws_.next, T_, ws_.steps.data());
    const int64_t rows = ws_.next.view.rows();
    if (rows != ws_.active.view.rows()) {
      int64_t* index = ws_.index.reserve(rows);
      find_rows(ws_.active.view, ws_.active.rank.data(), ws_.next.view, index);
      const float* H = ws_.H.data();
      float* H_next = ws_.H_next.reserve(rows);
      for (int64_t r = 0; r < rows; ++r) H_next[r] = H[index[r]];
      std::swap(ws_.H, ws_.H_next);
      if (!masked_) take_rows(index, rows);
    }
    std::swap(ws_.active, ws_.next);
  }

  void take_rows(const int64_t* index, int64_t rows) {
    copy_rows(index, rows, floats_ ? nullptr : ws_.counts_next.reserve(rows * C_),
              floats_ ? ws_.values_next.reserve(rows * C_) : nullptr);
    floats_ ? std::swap(ws_.values, ws_.values_next) : std::swap(ws_.counts, ws_.counts_next);
  }

  // Which tokens merge: ws_.target, by the firing counts of the keys.
  void match(int64_t l) {
    const int64_t tokens = B_ * N_;
    float* counts = ws_.firing.reserve_zeros(tokens * C_);
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t t = 0; t < layout_.T; ++t) {
        for (int64_t r = 0; r < layout_.count(t, b); ++r) {
          const uint64_t* keys = ws_.qkv.data() + (3 * (layout_.start(t, b) + r) + 1) * W_;
          add_bits(keys, C_, counts + (b * N_ + layout_.token_at(b, r)) * C_);
        }
      }
    }
    int64_t* target = ws_.target.reserve(tokens);
    int64_t* partner = ws_.partner.reserve(N_);
    int64_t* order = ws_.order.reserve(2 * N_);
    double* similarity = ws_.similarity.reserve(N_);
    double* squares = ws_.squares.reserve(2 * N_);
    const float** partners = ws_.partners.reserve(N_);
    for (int64_t b = 0; b < B_; ++b) {
      best_partners(counts + b * N_ * C_, ws_.steps.data() + b * N_, N_, C_, k_.dots, partner,
                    similarity, order, partners, squares);
      const bool limited = !c_.merge_threshold;
      choose_pairs(partner, similarity, N_, limited ? c_.merge_r[l] : -1,
                   limited ? 0 : *c_.merge_threshold, target + b * N_, order);
    }
  }

  void merge() {
    const int64_t tokens = B_ * N_;
    const int64_t* target = ws_.target.data();
    float* sizes = ws_.sizes.data();
    float* sizes_after = ws_.sizes_next.reserve_zeros(tokens);
    int64_t* source = ws_.source.data();
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t image = i / N_ * N_;
      sizes_after[image + target[i]] += sizes[i];
      source[i] = target[image + source[i]];
      if (target[i] != i % N_) ws_.steps.data()[i] = 0;
    }
    lay_out(ws_.next, T_, ws_.steps.data());
    const Layout& from = ws_.active.view;
    const Layout& to = ws_.next.view;
    combine(from, ws_.active.rank.data(), to, ws_.H.data(), 1, score_bits, ws_.H_next);
    std::swap(ws_.H, ws_.H_next);
    if (!floats_) {
      const int64_t n = layout_.rows() * C_;
      float* values = ws_.values.reserve(n);
      std::copy_n(ws_.counts.data(), n, values);
      floats_ = true;
    }
    combine(layout_, masked_ ? ws_.full.rank.data() : ws_.active.rank.data(),
            masked_ ? ws_.full.view : to, ws_.values.data(), C_, row_bits, ws_.values_next);
    std::swap(ws_.values, ws_.values_next);
    std::swap(ws_.sizes, ws_.sizes_next);
  }

  void combine(const Layout& from, const int64_t* rank, const Layout& to, const float* x,
               int64_t channels, int bits, Buffer<float>& out) {
    const int64_t rows = to.rows();
    int64_t* first = ws_.first.reserve(rows + 1);
    int64_t* entry = ws_.entry.reserve(from.rows());
    double* weight = ws_.weight.reserve(from.rows());
    merge_entries({from, to, rank, ws_.target.data(), ws_.sizes.data()}, first, entry, weight,
                  ws_.scratch.data());
    const CombineRows<float> combined{
        x, first, entry, weight, bits, out.reserve(rows * channels), channels};
    parallel(threads(), (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
      k_.combine_rows(combined, task * rows_a_task, std::min(rows, (task + 1) * rows_a_task));
    });
  }

  // ---- one timestep after the other -------------------------------------------------------------

  void run_sequential() {
    const int64_t tokens = B_ * N_;
    StreamState* state = state_;
    if (!state) {
      ws_.sequential.start(net_, B_, false);
      state = &ws_.sequential;
    }
    const int64_t first = state_ ? b0_ : 0;
    float* total = state->total.data() + first * N_;
    double* features = state->features.data() + first * N_ * C_;
    int64_t* ran = state->ran.data() + first * N_;
    const float threshold = static_cast<float>(1.0 - c_.eps);
    std::swap(ws_.counts, ws_.all_counts);
    for (int64_t t = 0; t < T_; ++t) {
      sequential_step(t, ws_.all_counts.data(), state, total, features, ran, threshold);
    }
    larger_first(ws_.counts, ws_.counts_next);
    std::swap(ws_.counts, ws_.all_counts);
    double* sums = ws_.features.reserve_zeros(B_ * C_);
    for (int64_t i = 0; i < tokens; ++i) {
      const double steps = static_cast<double>(std::max<int64_t>(ran[i], 1));
      for (int64_t c = 0; c < C_; ++c) sums[i / N_ * C_ + c] += features[i * C_ + c] / steps;
    }
    write_logits(sums, static_cast<double>(std::max<int64_t>(N_, 1)));
  }

  void sequential_step(int64_t t, const uint8_t* all, StreamState* state, float* total,
                       double* features, int64_t* ran, float threshold) {
    step_ = t;
    const int64_t tokens = B_ * N_;
    int64_t* steps = ws_.steps.data();
    std::fill_n(steps, tokens, 1);
    lay_out(ws_.full, 1, steps);
    for (int64_t i = 0; i < tokens; ++i) {
      steps[i] = threshold > total[i];
      ran[i] += steps[i];
    }
    lay_out(ws_.active, 1, steps);
    compute(ws_.active);
    float* before = ws_.H.reserve_zeros(tokens);
    gather_step(t, all);
    for (int64_t l = 0; l < c_.depth; ++l) {
      if (layout_.rows() && ws_.active.view.rows()) run_block(l, ws_.active, state);
      const Layout& layout = ws_.active.view;
      const int64_t rows = layout.rows();
      float* h = ws_.h.reserve(rows);
      float* w = ws_.w.reserve(rows);
      uint8_t* last = ws_.last.reserve(rows);
      const Rows x = active_rows(ws_.active);
      {
        const Timer timer(seconds(l, Piece::scores));
        score(x, rows, h);
      }
      const bool final = l + 1 == c_.depth;
      {
        // The readout goes along with the accumulators here.
        const Timer timer(seconds(l, Piece::accumulators));
        std::fill_n(steps, tokens, 0);
        accumulate(x, h, w, last, total, before, features, threshold, final);
      }
      if (out_.trace()) trace_block(l, layout, h, w, last, t);
      const Timer timer(seconds(l, Piece::moves));
      lay_out(ws_.next, 1, steps);
      if (!masked_ && ws_.next.view.rows() != rows) {
        int64_t* index = ws_.index.reserve(ws_.next.view.rows());
        find_rows(layout, ws_.active.rank.data(), ws_.next.view, index);
        take_rows(index, ws_.next.view.rows());
      }
      std::swap(ws_.active, ws_.next);
      compute(ws_.active);
    }
  }

  // One timestep's scores after a block: which tokens go on, and what the readout takes of them.
  void accumulate(Rows x, const float* h, float* w, uint8_t* last, float* total, float* before,
                  double* features, float threshold, bool final) {
    const Layout& layout = ws_.active.view;
    int64_t* steps = ws_.steps.data();
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t r = 0; r < layout.count(0, b); ++r) {
        const int64_t row = layout.start(0, b) + r, token = b * N_ + layout.token_at(b, r);
        total[token] += h[row];
        steps[token] = !final && threshold > total[token];
        last[row] = !steps[token];
        w[row] = last[row] ? 1.0f - before[token] : h[row];
        before[token] += h[row];
        const double used = c_.mean_field ? w[row] : last[row];
        double* sum = features + token * C_;
        for (int64_t c = 0; used != 0 && c < C_; ++c) sum[c] += used * x.bytes[row * C_ + c];
      }
    }
  }

  // The rows of timestep `t` that are computed, of the tokens of all timesteps.
  void gather_step(int64_t t, const uint8_t* all) {
    uint8_t* x = ws_.counts.reserve(B_ * N_ * C_);
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t r = 0; r < layout_.count(0, b); ++r) {
        const int64_t token = b * N_ + layout_.token_at(b, r);
        std::copy_n(all + (t * B_ * N_ + token) * C_, C_, x + (layout_.start(0, b) + r) * C_);
      }
    }
  }
};

// Images that run together: enough rows that reading the weights is shared by many, and no more
// memory than that.
int64_t group_size(const NetworkConfig& c, int64_t T, int threads) {
  const int64_t rows = std::max<int64_t>(T * c.grid() * c.grid(), 1);
  return std::max<int64_t>(threads, 4096 / rows);
}

}  // namespace

Engine::Engine(Network net) : net_(std::move(net)) {
  std::vector<PackedLinear*> maps;
  for (SpikeLayer& layer : net_.conv) maps.push_back(&layer.map);
  for (BlockLayers& b : net_.block) {
    for (SpikeLayer* layer : {&b.qkv, &b.proj, &b.fc1, &b.fc2}) maps.push_back(&layer->map);
  }
  net_.weights = gather_weights(maps);
}
Engine::~Engine() = default;

void Engine::run(const Images& images, const Outputs& out, const Options& options, Report& report) {
  const NetworkConfig& c = net_.config;
  report.stem_spikes.assign(layer::stem_layers, 0);
  report.block_spikes.assign(c.depth * layer::block_layers, 0);
  report.rows.assign(c.depth, 0);
  report.ponder = 0;
  report.stem_seconds = report.head_seconds = 0;
  report.block_seconds.assign(c.depth, PieceSeconds{});
  std::unique_ptr<Workspace> ws;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    if (!pool_.empty()) {
      ws = std::move(pool_.back());
      pool_.pop_back();
    }
  }
  if (!ws) ws = std::make_unique<Workspace>();
  ws->thread.resize(options.threads);
  ws->attend.resize(options.threads);
  const int64_t group = group_size(c, images.T, options.threads);
  // A workspace that an exception leaves behind is not put back.
  if (options.state) options.state->broken = true;  // until the end
  for (int64_t b = 0; b < images.B; b += group) {
    Pass(net_, *ws, options, images, out, b, std::min(group, images.B - b), report).run();
  }
  if (options.state) {
    options.state->steps += images.T;
    options.state->broken = false;
  }
  const std::lock_guard<std::mutex> guard(lock_);
  pool_.push_back(std::move(ws));
}

}  // namespace atsnn
