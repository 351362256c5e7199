// The engine as a Python class. Arrays come as NumPy views of tensors, so nothing here knows torch
// but the instruction set it chose.
#include "../engine/engine.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>

#include "common.h"
#include "engine.h"
#include "neuron.h"

namespace py = pybind11;

namespace atsnn {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The table of a level by name; of the level in use if there is none.
const Kernels* kernels_of(const std::optional<std::string>& name) {
  static const std::pair<Level, const Kernels*> tables[] = {
      {Level::portable, &portable_kernels},
#if defined(__x86_64__)
      {Level::avx2, &avx2_kernels},
      {Level::avx512, &avx512_kernels},
#endif
  };
  for (const auto& [at, table] : tables) {
    if (at <= level() && (name ? *name == table->name : at == level())) return table;
  }
  throw py::value_error("level must be one of those that atsnn.engine.levels() lists, got '" +
                        name.value_or("") + "'");
}

std::vector<std::string> levels() {
  std::vector<std::string> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (found.size() <= static_cast<size_t>(level())) found.push_back(name);
  }
  return found;
}

NeuronParams neuron_of(const py::dict& d) {
  const auto kind = d["kind"].cast<std::string>();
  const Charge charge = charge_of(kind, d["decay_input"].cast<bool>());
  return neuron_settings(
      charge, d["tau"].cast<double>(), d["inv_tau"].cast<std::optional<double>>(),
      d["v_threshold"].cast<double>(), d["v_reset"].cast<std::optional<double>>());
}

PackedLinear map_of(const py::dict& d) {
  const auto weight = d["weight"].cast<Array<float>>();
  const auto bias = d["bias"].cast<Array<float>>();
  return {weight.data(), bias.data(), weight.shape(0), weight.shape(1)};
}

SpikeLayer layer_of(const py::handle& d) {
  const auto layer = d.cast<py::dict>();
  return {map_of(layer), neuron_of(layer["neuron"].cast<py::dict>())};
}

std::vector<double> doubles(const py::handle& array) {
  const auto a = array.cast<Array<double>>();
  return {a.data(), a.data() + a.size()};
}

NetworkConfig config_of(const py::dict& d) {
  NetworkConfig c{};
  const auto integer = [&](const char* name) { return d[name].cast<int64_t>(); };
  const auto flag = [&](const char* name) { return d[name].cast<bool>(); };
  c.image_size = integer("image_size");
  c.in_channels = integer("in_channels");
  c.outputs = integer("outputs");
  c.pixels = flag("pixels");
  c.embed_dim = integer("embed_dim");
  c.depth = integer("depth");
  c.num_heads = integer("num_heads");
  c.hidden = integer("hidden");
  c.pooled = d["pooled"].cast<std::array<bool, 4>>();
  c.pool_spikes = flag("pool_spikes");
  c.spike_driven = flag("spike_driven");
  c.attn_scale = d["attn_scale"].cast<double>();
  const auto halting = d["halting"].cast<std::string>();
  c.halting = halting == "rectangle"    ? Accumulator::rectangle
              : halting == "depth"      ? Accumulator::depth
              : halting == "sequential" ? Accumulator::sequential
                                        : Accumulator::none;
  c.mean_field = flag("mean_field");
  const auto score = d["score"].cast<std::string>();
  c.score = score == "first"    ? Score::first
            : score == "mean"   ? Score::mean
            : score == "linear" ? Score::linear
                                : Score::constant;
  c.eps = d["eps"].cast<double>();
  c.merging = flag("merging");
  c.merge_sizes = flag("merge_sizes");
  c.merge_r = d["merge_r"].cast<std::vector<int64_t>>();
  c.merge_threshold = d["merge_threshold"].cast<std::optional<double>>();
  return c;
}

std::unique_ptr<Engine> make_engine(const py::dict& config, const py::list& conv,
                                    const py::list& blocks, const py::dict& head,
                                    const py::dict& score) {
  Network net;
  net.config = config_of(config);
  for (size_t i = 0; i < net.conv.size(); ++i) net.conv[i] = layer_of(conv[i]);
  for (const py::handle& b : blocks) {
    const auto d = b.cast<py::dict>();
    BlockLayers block;
    const PackedLinear q = map_of(d["q"]), k = map_of(d["k"]), v = map_of(d["v"]);
    block.qkv = {beside({&q, &k, &v}), neuron_of(d["q"]["neuron"])};
    block.attn = neuron_of(d["attn"]);
    block.proj = layer_of(d["proj"]);
    block.fc1 = layer_of(d["fc1"]);
    block.fc2 = layer_of(d["fc2"]);
    net.block.push_back(std::move(block));
  }
  net.head_weight = doubles(head["weight"]);
  net.head_bias = doubles(head["bias"]);
  net.score_weight = doubles(score["weight"]);
  net.score_bias = score["bias"].cast<double>();
  return std::make_unique<Engine>(std::move(net));
}

// Asks Python now and then whether a signal has come.
class Signals {
 public:
  bool operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(50)) return false;
    asked_ = now;
    const py::gil_scoped_acquire gil;
    raised_ = PyErr_CheckSignals() != 0;
    if (raised_) error_.emplace();  // takes the error over, which dropping the lock would lose
    return raised_;
  }
  std::optional<py::error_already_set> error_;

 private:
  bool raised_ = false;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

template <class T>
T* pointer(const py::dict& arrays, const char* name) {
  return arrays.contains(name) ? arrays[name].cast<Array<T>>().mutable_data() : nullptr;
}

// What was recorded, copied: bits [rows, words] and the cell (t, b, n) of each row.
py::tuple copied(const Recorded& r) {
  const int64_t rows = r.layout.rows(), n = words(r.channels);
  Array<uint64_t> bits({rows, n});
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(r.bits + i * r.stride, n, bits.mutable_data() + i * n);
  }
  Array<int64_t> cells({rows});
  row_cells(r.layout, cells.mutable_data());
  return py::make_tuple(r.block, r.layer, bits, cells, r.channels,
                        py::make_tuple(r.layout.T, r.layout.B, r.layout.N), r.first_step,
                        r.first_image);
}

py::dict run(Engine& engine, const Array<float>& images, bool still, int64_t T,
             const py::dict& arrays, bool masked, int threads, StreamState* state,
             const std::optional<std::string>& level_name, const py::object& record) {
  const int64_t B = images.shape(still ? 0 : 1);
  const Outputs out{pointer<float>(arrays, "logits"),      pointer<uint8_t>(arrays, "active"),
                    pointer<float>(arrays, "scores"),      pointer<float>(arrays, "weights"),
                    pointer<float>(arrays, "block_sizes"), pointer<float>(arrays, "sizes"),
                    pointer<int64_t>(arrays, "depth"),     pointer<int64_t>(arrays, "source")};
  if (state && state->steps && state->batch != B) {
    throw py::value_error("the state must be of " + std::to_string(B) + " images, got one of " +
                          std::to_string(state->batch));
  }
  Signals signals;
  Engine::Options options{kernels_of(level_name), threads, masked};
  options.state = state;
  options.scores = pointer<float>(arrays, "given_scores");
  options.stop = [&] { return signals(); };
  if (!record.is_none()) {
    options.record = [&](const Recorded& r) {
      const py::gil_scoped_acquire gil;
      record(copied(r));
    };
  }
  Report report;
  try {
    const py::gil_scoped_release release;
    if (state && state->steps == 0) state->start(engine.network(), B);
    engine.run({images.data(), still, T, B}, out, options, report);
  } catch (const Stopped&) {
    throw std::move(*signals.error_);
  }
  py::dict found;
  found["stem_spikes"] = report.stem_spikes;
  found["stem_pixels"] = report.stem_pixels;
  found["block_spikes"] = report.block_spikes;
  found["rows"] = report.rows;
  found["ponder"] = report.ponder;
  found["stem_seconds"] = report.stem_seconds;
  found["head_seconds"] = report.head_seconds;
  found["block_seconds"] = report.block_seconds;
  return found;
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("levels", &levels, "Instruction sets this machine has: 'portable', 'avx2', 'avx512'.");
  py::class_<StreamState>(m, "StreamState")
      .def(py::init<>())
      .def_readonly("batch", &StreamState::batch)
      .def_readonly("steps", &StreamState::steps)
      .def_readonly("broken", &StreamState::broken);
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make_engine), py::arg("config"), py::arg("conv"), py::arg("blocks"),
           py::arg("head"), py::arg("score"))
      .def("run", &run, py::arg("images"), py::arg("still"), py::arg("T"), py::arg("arrays"),
           py::arg("masked"), py::arg("threads"), py::arg("state").none(true),
           py::arg("level").none(true), py::arg("record").none(true));
}

}  // namespace atsnn
