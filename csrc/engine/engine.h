// Inference of an AT-Spikformer in one call: stem, blocks, halting, merging, readout, head.
//
// Spikes are bits, the residual stream small integers, and rows exist for active cells only. The
// numbers are those of the model (docs/method.md); docs/engine.md says how they are come by.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#include "conv.h"
#include "kernels.h"
#include "linear.h"

namespace atsnn {

enum class Accumulator { none, rectangle, depth, sequential };

// A layer of the stem: the sides of the map it reads, of its neurons, and of what leaves it.
struct StemMap {
  int64_t side, neurons, after;
  bool halves;
};

struct NetworkConfig {
  int64_t image_size, in_channels, outputs, embed_dim, depth, num_heads, hidden, T;
  std::array<bool, 4> pooled;  // after which convolutions maps are halved
  bool pool_spikes;            // or sums, before the neurons
  bool spike_driven;           // SDSA instead of spiking self-attention
  double attn_scale;
  Accumulator halting;
  bool mean_field;  // or the last block's tokens alone
  Score score;
  double eps;
  bool pixels;  // the head gives the classes of each token's pixels, not of the image
  bool merging, merge_sizes;
  std::vector<int64_t> merge_r;           // of each boundary
  std::optional<double> merge_threshold;  // instead: of the squared cosine

  std::array<StemMap, 5> stem_maps() const;
  int64_t grid() const { return stem_maps().back().side; }  // tokens along a side
  // Whether the readout is that of each token rather than their sum.
  bool reads_tokens() const { return pixels || halting == Accumulator::sequential; }
  bool adaptive() const { return halting != Accumulator::none || merging; }
};

struct BlockLayers {
  SpikeLayer qkv, proj, fc1, fc2;  // qkv: each of the three begins at a panel
  NeuronParams attn;
};

struct Network {
  NetworkConfig config;
  std::array<SpikeLayer, 5> conv;
  std::vector<BlockLayers> block;
  Buffer<float> weights;                       // of all maps
  std::vector<double> head_weight, head_bias;  // [C, outputs], [outputs]
  std::vector<double> score_weight;            // one, or [C] for the linear score
  double score_bias = 0;
};

// What the neurons of a network remember between calls, and what halting and readout have summed.
struct StreamState {
  struct Block {
    Buffer<float> qkv, attn, proj, fc1, fc2;
    Buffer<float> score;   // [B, N]
    Buffer<uint8_t> stop;  // [B, N]
  };
  int64_t batch = 0, steps = 0;
  bool broken = false;  // a call that did not end has left it half-way
  std::array<Buffer<float>, 5> conv;
  std::vector<Block> block;
  Buffer<double> features;  // [B, C], or [B, N, C] where tokens are read
  Buffer<float> total;      // [B, N], sequential: the scores of the cells so far
  Buffer<int64_t> ran;      // [B, N], sequential: timesteps with an executed cell

  // Memory for a batch; nothing has been summed, membranes hold anything. Those of the stem are
  // left out where it runs all timesteps at once.
  void reserve(const Network& net, int64_t batch, bool stem);
  // The same with neurons at rest.
  void start(const Network& net, int64_t batch);

 private:
  template <class F>
  void each_membrane(const Network& net, bool stem, F f);
};

// Arrays of a whole batch that a pass fills; null: not wanted.
struct Outputs {
  float* logits;            // [B, outputs], of pixels [B, N, outputs]
  uint8_t* active;          // [L, T, B, N]
  float *scores, *weights;  // [L, T, B, N]
  float* block_sizes;       // [L, B, N]
  float* sizes;             // [B, N]
  int64_t *depth, *source;  // [T, B, N], [B, N]
  bool trace() const { return active != nullptr; }
};

// Where spikes are counted: the layers of the stem, then those of each block.
namespace layer {
enum Stem {
  conv0_in,
  conv0,
  conv1_in,
  conv1,
  conv2_in,
  conv2,
  conv3_in,
  conv3,
  conv4_in,
  conv4,
  stem_layers
};
enum Block { attn_in, q, k, v, attn, proj, mlp_in, fc1, fc2, block_layers };
}  // namespace layer

// What a block's time goes to; from the scores on it is the price of halting and merging.
enum class Piece {
  attention,
  mlp,
  scores,
  accumulators,
  readout,
  moves,
  matching,
  merging,
  pieces
};
using PieceSeconds = std::array<double, static_cast<size_t>(Piece::pieces)>;

// What a call counted.
struct Report {
  std::vector<double> stem_spikes, block_spikes;  // [stem_layers], [L, block_layers]
  // [stem_layers]: pixels, of every timestep and image, whose sums (`in`) or neurons were computed.
  std::vector<int64_t> stem_pixels;
  std::vector<int64_t> rows;  // [L], cells executed
  double ponder = 0;          // the sum of D + w[D], by size
  double stem_seconds = 0, head_seconds = 0;
  std::vector<PieceSeconds> block_seconds;  // [L]
};

// Spikes of one layer, for those who want to look at them: rows of `layout`, `stride` words apart.
struct Recorded {
  int64_t block;  // -1: the stem
  int layer;      // of layer::Stem or layer::Block
  const uint64_t* bits;
  int64_t stride, channels;
  Layout layout;                    // of the stem's pixels or the block's tokens
  int64_t first_image, first_step;  // of the layout within the whole call
};

struct Images {
  const float* data;  // [B, C, H, W], or [T, B, C, H, W]
  bool still;
  int64_t T, B;  // T: timesteps they are shown for
};

struct Stopped : std::runtime_error {
  Stopped() : std::runtime_error("stopped") {}
};

struct Workspace;

// Threads may run one engine at the same time; each call takes memory of its own from a pool.
class Engine {
 public:
  explicit Engine(Network net);
  ~Engine();
  const Network& network() const { return net_; }

  struct Options {
    const Kernels* kernels;
    int threads;
    bool masked;                    // compute every cell and zero the halted ones; the same numbers
    const float* scores = nullptr;  // [L, T, B, N] instead of the model's own; those are computed
    StreamState* state = nullptr;   // null: every neuron starts at rest, nothing is kept
    std::function<void(const Recorded&)> record = nullptr;  // called on the calling thread
    std::function<bool()> stop =
        nullptr;  // asked now and then, on the calling thread; true throws Stopped
  };
  void run(const Images& images, const Outputs& out, const Options& options, Report& report);

 private:
  Network net_;
  std::mutex lock_;
  std::vector<std::unique_ptr<Workspace>> pool_;
};

}  // namespace atsnn
