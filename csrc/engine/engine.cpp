#include "engine.h"

#include "pass.h"

namespace atsnn {

std::array<StemMap, 5> NetworkConfig::stem_maps() const {
  std::array<StemMap, 5> maps;
  int64_t side = image_size;
  for (size_t i = 0; i < maps.size(); ++i) {
    const bool halves = i < pooled.size() && pooled[i];
    const int64_t after = halves ? halved(side) : side;
    // Neurons lie before a pooling of spikes and after a pooling of sums.
    maps[i] = {side, pool_spikes ? side : after, after, halves};
    side = after;
  }
  return maps;
}

template <class F>
void StreamState::each_membrane(const Network& net, bool stem, F f) {
  const NetworkConfig& c = net.config;
  const int64_t N = c.grid() * c.grid(), C = c.embed_dim, tokens = batch * N;
  const std::array<StemMap, 5> maps = c.stem_maps();
  for (size_t i = 0; stem && i < conv.size(); ++i) {
    const int64_t pixels = maps[i].neurons * maps[i].neurons;
    f(conv[i], batch * pixels * net.conv[i].map.outputs, net.conv[i].neuron);
  }
  for (int64_t l = 0; l < c.depth; ++l) {
    Block& b = block[l];
    const BlockLayers& layers = net.block[l];
    f(b.qkv, tokens * layers.qkv.map.outputs, layers.qkv.neuron);
    f(b.attn, (c.spike_driven ? batch : tokens) * C, layers.attn);
    f(b.proj, tokens * C, layers.proj.neuron);
    f(b.fc1, tokens * c.hidden, layers.fc1.neuron);
    f(b.fc2, tokens * C, layers.fc2.neuron);
  }
}

void StreamState::reserve(const Network& net, int64_t images, bool stem) {
  const NetworkConfig& c = net.config;
  const int64_t tokens = images * c.grid() * c.grid();
  batch = images;
  steps = 0;
  broken = false;
  block.resize(c.depth);
  each_membrane(net, stem, [](Buffer<float>& v, int64_t n, const NeuronParams&) { v.reserve(n); });
  for (Block& b : block) {
    b.score.reserve_zeros(tokens);
    b.stop.reserve_zeros(tokens);
  }
  features.reserve_zeros((c.reads_tokens() ? tokens : images) * c.embed_dim);
  total.reserve_zeros(tokens);
  ran.reserve_zeros(tokens);
}

void StreamState::start(const Network& net, int64_t images) {
  reserve(net, images, true);
  each_membrane(net, true, [](Buffer<float>& v, int64_t n, const NeuronParams& p) {
    std::fill_n(v.data(), n, static_cast<float>(p.v_reset));
  });
}

namespace {

// Images that run together: enough rows that reading the weights is shared by many, and no more
// memory than that.
int64_t group_size(const NetworkConfig& c, int64_t T, int threads) {
  const int64_t rows = std::max<int64_t>(T * c.grid() * c.grid(), 1);
  return std::max<int64_t>(threads, 4096 / rows);
}

}  // namespace

Engine::Engine(Network net) : net_(std::move(net)) {
  std::vector<PackedLinear*> maps;
  for (SpikeLayer& layer : net_.conv) maps.push_back(&layer.map);
  for (BlockLayers& b : net_.block) {
    for (SpikeLayer* layer : {&b.qkv, &b.proj, &b.fc1, &b.fc2}) maps.push_back(&layer->map);
  }
  net_.weights = gather_weights(maps);
}
Engine::~Engine() = default;

void Engine::run(const Images& images, const Outputs& out, const Options& options, Report& report) {
  const NetworkConfig& c = net_.config;
  report.stem_spikes.assign(layer::stem_layers, 0);
  report.stem_pixels.assign(layer::stem_layers, 0);
  report.block_spikes.assign(c.depth * layer::block_layers, 0);
  report.rows.assign(c.depth, 0);
  report.ponder = 0;
  report.stem_seconds = report.head_seconds = 0;
  report.block_seconds.assign(c.depth, PieceSeconds{});
  std::unique_ptr<Workspace> ws;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    if (!pool_.empty()) {
      ws = std::move(pool_.back());
      pool_.pop_back();
    }
  }
  if (!ws) ws = std::make_unique<Workspace>();
  ws->thread.resize(options.threads);
  ws->attend.resize(options.threads);
  const int64_t group = group_size(c, images.T, options.threads);
  // A workspace that an exception leaves behind is not put back.
  if (options.state) options.state->broken = true;  // until the end
  for (int64_t b = 0; b < images.B; b += group) {
    Pass(net_, *ws, options, images, out, b, std::min(group, images.B - b), report).run();
  }
  if (options.state) {
    options.state->steps += images.T;
    options.state->broken = false;
  }
  const std::lock_guard<std::mutex> guard(lock_);
  pool_.push_back(std::move(ws));
}

}  // namespace atsnn
