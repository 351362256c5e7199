// token_layout, layout_cells, check_layout, moved_rows: integer work on layouts.
#include "../cpu/layout.h"

#include <algorithm>

#include "common.h"

namespace atsnn {
namespace {

constexpr int64_t most_timesteps = 1 << 20;

std::tuple<Tensor, Tensor> token_layout(const Tensor& active_steps, int64_t T) {
  const char* op = "token_layout";
  check_dtype(op, "active_steps", active_steps, at::kLong);
  TORCH_CHECK_VALUE(active_steps.dim() == 2, op, ": active_steps must have shape [B, N], got ",
                    active_steps.sizes());
  // So that T * B + 1 cannot overflow: a tensor has fewer than 2^40 rows.
  TORCH_CHECK_VALUE(T >= 0 && T <= most_timesteps, op, ": T must lie in 0 .. ", most_timesteps,
                    ", got ", T);
  const int64_t B = active_steps.size(0), N = active_steps.size(1);
  const Tensor steps = active_steps.contiguous();
  const int64_t* n = read<int64_t>(steps);
  for (int64_t i = 0; i < B * N; ++i) {
    TORCH_CHECK_VALUE(n[i] >= 0 && n[i] <= T, op, ": active_steps must lie in 0 .. T = ", T,
                      ", got ", n[i]);
  }
  Tensor token = at::empty({B, N}, active_steps.options());
  Tensor offsets = at::empty({T * B + 1}, active_steps.options());
  const Scratch scratch((T + 2) * sizeof(int64_t));
  rank_tokens(n, T, B, N, write<int64_t>(token), write<int64_t>(offsets), scratch.as<int64_t>());
  return {token, offsets};
}

// One number a row of the layout, and -1 for the rows past its end where more are wanted.
Tensor empty_rows(const char* op, const Layout& layout, std::optional<int64_t> rows,
                  const Tensor& like) {
  const int64_t used = layout.rows(), wanted = rows.value_or(used);
  TORCH_CHECK_VALUE(wanted >= used && wanted <= layout.T * layout.B * layout.N, op,
                    ": rows must lie in ", used, " .. ", layout.T * layout.B * layout.N,
                    " for this layout, got ", wanted);
  Tensor out = at::empty({wanted}, like.options());
  std::fill(write<int64_t>(out) + used, write<int64_t>(out) + wanted, -1);
  return out;
}

Tensor layout_cells(const Tensor& token, const Tensor& offsets, std::optional<int64_t> rows) {
  const char* op = "layout_cells";
  const HeldLayout layout(op, token, offsets);
  Tensor cell = empty_rows(op, layout.view, rows, token);
  row_cells(layout.view, write<int64_t>(cell));
  return cell;
}

Tensor moved_rows(const Tensor& token, const Tensor& offsets, const Tensor& to_token,
                  const Tensor& to_offsets, std::optional<int64_t> rows) {
  const char* op = "moved_rows";
  const HeldLayout from(op, token, offsets);
  const HeldLayout to(op, to_token, to_offsets);
  TORCH_CHECK_VALUE(
      from.view.T == to.view.T && from.view.B == to.view.B && from.view.N == to.view.N, op,
      ": both layouts must have the same T, B, N, got ", from.view.T, ", ", from.view.B, ", ",
      from.view.N, " and ", to.view.T, ", ", to.view.B, ", ", to.view.N);
  Tensor row = empty_rows(op, to.view, rows, token);
  const Scratch rank(from.view.B * from.view.N * sizeof(int64_t));
  token_ranks(from.view, rank.as<int64_t>());
  TORCH_CHECK_VALUE(find_rows(from.view, rank.as<int64_t>(), to.view, write<int64_t>(row)), op,
                    ": every cell of the new layout must be active in the old one");
  return row;
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("token_layout", &atsnn::token_layout);
  m.impl("layout_cells", &atsnn::layout_cells);
  m.impl("moved_rows", &atsnn::moved_rows);
}
