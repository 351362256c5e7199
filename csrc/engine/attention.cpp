#include "attention.h"

#include <numeric>

#include "parallel.h"

namespace atsnn {

int64_t run_attention(const Attend& a, const NeuronParams& neuron, const Kernels& k,
                      std::vector<Buffer<float>>& scratch) {
  const int threads = static_cast<int>(scratch.size());
  const int64_t d = a.C / a.heads, together = std::min(heads_together(d), a.heads);
  const int64_t groups = (a.heads + together - 1) / together;
  // Counts of each thread are a line apart in its scratch, behind what the kernel uses.
  const int64_t room = (attend_scratch(a.layout.N, d) + 15) / 16 * 16;
  for (auto& s : scratch) {
    s.reserve(room + 16);
    std::memset(s.data() + room, 0, sizeof(int64_t));
  }
  parallel(threads, a.layout.B * groups, [&](int64_t item, int thread) {
    float* s = scratch[thread].data();
    const int64_t first = item % groups * together;
    int64_t spikes;
    std::memcpy(&spikes, s + room, sizeof spikes);
    spikes += k.attend(a, neuron, item / groups, first, std::min(together, a.heads - first), s);
    std::memcpy(s + room, &spikes, sizeof spikes);
  });
  int64_t total = 0;
  for (auto& s : scratch) {
    int64_t spikes;
    std::memcpy(&spikes, s.data() + room, sizeof spikes);
    total += spikes;
  }
  return total;
}

int64_t run_spike_driven_attention(const Attend& a, const NeuronParams& neuron, const Kernels& k,
                                   std::vector<ChunkScratch>& scratch) {
  const int threads = static_cast<int>(scratch.size());
  const int64_t T = a.layout.T, W = words(a.C), C = a.C;
  for (ChunkScratch& s : scratch) {
    s.acc.reserve(T * panel);
    s.first.reserve(2);
    s.row.reserve(T);
    s.state.reserve(1);
    s.gate.reserve(T);
    s.counted = {};
  }
  parallel(threads, a.layout.B * W, [&](int64_t item, int thread) {
    ChunkScratch& s = scratch[thread];
    const int64_t image = item / W, p = item % W;
    float* sums = s.acc.data();
    std::fill_n(sums, T * panel, 0.0f);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t r = 0; r < a.layout.count(t, image); ++r) {
        const int64_t at = (a.layout.start(t, image) + r) * a.in_stride + p;
        const float size =
            a.sizes ? a.sizes[image * a.layout.N + a.layout.token_at(image, r)] : 1.0f;
        each_bit(a.k[at] & a.v[at], [&](int64_t bit) { sums[t * panel + bit] += size; });
      }
    }
    s.first.data()[0] = 0;
    s.first.data()[1] = static_cast<int32_t>(T);
    std::iota(s.row.data(), s.row.data() + T, 0);
    if (a.state) s.state.data()[0] = a.state + image * C;
    uint64_t* gate = s.gate.data();
    k.fire({sums, false, s.first.data(), s.row.data(), 1, gate, 1, valid_bits(C, p),
            a.state ? s.state.data() : nullptr, p * panel, a.at_rest},
           neuron);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t r = 0; r < a.layout.count(t, image); ++r) {
        const int64_t row = a.layout.start(t, image) + r;
        const uint64_t out = a.q[row * a.in_stride + p] & gate[t];
        a.out[row * a.out_stride + p] = out;
        s.counted.spikes[0] += count_bits(out);
      }
    }
  });
  int64_t total = 0;
  for (const ChunkScratch& s : scratch) total += s.counted.spikes[0];
  return total;
}

}  // namespace atsnn
