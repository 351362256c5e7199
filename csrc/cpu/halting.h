// Halting: the score of a token, and from scores to accumulators, weights and what runs next.
//
// The formulas' home is src/atsnn/reference.py: `halting_scores`, `accumulate_block`,
// `active_cells`, `halting_weights`.
#pragma once

#include <cmath>
#include <cstdint>

#include "layout.h"

namespace atsnn {

inline double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

// The one routine that rounds scores: a multiple of 2^-18, so that sums of them are exact.
inline float halting_score(double z) {
  return static_cast<float>(std::nearbyint(sigmoid(z) * 0x1p18) * 0x1p-18);
}

struct HaltForward {
  const float *h, *H;  // [R], the scores after a block and the accumulators before it
  Layout layout;
  bool over_time;         // scores accumulate over the timesteps too ("rectangle")
  float threshold;        // a cell is active while its accumulator is below it
  bool final;             // the last block: nothing goes on
  float* w;               // [R], readout weights
  uint8_t* last;          // [R], where w is the remainder
  float* H_after;         // [R]
  int64_t* active_steps;  // [B, N], in the next block; 0 for tokens without rows
  // [B, N] of earlier timesteps, read and written, or null where there are none: the sum of the
  // scores, and whether the token has stopped.
  float* earlier_score = nullptr;
  uint8_t* earlier_stop = nullptr;
};

struct HaltBackward {
  const float *grad_w, *grad_H;  // [R], or null: zero
  const uint8_t* last;           // [R]
  Layout layout;
  bool over_time;
  float *grad_h, *grad_H_before;  // [R]
};

// `scratch` holds 2 * N elements, N for the way back.
void halt_step(const HaltForward& a, float* scratch);
void halt_step_backward(const HaltBackward& a, float* scratch);

}  // namespace atsnn
