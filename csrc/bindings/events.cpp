// Convolutions and linear maps of bits for layers that were not made for it (atsnn.dropin).
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>

#include "../engine/attention.h"
#include "../engine/conv.h"
#include "../engine/parallel.h"
#include "linear.h"
#include "neuron.h"

namespace atsnn {
namespace {

const uint64_t* bits_of(const Tensor& t) {
  return reinterpret_cast<const uint64_t*>(read<int64_t>(t));
}

uint64_t* bits_to(const Tensor& t) { return reinterpret_cast<uint64_t*>(write<int64_t>(t)); }

// window: kernel, stride and padding, each (y, x).
Window window_of(const char* op, at::IntArrayRef window) {
  TORCH_CHECK_VALUE(window.size() == 6, op, ": window must be (kernel_y, kernel_x, stride_y, ",
                    "stride_x, pad_y, pad_x), got ", window);
  const Window w{window[0], window[1], window[2], window[3], window[4], window[5]};
  constexpr int64_t most = 1 << 20;
  TORCH_CHECK_VALUE(w.kernel_y >= 1 && w.kernel_x >= 1 && w.kernel_y <= most && w.kernel_x <= most,
                    op, ": kernel must be at least 1, got ", window);
  TORCH_CHECK_VALUE(w.stride_y >= 1 && w.stride_x >= 1, op, ": stride must be at least 1, got ",
                    window);
  TORCH_CHECK_VALUE(w.pad_y >= 0 && w.pad_x >= 0 && w.pad_y <= most && w.pad_x <= most, op,
                    ": padding must not be negative, got ", window);
  return w;
}

// Maps of bits [..., height, width, words] or of counts [..., height, width, channels], or of
// floats [..., channels, height, width].
struct Maps {
  int64_t height, width;

  Maps(const char* op, const Tensor& maps, int64_t dims, int64_t channels, const Window& w) {
    const bool floats = maps.scalar_type() == at::kFloat, bytes = maps.scalar_type() == at::kByte;
    if (!floats && !bytes) check_dtype(op, "maps", maps, at::kLong);
    const int64_t last = floats || bytes ? channels : words(channels);
    TORCH_CHECK_VALUE(maps.dim() == dims && maps.size(floats ? -3 : -1) == last, op,
                      ": maps must have ", dims, " dimensions and ", last,
                      floats || bytes ? " channels" : " words", ", got ", maps.sizes());
    height = maps.size(floats ? -2 : -3);
    width = maps.size(floats ? -1 : -2);
    TORCH_CHECK_VALUE(height + 2 * w.pad_y >= w.kernel_y && width + 2 * w.pad_x >= w.kernel_x, op,
                      ": the kernel must fit the padded input, got ", w.kernel_y, " x ", w.kernel_x,
                      " for ", height, " x ", width);
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t pixels = std::max<int64_t>(height * width, 1);
    const int64_t images = maps.numel() / (pixels * last);
    TORCH_CHECK_VALUE(images * pixels <= most && images * w.height(height) * w.width(width) <= most,
                      op, ": maps must have fewer than 2^31 pixels, got ", maps.sizes());
  }
};

// The inputs of a packed convolution, by channel.
int64_t channels_of(const char* op, const Tensor& weight, const Window& w) {
  TORCH_CHECK_VALUE(w.taps() <= most_taps, op, ": the kernel must have at most ", most_taps,
                    " pixels, got ", w.kernel_y, " x ", w.kernel_x);
  TORCH_CHECK_VALUE(weight.size(1) % w.taps() == 0, op, ": the weight must have a multiple of ",
                    w.taps(), " inputs, got ", weight.size(1));
  return weight.size(1) / w.taps();
}

// Calls f(image, begin, end, task) for pieces of the pixels of every image.
constexpr int64_t pixels_a_task = 512;

template <class F>
void each_piece(int64_t images, int64_t pixels, F f) {
  const int64_t pieces = (pixels + pixels_a_task - 1) / pixels_a_task;
  parallel(at::get_num_threads(), images * pieces, [&](int64_t task, int) {
    const int64_t begin = task % pieces * pixels_a_task;
    f(task / pieces, begin, std::min(begin + pixels_a_task, pixels), task);
  });
}

// x [M, C, ...] as maps of so many pixels each.
int64_t pixels_of(at::IntArrayRef shape) {
  return c10::multiply_integers(shape.begin() + 2, shape.end());
}

std::tuple<Tensor, int64_t, bool> counted(const Tensor& bits, bool binary) {
  return {bits, level_kernels().count(bits_of(bits), bits.numel()), binary};
}

std::tuple<Tensor, int64_t, bool> pack_counted(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "pack_counted: x must have shape [..., C], got ", x.sizes());
  check_dtype("pack_counted", "x", x, at::kFloat);
  bool binary = false;
  const Tensor bits = packed(x.contiguous(), &binary);
  return counted(bits, binary);
}

std::tuple<Tensor, int64_t, bool> pack_maps(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "pack_maps: x must have shape [M, C, ...], got ", x.sizes());
  check_dtype("pack_maps", "x", x, at::kFloat);
  const int64_t M = x.size(0), C = x.size(1), P = pixels_of(x.sizes()), W = words(C);
  const Tensor from = x.contiguous();
  auto shape = x.sizes().vec();
  shape.erase(shape.begin() + 1);
  shape.push_back(W);
  const Tensor bits = at::empty(shape, x.options().dtype(at::kLong));
  const Kernels& k = level_kernels();
  // Of each piece: no two threads share one.
  std::vector<char> whole(std::max<int64_t>(M * ((P + pixels_a_task - 1) / pixels_a_task), 1), 1);
  each_piece(M, P, [&](int64_t m, int64_t begin, int64_t end, int64_t task) {
    whole[task] =
        k.pack_pixels(read<float>(from) + m * C * P, C, P, begin, end, bits_to(bits) + m * P * W);
  });
  return counted(bits, std::all_of(whole.begin(), whole.end(), [](char all) { return all; }));
}

// x [M, C, ...] as counts [M, ..., C]; an empty tensor if it holds anything else.
Tensor count_maps(const Tensor& x) {
  const char* op = "count_maps";
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape [M, C, ...], got ", x.sizes());
  check_dtype(op, "x", x, at::kFloat);
  const Tensor counts = counted_rows(x.contiguous());
  if (!counts.defined()) return at::empty({0}, x.options().dtype(at::kByte));
  const int64_t M = x.size(0), C = x.size(1), P = pixels_of(x.sizes());
  auto shape = x.sizes().vec();
  shape.erase(shape.begin() + 1);
  shape.push_back(C);
  const Tensor out = at::empty(shape, counts.options());
  each_piece(M, P, [&](int64_t m, int64_t begin, int64_t end, int64_t) {
    const uint8_t* from = read<uint8_t>(counts) + m * C * P;
    uint8_t* to = write<uint8_t>(out) + m * C * P;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t p = begin; p < end; ++p) to[p * C + c] = from[c * P + p];
    }
  });
  return out;
}

Tensor unpack_maps(const Tensor& bits, int64_t channels) {
  const char* op = "unpack_maps";
  check_dtype(op, "bits", bits, at::kLong);
  TORCH_CHECK_VALUE(channels >= 1 && bits.dim() >= 2 && bits.size(-1) == words(channels), op,
                    ": bits must have shape [M, ..., ", words(channels), "] for ", channels,
                    " channels, got ", bits.sizes());
  auto shape = bits.sizes().vec();
  shape.pop_back();
  shape.insert(shape.begin() + 1, channels);
  const Tensor from = bits.contiguous(), x = at::empty(shape, bits.options().dtype(at::kFloat));
  const int64_t P = pixels_of(shape);
  const Kernels& k = level_kernels();
  each_piece(shape[0], P, [&](int64_t m, int64_t begin, int64_t end, int64_t) {
    k.unpack_pixels(bits_of(from) + m * P * words(channels), channels, P, begin, end,
                    write<float>(x) + m * channels * P);
  });
  return x;
}

int64_t count_spikes(const Tensor& bits) {
  check_dtype("count_spikes", "bits", bits, at::kLong);
  const Tensor rows = bits.contiguous();
  return level_kernels().count(bits_of(rows), rows.numel());
}

Tensor spike_linear(const Tensor& spikes, const Tensor& weight, const Tensor& bias,
                    int64_t outputs) {
  const char* op = "spike_linear";
  check_packed(op, weight, bias, outputs);
  const int64_t K = weight.size(1), W = words(K);
  const bool as_bits = spikes.scalar_type() == at::kLong;
  if (!as_bits) check_dtype(op, "spikes", spikes, at::kFloat);
  TORCH_CHECK_VALUE(spikes.dim() >= 1 && spikes.size(-1) == (as_bits ? W : K), op,
                    ": spikes must have ", as_bits ? W : K, " in their last dimension, got ",
                    spikes.sizes());
  const Tensor x = spikes.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  RowInput in{K};
  Tensor counts;
  if (as_bits) {
    check_bits(op, x, K);
    in.bits = bits_of(x);
    in.stride = W;
  } else {
    counts = counted_rows(x);
    in.counts = counts.defined() ? read<uint8_t>(counts) : nullptr;
    in.values = counts.defined() ? nullptr : read<float>(x);
  }
  auto shape = spikes.sizes().vec();
  shape.back() = outputs;
  Tensor out = at::empty(shape, weight.options());
  const HeldLayout layout(1, 1, out.numel() / outputs);
  thread_local Columns columns;
  columns.set(layout.view);
  run_linear_lif({in,
                  &map_of(w, b, outputs),
                  {},
                  layout.view,
                  &columns,
                  nullptr,
                  nullptr,
                  1,
                  write<float>(out)},
                 level_kernels(), scratch());
  return out;
}

// Of bits or of counts.
Tensor spike_conv(const Tensor& spikes, const Tensor& weight, const Tensor& bias, int64_t outputs,
                  at::IntArrayRef window) {
  const char* op = "spike_conv";
  const Window at = window_of(op, window);
  check_packed(op, weight, bias, outputs);
  const int64_t channels = channels_of(op, weight, at);
  const bool bytes = spikes.scalar_type() == at::kByte;
  if (!bytes) check_dtype(op, "maps", spikes, at::kLong);
  const Maps maps(op, spikes, 4, channels, at);
  const Tensor x = spikes.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  if (!bytes) check_bits(op, x, channels);
  Tensor out = at::empty({spikes.size(0), outputs, at.height(maps.height), at.width(maps.width)},
                         weight.options());
  ConvLif a{nullptr,
            bytes ? nullptr : bits_of(x),
            channels,
            1,
            spikes.size(0),
            maps.height,
            maps.width,
            false,
            false,
            &map_of(w, b, outputs),
            {},
            nullptr,
            nullptr,
            at,
            bytes ? read<uint8_t>(x) : nullptr,
            write<float>(out)};
  run_conv_lif(a, level_kernels(), scratch());
  return out;
}

// Of bits [T, B, H, W, words], of counts [T, B, H, W, C], or of float maps [T, B, C, H, W], one
// timestep of which is shown `still` times if that is not 0.
std::tuple<Tensor, Tensor, int64_t> spike_conv_lif(
    const Tensor& maps, const Tensor& weight, const Tensor& bias, const OptionalTensor& v,
    int64_t outputs, at::IntArrayRef window, bool pool, int64_t still, c10::string_view kind,
    double tau, std::optional<double> inv_tau, double v_threshold, std::optional<double> v_reset,
    bool decay_input) {
  const char* op = "spike_conv_lif";
  const Window at = window_of(op, window);
  check_packed(op, weight, bias, outputs);
  const int64_t channels = channels_of(op, weight, at);
  const bool floats = maps.scalar_type() == at::kFloat, bytes = maps.scalar_type() == at::kByte;
  const Maps in(op, maps, 5, channels, at);
  TORCH_CHECK_VALUE(still == 0 || (floats && maps.size(0) == 1), op,
                    ": still must be 0, or so many timesteps of the one of float maps, got ", still,
                    " for ", maps.sizes());
  const int64_t T = still ? still : maps.size(0), B = maps.size(1);
  TORCH_CHECK_VALUE(T >= 0 && T <= 4096, op, ": there must be at most 4096 timesteps, got ", T);
  int64_t height = at.height(in.height), width = at.width(in.width);
  if (pool) height = halved(height), width = halved(width);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(T * B <= most && T * B * height * width <= most, op,
                    ": there must be fewer than 2^31 pixels, got ", T, " timesteps of ",
                    maps.sizes());
  Tensor state = at::empty({B, height, width, outputs}, weight.options());
  if (v) {
    check_shape(op, "v", *v, state.sizes());
    check_dtype(op, "v", *v, at::kFloat);
    state.copy_(*v);
  } else {
    state.fill_(v_reset.value_or(0.0));
  }
  const Tensor x = maps.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  if (!floats && !bytes) check_bits(op, x, channels);
  Tensor out = at::empty({T, B, height, width, words(outputs)}, maps.options().dtype(at::kLong));
  const Charge charge = charge_of(std::string_view(kind.data(), kind.size()), decay_input);
  const Counted counted =
      run_conv_lif({floats ? read<float>(x) : nullptr, floats || bytes ? nullptr : bits_of(x),
                    channels, T, B, in.height, in.width, still != 0, pool, &map_of(w, b, outputs),
                    neuron_settings(charge, tau, inv_tau, v_threshold, v_reset), bits_to(out),
                    write<float>(state), at, bytes ? read<uint8_t>(x) : nullptr},
                   level_kernels(), scratch());
  return {out, state, counted.spikes[0]};
}

std::tuple<Tensor, int64_t> pool_spikes(const Tensor& bits, at::IntArrayRef window) {
  const char* op = "pool_spikes";
  const Window at = window_of(op, window);
  TORCH_CHECK_VALUE(bits.dim() >= 3, op, ": bits must have shape [..., H, W, words], got ",
                    bits.sizes());
  const int64_t W = bits.size(-1);
  const Maps maps(op, bits, bits.dim(), W * word_bits, at);
  auto shape = bits.sizes().vec();
  shape[shape.size() - 3] = at.height(maps.height);
  shape[shape.size() - 2] = at.width(maps.width);
  const Tensor x = bits.contiguous();
  Tensor out = at::empty(shape, bits.options());
  const int64_t pixels = W * maps.height * maps.width;
  pool_bits(bits_of(x), pixels ? bits.numel() / pixels : 0, maps.height, maps.width, W, at,
            bits_to(out), at::get_num_threads());
  return {out, level_kernels().count(bits_of(out), out.numel())};
}

// Whether rows of bits [T, B, N, words] follow each other, at any distance.
bool rows_follow(const Tensor& t) {
  return t.stride(3) == 1 && (t.size(1) == 1 || t.stride(1) == t.size(2) * t.stride(2)) &&
         (t.size(0) == 1 || t.stride(0) == t.size(1) * t.size(2) * t.stride(2));
}

// Spiking attention and its neurons on rows of bits; without a scale, spike-driven attention.
std::tuple<Tensor, Tensor, int64_t> attend_lif(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const OptionalTensor& state, int64_t channels,
                                               int64_t num_heads, std::optional<double> scale,
                                               c10::string_view kind, double tau,
                                               std::optional<double> inv_tau, double v_threshold,
                                               std::optional<double> v_reset, bool decay_input) {
  const char* op = "attend_lif";
  TORCH_CHECK_VALUE(channels >= 1 && num_heads >= 1 && channels % num_heads == 0, op,
                    ": num_heads must divide channels = ", channels, ", got ", num_heads);
  TORCH_CHECK_VALUE(q.dim() == 4, op, ": q must have shape [T, B, N, words], got ", q.sizes());
  const int64_t T = q.size(0), B = q.size(1), N = q.size(2), W = words(channels);
  Tensor rows[3] = {q, k, v};
  const char* names[3] = {"q", "k", "v"};
  bool follow = true;
  for (int i = 0; i < 3; ++i) {
    check_dtype(op, names[i], rows[i], at::kLong);
    check_shape(op, names[i], rows[i], {T, B, N, W});
    follow &= rows_follow(rows[i]) && rows[i].stride(2) == q.stride(2);
  }
  for (Tensor& t : rows) {
    if (!follow) t = t.contiguous();
    if (channels % word_bits) check_bits(op, t.contiguous(), channels);
  }
  const std::vector<int64_t> shape =
      scale ? std::vector<int64_t>{B, N, channels} : std::vector<int64_t>{B, channels};
  Tensor left = at::full(shape, v_reset.value_or(0.0), q.options().dtype(at::kFloat));
  if (state) {
    check_shape(op, "state", *state, shape);
    check_dtype(op, "state", *state, at::kFloat);
    left.copy_(*state);
  }
  Tensor out = at::empty({T, B, N, W}, q.options());
  const HeldLayout layout(T, B, N);
  const Attend a{bits_of(rows[0]),
                 bits_of(rows[1]),
                 bits_of(rows[2]),
                 rows[0].stride(2),
                 bits_to(out),
                 W,
                 nullptr,
                 layout.view,
                 channels,
                 num_heads,
                 static_cast<float>(scale.value_or(1.0)),
                 write<float>(left)};
  const Charge charge = charge_of(std::string_view(kind.data(), kind.size()), decay_input);
  const NeuronParams neuron = neuron_settings(charge, tau, inv_tau, v_threshold, v_reset);
  if (T * B == 0 || (scale && N == 0)) return {out, left, 0};
  if (!scale) {
    const int64_t spikes = run_spike_driven_attention(a, neuron, level_kernels(), scratch());
    return {out, left, spikes};
  }
  thread_local std::vector<Buffer<float>> room;
  room.resize(at::get_num_threads());
  return {out, left, run_attention(a, neuron, level_kernels(), room)};
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("pack_counted", &atsnn::pack_counted);
  m.impl("pack_maps", &atsnn::pack_maps);
  m.impl("count_maps", &atsnn::count_maps);
  m.impl("unpack_maps", &atsnn::unpack_maps);
  m.impl("count_spikes", &atsnn::count_spikes);
  m.impl("spike_linear", &atsnn::spike_linear);
  m.impl("spike_conv", &atsnn::spike_conv);
  m.impl("spike_conv_lif", &atsnn::spike_conv_lif);
  m.impl("attend_lif", &atsnn::attend_lif);
  m.impl("pool_spikes", &atsnn::pool_spikes);
}
