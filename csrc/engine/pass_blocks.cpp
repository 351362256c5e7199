#include "pass.h"

namespace atsnn {

void Pass::start() {
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

void Pass::compute(const OwnedLayout& active) {
  layout_ = masked_ ? ws_.full.view : active.view;
  ws_.columns.set(layout_);
  cell_ = nullptr;
  if (masked_) {
    int64_t* cell = ws_.cell.reserve(active.view.rows());
    row_cells(active.view, cell);
    cell_ = cell;
  }
}

int64_t Pass::settle(uint64_t* spikes, int64_t stride, const OwnedLayout& active, int64_t counted) {
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

Counted Pass::linear(const RowInput& in, const SpikeLayer& layer, uint64_t* out, float* state,
                     int64_t groups) {
  LinearLif linear{in, &layer.map, layer.neuron, layout_, &ws_.columns, out, state, groups};
  linear.at_rest = at_rest_;
  return run_linear_lif(linear, k_, ws_.thread);
}

RowInput Pass::residual() const {
  RowInput in{C_};
  if (floats_) {
    in.values = ws_.values.data();
  } else {
    in.counts = ws_.counts.data();
  }
  return in;
}

void Pass::add_to_residual(const uint64_t* bits) {
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

void Pass::run_block(int64_t l, const OwnedLayout& active, StreamState* state) {
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
                        keep ? at(keep->attn, c_.spike_driven ? C_ : N_ * C_) : nullptr,
                        at_rest_};
    int64_t fired = c_.spike_driven
                        ? run_spike_driven_attention(attend, layers.attn, k_, ws_.thread)
                        : run_attention(attend, layers.attn, k_, ws_.attend);
    counts[layer::attn] += settle(attended, W_, active, fired);
    record(l, layer::attn, attended, W_, C_);
    found = linear(spikes(attended, C_), layers.proj, y, keep ? at(keep->proj, N_ * C_) : nullptr);
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

void Pass::count_groups(const uint64_t* qkv, int64_t rows, Counted& found) const {
  for (int64_t g = 0; g < 3; ++g) {
    found.spikes[g] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < W_; ++i) found.spikes[g] += count_bits(qkv[(3 * r + g) * W_ + i]);
    }
  }
}

double Pass::sum_residual(const OwnedLayout& active) const {
  double sum = 0;
  for (int64_t i = 0; i < active.view.rows(); ++i) {
    for (int64_t c = 0; c < C_; ++c) {
      sum += floats_ ? ws_.values.data()[cell_[i] * C_ + c] : ws_.counts.data()[cell_[i] * C_ + c];
    }
  }
  return sum;
}

Pass::Rows Pass::active_rows(const OwnedLayout& active) {
  if (!cell_) return {floats_ ? nullptr : ws_.counts.data(), ws_.values.data()};
  const int64_t rows = active.view.rows();
  uint8_t* bytes = floats_ ? nullptr : ws_.counts_next.reserve(rows * C_);
  float* floats = floats_ ? ws_.values_next.reserve(rows * C_) : nullptr;
  copy_rows(cell_, rows, bytes, floats);
  return {bytes, floats};
}

void Pass::copy_rows(const int64_t* index, int64_t rows, uint8_t* bytes, float* floats) {
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

void Pass::score(Rows x, int64_t n, float* h) {
  const double* const weight = net_.score_weight.data();
  const Scores<uint8_t> of_bytes{x.bytes, c_.score, weight, net_.score_bias, C_};
  const Scores<float> of_floats{x.floats, c_.score, weight, net_.score_bias, C_};
  parallel(threads(), (n + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t begin = task * rows_a_task, end = std::min(n, begin + rows_a_task);
    x.bytes ? k_.scores_of_bytes(of_bytes, h, begin, end) : k_.scores(of_floats, h, begin, end);
  });
}

void Pass::read(Rows x, const float* w, const Layout& layout, double* features) {
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

void Pass::read_tokens(Rows x, const float* w, const Layout& layout, double* features) {
  double* sums = ws_.read.reserve_zeros(B_ * N_ * C_);
  parallel(threads(), B_, [&](int64_t b, int) {
    for (int64_t t = 0; t < layout.T; ++t) {
      for (int64_t r = 0; r < layout.count(t, b); ++r) {
        const int64_t row = layout.start(t, b) + r;
        const double weight = w[row];
        double* sum = sums + (b * N_ + layout.token_at(b, r)) * C_;
        for (int64_t c = 0; weight != 0 && c < C_; ++c) {
          sum[c] += weight * (x.bytes ? x.bytes[row * C_ + c] : x.floats[row * C_ + c]);
        }
      }
    }
    // A token that was merged away takes what its holder has.
    for (int64_t n = 0; n < N_; ++n) {
      const double* from = sums + (b * N_ + ws_.source.data()[b * N_ + n]) * C_;
      double* to = features + (b * N_ + n) * C_;
      for (int64_t c = 0; c < C_; ++c) to[c] += from[c];
    }
  });
}

void Pass::write_logits(const double* total, double cells, int64_t rows) {
  const Timer timer(report_.head_seconds);
  const int64_t first = c_.pixels ? b0_ * N_ : b0_;
  double* features = ws_.read.reserve(rows * C_);
  const Head head{features,   net_.head_weight.data(),         net_.head_bias.data(), C_,
                  c_.outputs, out_.logits + first * c_.outputs};
  parallel(threads(), (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t begin = task * rows_a_task, end = std::min(rows, begin + rows_a_task);
    for (int64_t i = begin * C_; i < end * C_; ++i) {
      features[i] = static_cast<float>(total[i] / cells);
    }
    k_.head(head, begin, end);
  });
}

}  // namespace atsnn
