// What the operators on packed weights share.
#pragma once

#include "../engine/linear.h"
#include "common.h"
#include "kernels.h"

namespace atsnn {

// Scratch of the calling thread, one for each worker.
std::vector<ChunkScratch>& scratch();

// Bits [..., words] of x [..., C]; `binary` says whether x holds nothing but 0 and 1.
Tensor packed(const Tensor& x, bool* binary);

// Contiguous x as bytes if it holds small counts, as a residual stream of spikes does; else
// undefined.
Tensor counted_rows(const Tensor& x);

void check_packed(const char* op, const Tensor& weight, const Tensor& bias, int64_t outputs);
// That rows of bits have none past their last channel.
void check_bits(const char* op, const Tensor& bits, int64_t channels);

// The map of packed, contiguous tensors, which it points into; the thread's only one.
PackedLinear& map_of(const Tensor& weight, const Tensor& bias, int64_t outputs);

}  // namespace atsnn
