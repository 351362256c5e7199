#include "halting.h"

#include <algorithm>

namespace atsnn {

void halt_step(const HaltForward& a, float* scratch) {
  const Layout& layout = a.layout;
  std::fill(a.active_steps, a.active_steps + layout.B * layout.N, 0);
  float* const so_far = scratch;              // the scores of each rank up to this timestep
  float* const goes_on = scratch + layout.N;  // 0 from the first timestep that stops
  for (int64_t b = 0; b < layout.B; ++b) {
    std::fill(so_far, so_far + layout.N, 0.0f);
    std::fill(goes_on, goes_on + layout.N, a.final ? 0.0f : 1.0f);
    const int64_t present = layout.T ? layout.count(0, b) : 0;
    for (int64_t r = 0; a.earlier_score && r < present; ++r) {
      const int64_t token = b * layout.N + layout.token_at(b, r);
      so_far[r] = a.earlier_score[token];
      if (a.earlier_stop[token]) goes_on[r] = 0.0f;
    }
    for (int64_t t = 0; t < layout.T; ++t) {
      const int64_t first = layout.start(t, b), count = layout.count(t, b);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        so_far[r] = a.over_time ? so_far[r] + a.h[row] : a.h[row];
        const float after = a.H[row] + so_far[r];
        if (!(a.threshold > after)) goes_on[r] = 0.0f;
        const bool last = goes_on[r] == 0.0f;
        a.w[row] = last ? 1.0f - a.H[row] : so_far[r];
        a.last[row] = last;
        a.H_after[row] = after;
        a.active_steps[b * layout.N + layout.token_at(b, r)] += !last;
      }
    }
    for (int64_t r = 0; a.earlier_score && r < present; ++r) {
      const int64_t token = b * layout.N + layout.token_at(b, r);
      a.earlier_score[token] = so_far[r];
      a.earlier_stop[token] = goes_on[r] == 0.0f;
    }
  }
}

void halt_step_backward(const HaltBackward& a, float* scratch) {
  const Layout& layout = a.layout;
  for (int64_t b = 0; b < layout.B; ++b) {
    std::fill(scratch, scratch + layout.N, 0.0f);
    for (int64_t t = layout.T - 1; t >= 0; --t) {
      const int64_t first = layout.start(t, b), count = layout.count(t, b);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        const float grad_w = a.grad_w ? a.grad_w[row] : 0.0f;
        const float grad_H = a.grad_H ? a.grad_H[row] : 0.0f;
        const float grad_g = a.last[row] ? grad_H : grad_H + grad_w;
        scratch[r] = a.over_time ? scratch[r] + grad_g : grad_g;
        a.grad_h[row] = scratch[r];
        a.grad_H_before[row] = a.last[row] ? grad_H - grad_w : grad_H;
      }
    }
  }
}

}  // namespace atsnn
