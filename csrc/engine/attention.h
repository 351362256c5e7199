// Attention over the threads: the items are images, and groups of heads that share no word.
#pragma once

#include <vector>

#include "kernels.h"
#include "linear.h"

namespace atsnn {

// Both return the number of spikes; one scratch for each thread.
int64_t run_attention(const Attend& a, const NeuronParams& neuron, const Kernels& k,
                      std::vector<Buffer<float>>& scratch);

// out = q & LIF(sum over tokens of size * (k & v)): spike-driven self-attention. `state` is [B, C].
int64_t run_spike_driven_attention(const Attend& a, const NeuronParams& neuron, const Kernels& k,
                                   std::vector<ChunkScratch>& scratch);

}  // namespace atsnn
