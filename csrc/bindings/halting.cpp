// halting_scores, halt, readout.
#include "../cpu/halting.h"

#include "../cpu/rows.h"
#include "common.h"

namespace atsnn {
namespace {

constexpr int64_t rows_a_chunk = 64;

// ---- scores -------------------------------------------------------------------------------------

Score score_of(const char* op, c10::string_view name) {
  if (name == "first") return Score::first;
  if (name == "mean") return Score::mean;
  if (name == "linear") return Score::linear;
  if (name == "constant") return Score::constant;
  TORCH_CHECK_VALUE(false, op, ": unknown score '", std::string(name), "'");
}

struct HeldScores {
  Tensor x, weight;
  Score score;
  double bias;
  int64_t rows, C;

  HeldScores(const char* op, const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
             c10::string_view name)
      : x(x_.contiguous()),
        weight(weight_.to(at::kDouble).contiguous()),
        score(score_of(op, name)) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, op,
                      ": x must have shape [..., C] with C >= 1, got ", x.sizes());
    C = x.size(-1);
    rows = x.numel() / C;
    const int64_t want = score == Score::linear ? C : 1;
    TORCH_CHECK_VALUE(weight.numel() == want, op, ": weight must have ", want, " elements, got ",
                      weight.sizes());
    TORCH_CHECK_VALUE(bias_.numel() == 1, op, ": bias must have 1 element, got ", bias_.sizes());
    bias = bias_.item<double>();
  }

  template <class S>
  Scores<S> view() const {
    return {read<S>(x), score, read<double>(weight), bias, C};
  }
};

Tensor halting_scores(const Tensor& x, const Tensor& weight, const Tensor& bias,
                      c10::string_view score) {
  const char* op = "halting_scores";
  const HeldScores held(op, x, weight, bias, score);
  Tensor h = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  with_storage(op, x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const auto a = held.view<S>();
    at::parallel_for(0, held.rows, rows_a_chunk, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(scores_forward<S>(a, write<float>(h), begin, end));
    });
  });
  return h;
}

std::tuple<Tensor, Tensor, Tensor> halting_scores_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight, const Tensor& bias,
                                                           c10::string_view score) {
  const char* op = "halting_scores_backward";
  const HeldScores held(op, x, weight, bias, score);
  check_shape(op, "grad", grad, x.sizes().slice(0, x.dim() - 1));
  check_dtype(op, "grad", grad, at::kFloat);
  const Tensor g = grad.contiguous();
  // The linear score reads the detached token, the constant one nothing of it.
  const bool reaches_x = held.score == Score::first || held.score == Score::mean;
  Tensor grad_x = reaches_x ? new_empty(x, x.sizes()) : new_empty(x, {0});
  const auto options = x.options().dtype(at::kDouble);
  Tensor grad_weight = at::empty(weight.sizes(), options);
  double sum = 0, weighted = 0;
  std::vector<ScoreRow> found(held.rows);
  with_storage(op, x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const auto a = held.view<S>();
    S* const gx = reaches_x ? write<S>(grad_x) : nullptr;
    at::parallel_for(0, held.rows, rows_a_chunk, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(scores_backward<S>(a, read<float>(g), gx, found.data(), begin, end));
    });
    for (const ScoreRow& r : found) {
      sum += r.grad_z;
      weighted += r.grad_z * r.f;
    }
    double* const gw = write<double>(grad_weight);
    if (held.score == Score::linear) {
      at::parallel_for(0, held.C, channel_tile, [&](int64_t begin, int64_t end) {
        ATSNN_AT_LEVEL(scores_linear_backward<S>(a, found.data(), held.rows, gw, begin, end));
      });
    } else {
      *gw = held.score == Score::constant ? 0 : weighted;
    }
  });
  Tensor grad_bias = at::empty(bias.sizes(), options);
  *write<double>(grad_bias) = sum;
  return {grad_x, grad_weight.to(weight.scalar_type()), grad_bias.to(bias.scalar_type())};
}

// ---- halt ---------------------------------------------------------------------------------------

bool over_time(const char* op, c10::string_view accumulator) {
  TORCH_CHECK_VALUE(accumulator == "rectangle" || accumulator == "depth", op,
                    ": accumulator must be 'rectangle' or 'depth', got '", std::string(accumulator),
                    "'");
  return accumulator == "rectangle";
}

void check_row_values(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dtype(op, name, t, at::kFloat);
  TORCH_CHECK_VALUE(t.dim() == 1, op, ": ", name, " must have shape [R], got ", t.sizes());
  check_shape(op, name, t, like.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> halt(const Tensor& h, const Tensor& H,
                                                const Tensor& token, const Tensor& offsets,
                                                c10::string_view accumulator, double eps,
                                                bool final) {
  const char* op = "halt";
  check_row_values(op, "h", h, h);
  check_row_values(op, "H", H, h);
  const HeldLayout layout(op, token, offsets, h.size(0));
  const Tensor scores = h.contiguous(), before = H.contiguous();
  Tensor w = new_empty(h, h.sizes()), after = new_empty(h, h.sizes());
  Tensor last = at::empty(h.sizes(), h.options().dtype(at::kBool));
  Tensor steps = at::empty(token.sizes(), token.options(), at::MemoryFormat::Contiguous);
  const Scratch scratch(2 * layout.view.N * sizeof(float));
  halt_step(
      {read<float>(scores), read<float>(before), layout.view, over_time(op, accumulator),
       static_cast<float>(1.0 - eps), final, write<float>(w),
       reinterpret_cast<uint8_t*>(write<bool>(last)), write<float>(after), write<int64_t>(steps)},
      scratch.as<float>());
  return {w, last, after, steps};
}

std::tuple<Tensor, Tensor> halt_backward(const OptionalTensor& grad_w, const OptionalTensor& grad_H,
                                         const Tensor& last, const Tensor& token,
                                         const Tensor& offsets, c10::string_view accumulator) {
  const char* op = "halt_backward";
  check_dtype(op, "last", last, at::kBool);
  TORCH_CHECK_VALUE(last.dim() == 1, op, ": last must have shape [R], got ", last.sizes());
  if (grad_w) check_row_values(op, "grad_w", *grad_w, last);
  if (grad_H) check_row_values(op, "grad_H", *grad_H, last);
  const HeldLayout layout(op, token, offsets, last.size(0));
  const auto options = last.options().dtype(at::kFloat);
  Tensor grad_h = at::empty(last.sizes(), options), grad_before = at::empty(last.sizes(), options);
  const Tensor where = last.contiguous();
  const OptionalTensor gw = contiguous(grad_w), gH = contiguous(grad_H);
  const Scratch scratch(layout.view.N * sizeof(float));
  halt_step_backward({read_or_null<float>(gw), read_or_null<float>(gH),
                      reinterpret_cast<const uint8_t*>(read<bool>(where)), layout.view,
                      over_time(op, accumulator), write<float>(grad_h), write<float>(grad_before)},
                     scratch.as<float>());
  return {grad_h, grad_before};
}

// ---- readout ------------------------------------------------------------------------------------

struct HeldReadout {
  HeldLayout layout;
  Tensor x, w;
  OptionalTensor sizes;
  int64_t C;

  HeldReadout(const char* op, const Tensor& x_, const Tensor& w_, const OptionalTensor& sizes_,
              const OptionalTensor& token, const OptionalTensor& offsets)
      : layout(HeldLayout::of(op, x_, token, offsets)), x(x_.contiguous()), w(w_.contiguous()) {
    const int64_t lead = token ? 1 : 3;
    TORCH_CHECK_VALUE(x.dim() == lead + 1, op,
                      ": x must have shape [T, B, N, C] or, packed, [R, C], got ", x.sizes());
    check_shape(op, "w", w, x.sizes().slice(0, lead));
    check_dtype(op, "w", w, at::kFloat);
    C = x.size(-1);
    if (sizes_) {
      check_shape(op, "sizes", *sizes_, {layout.view.B, layout.view.N});
      sizes = sizes_->to(at::kFloat).contiguous();
    }
  }

  template <class S>
  Readout<S> view() const {
    return {read<S>(x), read<float>(w), read_or_null<float>(sizes), layout.view, C};
  }
};

Tensor readout(const Tensor& x, const Tensor& w, const OptionalTensor& sizes,
               const OptionalTensor& token, const OptionalTensor& offsets) {
  const HeldReadout held("readout", x, w, sizes, token, offsets);
  Tensor out = at::empty({held.layout.view.B, held.C}, x.options().dtype(at::kDouble));
  with_storage("readout", x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const auto a = held.view<S>();
    at::parallel_for(0, a.layout.B * channel_tiles(a.C), 1, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(readout_forward<S>(a, write<double>(out), begin, end));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> readout_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                            const OptionalTensor& sizes,
                                            const OptionalTensor& token,
                                            const OptionalTensor& offsets) {
  const char* op = "readout_backward";
  const HeldReadout held(op, x, w, sizes, token, offsets);
  check_shape(op, "grad", grad, {held.layout.view.B, held.C});
  check_dtype(op, "grad", grad, at::kDouble);
  const Tensor g = grad.contiguous();
  Tensor grad_x = new_empty(x, x.sizes()), grad_w = new_empty(w, w.sizes());
  with_storage(op, x.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const auto a = held.view<S>();
    at::parallel_for(0, a.layout.runs(), 1, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(readout_backward<S>(a, read<double>(g), write<S>(grad_x), write<float>(grad_w),
                                         begin, end));
    });
  });
  return {grad_x, grad_w};
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("halting_scores", &atsnn::halting_scores);
  m.impl("halting_scores_backward", &atsnn::halting_scores_backward);
  m.impl("halt", &atsnn::halt);
  m.impl("halt_backward", &atsnn::halt_backward);
  m.impl("readout", &atsnn::readout);
  m.impl("readout_backward", &atsnn::readout_backward);
}
