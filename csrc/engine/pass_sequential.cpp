#include "pass.h"

namespace atsnn {

void Pass::run_sequential() {
  const int64_t tokens = B_ * N_;
  StreamState* state = state_;
  if (!state) {
    ws_.sequential.reserve(net_, B_, by_step_);
    state = &ws_.sequential;
  }
  const int64_t first = state_ ? b0_ : 0;
  float* total = state->total.data() + first * N_;
  double* features = state->features.data() + first * N_ * C_;
  int64_t* ran = state->ran.data() + first * N_;
  const float threshold = static_cast<float>(1.0 - c_.eps);
  if (by_step_) {
    start_stem();
    ws_.all_counts.reserve(tokens * C_);
  } else {
    std::swap(ws_.counts, ws_.all_counts);
  }
  for (int64_t t = 0; t < T_; ++t) {
    sequential_step(t, state, total, features, ran, threshold);
  }
  larger_first(ws_.counts, ws_.counts_next);
  if (!by_step_) std::swap(ws_.counts, ws_.all_counts);
  double* sums = ws_.features.reserve_zeros((c_.pixels ? tokens : B_) * C_);
  for (int64_t i = 0; i < tokens; ++i) {
    const double steps = static_cast<double>(std::max<int64_t>(ran[i], 1));
    double* sum = sums + (c_.pixels ? i : i / N_) * C_;
    for (int64_t c = 0; c < C_; ++c) sum[c] += features[i * C_ + c] / steps;
  }
  const int64_t cells = c_.pixels ? 1 : std::max<int64_t>(N_, 1);
  write_logits(sums, static_cast<double>(cells), c_.pixels ? tokens : B_);
}

void Pass::sequential_step(int64_t t, StreamState* state, float* total, double* features,
                           int64_t* ran, float threshold) {
  step_ = t;
  at_rest_ = t == 0 && !state_;
  const int64_t tokens = B_ * N_;
  int64_t* steps = ws_.steps.data();
  std::fill_n(steps, tokens, 1);
  lay_out(ws_.full, 1, steps);
  for (int64_t i = 0; i < tokens; ++i) {
    steps[i] = threshold > total[i];
    ran[i] += steps[i];
  }
  lay_out(ws_.active, 1, steps);
  if (by_step_) stem_step(t, state, steps);
  compute(ws_.active);
  float* before = ws_.H.reserve_zeros(tokens);
  gather_step(ws_.all_counts.data() + (by_step_ ? 0 : t * tokens * C_));
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

void Pass::accumulate(Rows x, const float* h, float* w, uint8_t* last, float* total, float* before,
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

void Pass::gather_step(const uint8_t* all) {
  uint8_t* x = ws_.counts.reserve(B_ * N_ * C_);
  for (int64_t b = 0; b < B_; ++b) {
    for (int64_t r = 0; r < layout_.count(0, b); ++r) {
      const int64_t token = b * N_ + layout_.token_at(b, r);
      std::copy_n(all + token * C_, C_, x + (layout_.start(0, b) + r) * C_);
    }
  }
}

}  // namespace atsnn
