// take_rows, firing_counts, match_tokens, merge_tokens, unmerge_tokens.
#include "../cpu/merging.h"

#include "../cpu/rows.h"
#include "common.h"

namespace atsnn {
namespace {

constexpr int64_t rows_a_chunk = 64;

// Rows of channels: [R, C], or [R] as [R, 1]; dense x [T, B, N(, C)] as [T * B * N, C].
struct Channels {
  Tensor rows;
  int64_t C;

  Channels(const Tensor& x, int64_t lead)
      : rows(x.contiguous()), C(c10::multiply_integers(x.sizes().slice(lead))) {}
};

// Dimensions before the channels.
int64_t lead_dims(const OptionalTensor& token) { return token ? 1 : 3; }

void gather(const char* op, const Channels& x, const int64_t* index, const double* share,
            const Tensor& out, int64_t rows) {
  with_storage(op, out.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const GatherRows<S> a{read<S>(x.rows), index, share, write<S>(out), x.C};
    at::parallel_for(0, rows, rows_a_chunk, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(gather_rows<S>(a, begin, end));
    });
  });
}

void combine(const char* op, const Channels& x, const int64_t* first, const int64_t* source,
             const double* weight, int64_t bits, const Tensor& out, int64_t rows) {
  with_storage(op, out.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const CombineRows<S> a{read<S>(x.rows),        first,         source, weight,
                           static_cast<int>(bits), write<S>(out), x.C};
    at::parallel_for(0, rows, rows_a_chunk, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(combine_rows<S>(a, begin, end));
    });
  });
}

// ---- take_rows ----------------------------------------------------------------------------------

const int64_t* checked_index(const char* op, const Tensor& index, int64_t rows) {
  check_dtype(op, "index", index, at::kLong);
  TORCH_CHECK_VALUE(index.dim() == 1, op, ": index must have shape [R], got ", index.sizes());
  const int64_t* p = read<int64_t>(index);
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < rows, op, ": index must lie in 0 .. ", rows - 1, ", got ",
                      p[i], " at position ", i);
  }
  return p;
}

Tensor take_rows(const Tensor& x, const Tensor& index) {
  const char* op = "take_rows";
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have shape [R, ...], got a 0-d tensor");
  const Tensor held = index.contiguous();
  const int64_t* p = checked_index(op, held, x.size(0));
  auto shape = x.sizes().vec();
  shape[0] = held.numel();
  Tensor out = new_empty(x, shape);
  gather(op, Channels(x, 1), p, nullptr, out, held.numel());
  return out;
}

Tensor take_rows_backward(const Tensor& grad, const Tensor& index, int64_t rows) {
  const char* op = "take_rows_backward";
  TORCH_CHECK_VALUE(grad.dim() >= 1 && index.dim() == 1 && grad.size(0) == index.size(0), op,
                    ": grad must have the ", index.numel(), " rows of index, got ", grad.sizes());
  TORCH_CHECK_VALUE(rows >= 0, op, ": rows must be at least 0, got ", rows);
  const Tensor held = index.contiguous();
  const int64_t* p = checked_index(op, held, rows);
  auto shape = grad.sizes().vec();
  shape[0] = rows;
  Tensor out = new_empty(grad, shape);
  std::vector<int64_t> first(rows + 1), source(held.numel());
  group_by_row(p, held.numel(), rows, first.data(), source.data());
  combine(op, Channels(grad, 1), first.data(), source.data(), nullptr, 0, out, rows);
  return out;
}

// ---- matching -----------------------------------------------------------------------------------

Tensor firing_counts(const Tensor& keys, const OptionalTensor& token,
                     const OptionalTensor& offsets) {
  const char* op = "firing_counts";
  const HeldLayout layout = HeldLayout::of(op, keys, token, offsets);
  TORCH_CHECK_VALUE(keys.dim() == lead_dims(token) + 1, op,
                    ": keys must have shape [T, B, N, C] or, packed, [R, C], got ", keys.sizes());
  const Channels x(keys, lead_dims(token));
  Tensor out = at::empty({layout.view.B, layout.view.N, x.C}, keys.options().dtype(at::kFloat));
  with_storage(op, keys.scalar_type(), [&](auto storage) {
    using S = typename decltype(storage)::type;
    const SumSteps<S> a{read<S>(x.rows), write<float>(out), layout.view, x.C};
    at::parallel_for(0, a.layout.B * a.layout.N, rows_a_chunk, [&](int64_t begin, int64_t end) {
      ATSNN_AT_LEVEL(sum_steps<S>(a, begin, end));
    });
  });
  return out;
}

template <class A>
void match(const Tensor& counts, const Tensor& steps, int64_t r, double threshold,
           const Tensor& target) {
  const int64_t B = counts.size(0), N = counts.size(1), C = counts.size(2);
  const Dots<A> dot = ATSNN_AT_LEVEL(dots<A>);
  // Similarities are squared cosines; every one exceeds a threshold below 0.
  const double limit = threshold < 0 ? -1.0 : threshold * threshold;
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> partner(N), index(2 * N);
    std::vector<double> similarity(N), values(2 * N);
    std::vector<const A*> rows(N);
    for (int64_t b = begin; b < end; ++b) {
      best_partners<A>(read<A>(counts) + b * N * C, read<int64_t>(steps) + b * N, N, C, dot,
                       partner.data(), similarity.data(), index.data(), rows.data(), values.data());
      choose_pairs(partner.data(), similarity.data(), N, r, limit, write<int64_t>(target) + b * N,
                   index.data());
    }
  });
}

Tensor match_tokens(const Tensor& counts, const Tensor& active_steps, std::optional<int64_t> r,
                    std::optional<double> threshold) {
  const char* op = "match_tokens";
  TORCH_CHECK_VALUE(counts.dim() == 3, op, ": counts must have shape [B, N, C], got ",
                    counts.sizes());
  check_shape(op, "active_steps", active_steps, counts.sizes().slice(0, 2));
  check_dtype(op, "active_steps", active_steps, at::kLong);
  TORCH_CHECK_VALUE(r.has_value() != threshold.has_value(), op,
                    ": exactly one of r and threshold must be given");
  TORCH_CHECK_VALUE(!r || *r >= 0, op, ": r must be at least 0, got ", r.value_or(0));
  Tensor target = at::empty(counts.sizes().slice(0, 2), active_steps.options());
  const Tensor steps = active_steps.contiguous();
  // Dots of integers are exact in float32 below 2^24.
  const double most = counts.numel() ? counts.max().item<double>() : 0;
  if (most * most * counts.size(2) < 0x1p24) {
    match<float>(counts.to(at::kFloat).contiguous(), steps, r.value_or(-1), threshold.value_or(0),
                 target);
  } else {
    match<double>(counts.to(at::kDouble).contiguous(), steps, r.value_or(-1), threshold.value_or(0),
                  target);
  }
  return target;
}

// ---- merging ------------------------------------------------------------------------------------

// A plan and the layouts before and after it, checked.
struct HeldMerge {
  HeldLayout from, to;
  Tensor target, sizes;
  std::vector<int64_t> rank;
  Merge view;

  HeldMerge(const char* op, HeldLayout from_, const Tensor& target_, const OptionalTensor& sizes_,
            const OptionalTensor& to_token, const OptionalTensor& to_offsets)
      : from(std::move(from_)),
        to(to_token ? HeldLayout(op, to_token, to_offsets)
                    : HeldLayout(from.view.T, from.view.B, from.view.N)),
        target(target_.contiguous()) {
    const auto [T, B, N, offsets, token] = from.view;
    TORCH_CHECK_VALUE(from.packed == to_token.has_value(), op,
                      ": both or neither of the layouts must be given");
    TORCH_CHECK_VALUE(to.view.T == T && to.view.B == B && to.view.N == N, op,
                      ": both layouts must have T, B, N = ", T, ", ", B, ", ", N, ", got ",
                      to.view.T, ", ", to.view.B, ", ", to.view.N);
    check_dtype(op, "the plan's target", target, at::kLong);
    check_shape(op, "the plan's target", target, {B, N});
    std::string error = target_error(read<int64_t>(target), B, N);
    TORCH_CHECK_VALUE(error.empty(), op, ": the plan is not one: ", error);
    if (sizes_) {
      check_shape(op, "sizes", *sizes_, {B, N});
      sizes = sizes_->to(at::kFloat).contiguous();
    }
    rank.resize(B * N);
    token_ranks(from.view, rank.data());
    view = {from.view, to.view, rank.data(), read<int64_t>(target),
            sizes.defined() ? read<float>(sizes) : nullptr};
    std::vector<int64_t> scratch(N);
    error = merge_error(view, scratch.data());
    TORCH_CHECK_VALUE(error.empty(), op, ": the plan does not fit: ", error);
  }
};

using Rows = std::optional<int64_t>;

// The shape of `like` with the rows of a layout, which are what the caller says; dense shapes stay.
std::vector<int64_t> shape_with_rows(const char* op, const Tensor& like, bool packed, int64_t rows,
                                     Rows wanted) {
  TORCH_CHECK_VALUE(!packed || wanted.value_or(rows) == rows, op, ": rows must be ", rows,
                    " for this layout, got ", *wanted);
  auto shape = like.sizes().vec();
  if (packed) shape[0] = rows;
  return shape;
}

Tensor merge_tokens(const Tensor& x, const Tensor& target, const Tensor& sizes,
                    const OptionalTensor& token, const OptionalTensor& offsets,
                    const OptionalTensor& to_token, const OptionalTensor& to_offsets, int64_t bits,
                    Rows wanted) {
  const char* op = "merge_tokens";
  const HeldMerge merge(op, HeldLayout::of(op, x, token, offsets), target, sizes, to_token,
                        to_offsets);
  TORCH_CHECK_VALUE(bits >= 0 && bits <= 52, op, ": bits must lie in 0 .. 52, got ", bits);
  const int64_t rows = merge.to.view.rows();
  Tensor out = new_empty(x, shape_with_rows(op, x, token.has_value(), rows, wanted));
  const int64_t N = merge.from.view.N;
  std::vector<int64_t> first(rows + 1), source(merge.from.view.rows()), scratch(2 * N + 1);
  std::vector<double> weight(source.size());
  merge_entries(merge.view, first.data(), source.data(), weight.data(), scratch.data());
  combine(op, Channels(x, lead_dims(token)), first.data(), source.data(), weight.data(), bits, out,
          rows);
  return out;
}

Tensor merge_tokens_backward(const Tensor& grad, const Tensor& target, const Tensor& sizes,
                             const OptionalTensor& token, const OptionalTensor& offsets,
                             const OptionalTensor& to_token, const OptionalTensor& to_offsets,
                             Rows wanted) {
  const char* op = "merge_tokens_backward";
  TORCH_CHECK_VALUE(token.has_value() == to_token.has_value(), op,
                    ": both or neither of the layouts must be given");
  // The gradient has the rows after the merge; those before it are in the layout alone.
  if (token) HeldLayout::of(op, grad, to_token, to_offsets);
  HeldLayout from =
      token ? HeldLayout(op, token, offsets) : HeldLayout::of(op, grad, token, offsets);
  const HeldMerge merge(op, std::move(from), target, sizes, to_token, to_offsets);
  const int64_t rows = merge.from.view.rows();
  Tensor out = new_empty(grad, shape_with_rows(op, grad, token.has_value(), rows, wanted));
  const int64_t B = merge.from.view.B, N = merge.from.view.N;
  std::vector<int64_t> row(rows), rank(B * N);
  std::vector<double> share(rows), total(2 * N);
  token_ranks(merge.to.view, rank.data());
  merge_shares(merge.view, rank.data(), row.data(), share.data(), total.data());
  gather(op, Channels(grad, lead_dims(token)), row.data(), share.data(), out, rows);
  return out;
}

// The row of the merged layout that each row of the original one is held in.
std::vector<int64_t> held_rows(const HeldMerge& merge) {
  // `from` is the original layout and `to` the merged one.
  std::vector<int64_t> rank(merge.rank.size()), row(merge.from.view.rows());
  token_ranks(merge.to.view, rank.data());
  unmerge_rows(merge.to.view, rank.data(), merge.from.view, merge.view.target, row.data());
  return row;
}

Tensor unmerge_tokens(const Tensor& y, const Tensor& target, const OptionalTensor& token,
                      const OptionalTensor& offsets, const OptionalTensor& to_token,
                      const OptionalTensor& to_offsets, Rows wanted) {
  const char* op = "unmerge_tokens";
  TORCH_CHECK_VALUE(token.has_value() == to_token.has_value(), op,
                    ": both or neither of the layouts must be given");
  if (token) HeldLayout::of(op, y, token, offsets);
  HeldLayout original =
      token ? HeldLayout(op, to_token, to_offsets) : HeldLayout::of(op, y, token, offsets);
  const HeldMerge merge(op, std::move(original), target, std::nullopt, token, offsets);
  const auto row = held_rows(merge);
  Tensor out = new_empty(y, shape_with_rows(op, y, token.has_value(), row.size(), wanted));
  gather(op, Channels(y, lead_dims(token)), row.data(), nullptr, out, row.size());
  return out;
}

Tensor unmerge_tokens_backward(const Tensor& grad, const Tensor& target,
                               const OptionalTensor& token, const OptionalTensor& offsets,
                               const OptionalTensor& to_token, const OptionalTensor& to_offsets,
                               Rows wanted) {
  const char* op = "unmerge_tokens_backward";
  HeldLayout original = HeldLayout::of(op, grad, to_token, to_offsets);
  const HeldMerge merge(op, std::move(original), target, std::nullopt, token, offsets);
  const auto index = held_rows(merge);
  const int64_t rows = merge.to.view.rows();
  std::vector<int64_t> first(rows + 1), source(index.size());
  group_by_row(index.data(), index.size(), rows, first.data(), source.data());
  Tensor out = new_empty(grad, shape_with_rows(op, grad, token.has_value(), rows, wanted));
  combine(op, Channels(grad, lead_dims(token)), first.data(), source.data(), nullptr, 0, out, rows);
  return out;
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("take_rows", &atsnn::take_rows);
  m.impl("take_rows_backward", &atsnn::take_rows_backward);
  m.impl("firing_counts", &atsnn::firing_counts);
  m.impl("match_tokens", &atsnn::match_tokens);
  m.impl("merge_tokens", &atsnn::merge_tokens);
  m.impl("merge_tokens_backward", &atsnn::merge_tokens_backward);
  m.impl("unmerge_tokens", &atsnn::unmerge_tokens);
  m.impl("unmerge_tokens_backward", &atsnn::unmerge_tokens_backward);
}
