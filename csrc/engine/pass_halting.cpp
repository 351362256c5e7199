#include "pass.h"

namespace atsnn {

void Pass::run_parallel() {
  const int64_t tokens = B_ * N_;
  std::fill_n(ws_.steps.data(), tokens, T_);
  lay_out(ws_.full, T_, ws_.steps.data());
  lay_out(ws_.active, T_, ws_.steps.data());
  ws_.H.reserve_zeros(ws_.active.view.rows());
  const int64_t read_rows = c_.pixels ? tokens : B_;  // images, or tokens
  double* features = state_ ? state_->features.data() + b0_ * (read_rows / B_) * C_
                            : ws_.features.reserve_zeros(read_rows * C_);
  for (int64_t l = 0; l < c_.depth; ++l) {
    compute(ws_.active);
    const bool runs = ws_.active.view.rows() > 0;
    if (runs) run_block(l, ws_.active, state_);
    finish_block(l, features);
    if (l + 1 < c_.depth) advance(l, runs);
  }
  const int64_t steps = state_ ? state_->steps + T_ : T_;
  const int64_t cells = c_.pixels ? steps : steps * N_;
  write_logits(features, static_cast<double>(std::max<int64_t>(cells, 1)), read_rows);
}

void Pass::finish_block(int64_t l, double* features) {
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
    c_.pixels ? read_tokens(x, used, layout, features) : read(x, used, layout, features);
  }
  // Not timed: who asks for no trace does not pay for it.
  if (out_.trace()) trace_block(l, layout, h, w, last);
}

void Pass::take_given_scores(int64_t l, const Layout& layout, float* h) const {
  for (int64_t t = 0; t < layout.T; ++t) {
    const float* given = options_.scores + ((l * T_ + t) * images_.B + b0_) * N_;
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t r = 0; r < layout.count(t, b); ++r) {
        h[layout.start(t, b) + r] = given[b * N_ + layout.token_at(b, r)];
      }
    }
  }
}

void Pass::trace_block(int64_t l, const Layout& layout, const float* h, const float* w,
                       const uint8_t* last, int64_t t0) {
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

void Pass::advance(int64_t l, bool ran) {
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

void Pass::take_rows(const int64_t* index, int64_t rows) {
  copy_rows(index, rows, floats_ ? nullptr : ws_.counts_next.reserve(rows * C_),
            floats_ ? ws_.values_next.reserve(rows * C_) : nullptr);
  floats_ ? std::swap(ws_.values, ws_.values_next) : std::swap(ws_.counts, ws_.counts_next);
}

void Pass::match(int64_t l) {
  float* counts = ws_.firing.reserve(B_ * N_ * C_);
  int64_t* target = ws_.target.reserve(B_ * N_);
  ws_.match.resize(std::max<size_t>(ws_.match.size(), threads()));
  for (MatchScratch& scratch : ws_.match) scratch.reserve(N_);
  parallel(threads(), B_, [&](int64_t b, int thread) {
    float* own = counts + b * N_ * C_;
    std::fill_n(own, N_ * C_, 0.0f);
    for (int64_t t = 0; t < layout_.T; ++t) {
      for (int64_t r = 0; r < layout_.count(t, b); ++r) {
        const uint64_t* keys = ws_.qkv.data() + (3 * (layout_.start(t, b) + r) + 1) * W_;
        add_bits(keys, C_, own + layout_.token_at(b, r) * C_);
      }
    }
    MatchScratch& s = ws_.match[thread];
    best_partners<float>(own, ws_.steps.data() + b * N_, N_, C_, k_.dots, s.partner.data(),
                         s.similarity.data(), s.order.data(), s.partners.data(), s.squares.data());
    const bool limited = !c_.merge_threshold;
    choose_pairs(s.partner.data(), s.similarity.data(), N_, limited ? c_.merge_r[l] : -1,
                 limited ? 0 : *c_.merge_threshold, target + b * N_, s.order.data());
  });
}

void Pass::merge() {
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
    const int64_t rows = layout_.rows();
    float* values = ws_.values.reserve(rows * C_);
    parallel(threads(), (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
      const int64_t begin = task * rows_a_task * C_;
      const int64_t end = std::min(rows, (task + 1) * rows_a_task) * C_;
      std::copy_n(ws_.counts.data() + begin, end - begin, values + begin);
    });
    floats_ = true;
  }
  combine(layout_, masked_ ? ws_.full.rank.data() : ws_.active.rank.data(),
          masked_ ? ws_.full.view : to, ws_.values.data(), C_, row_bits, ws_.values_next);
  std::swap(ws_.values, ws_.values_next);
  std::swap(ws_.sizes, ws_.sizes_next);
}

void Pass::combine(const Layout& from, const int64_t* rank, const Layout& to, const float* x,
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

}  // namespace atsnn
