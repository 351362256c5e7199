// spike_linear_lif: the engine's linear map with neurons, bits or floats in and out.
#include "linear.h"

#include <ATen/ops/full.h>

#include <atomic>
#include <numeric>

#include "../engine/parallel.h"
#include "kernels.h"
#include "neuron.h"

namespace atsnn {

const Kernels& level_kernels() {
#if defined(__x86_64__)
  if (level() == Level::avx512) return avx512_kernels;
  if (level() == Level::avx2) return avx2_kernels;
#endif
  return portable_kernels;
}

std::vector<ChunkScratch>& scratch() {
  thread_local std::vector<ChunkScratch> kept;
  kept.resize(at::get_num_threads());
  return kept;
}

namespace {

constexpr int64_t rows_a_task = 64;

template <class F>
void each_row(int64_t rows, F f) {
  parallel(at::get_num_threads(), (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * rows_a_task);
    for (int64_t r = task * rows_a_task; r < end; ++r) f(r);
  });
}

}  // namespace

Tensor packed(const Tensor& x, bool* binary) {
  const int64_t C = x.size(-1), W = words(C), rows = C ? x.numel() / C : 0;
  auto shape = x.sizes().vec();
  shape.back() = W;
  Tensor bits = at::empty(shape, x.options().dtype(at::kLong));
  std::vector<char> whole(std::max<int64_t>(rows, 1), 1);  // of each row: no two threads share one
  const Kernels& k = level_kernels();
  each_row(rows, [&](int64_t r) {
    whole[r] = k.pack(read<float>(x) + r * C, C,
                      reinterpret_cast<uint64_t*>(write<int64_t>(bits)) + r * W);
  });
  *binary = std::accumulate(whole.begin(), whole.end(), char(1),
                            [](char a, char b) { return char(a & b); });
  return bits;
}

Tensor counted_rows(const Tensor& x) {
  Tensor counts = at::empty(x.sizes(), x.options().dtype(at::kByte));
  const float* from = read<float>(x);
  uint8_t* to = write<uint8_t>(counts);
  const int64_t n = x.numel();
  std::atomic<bool> whole{true};
  constexpr int64_t piece = 1 << 14;
  parallel(at::get_num_threads(), (n + piece - 1) / piece, [&](int64_t task, int) {
    if (!whole.load(std::memory_order_relaxed)) return;
    const int64_t end = std::min(n, (task + 1) * piece);
    uint32_t other = 0;
    for (int64_t i = task * piece; i < end; ++i) {
      // Between the bounds, which a NaN is not, the conversion is defined.
      const float bounded = from[i] >= 0.0f && from[i] <= 255.0f ? from[i] : 0.0f;
      const auto count = static_cast<int32_t>(bounded);
      other |= uint32_t(static_cast<float>(count) != from[i]);
      to[i] = static_cast<uint8_t>(count);
    }
    if (other) whole.store(false, std::memory_order_relaxed);
  });
  return whole ? counts : Tensor();
}

void check_packed(const char* op, const Tensor& weight, const Tensor& bias, int64_t outputs) {
  TORCH_CHECK_VALUE(outputs >= 1, op, ": outputs must be at least 1, got ", outputs);
  const int64_t K = weight.dim() == 3 ? weight.size(1) : -1;
  check_shape(op, "the packed weight", weight, {words(outputs), K, panel});
  check_dtype(op, "the packed weight", weight, at::kFloat);
  check_shape(op, "the packed bias", bias, {words(outputs), panel});
  check_dtype(op, "the packed bias", bias, at::kFloat);
  TORCH_CHECK_VALUE(K >= 1 && K <= most_inputs, op, ": inputs must be in 1 .. ", most_inputs,
                    ", got ", K);
}

void check_bits(const char* op, const Tensor& bits, int64_t channels) {
  if (channels % word_bits == 0) return;
  // A bit that is no input would be an address beyond the weights.
  const int64_t W = words(channels), rows = bits.numel() / W;
  const auto* at = reinterpret_cast<const uint64_t*>(read<int64_t>(bits));
  for (int64_t r = 0; r < rows; ++r) {
    TORCH_CHECK_VALUE((at[(r + 1) * W - 1] & ~valid_bits(channels, W - 1)) == 0, op,
                      ": bits past the last of ", channels, " inputs must be zero, got row ", r);
  }
}

PackedLinear& map_of(const Tensor& weight, const Tensor& bias, int64_t outputs) {
  thread_local PackedLinear map;  // and what it holds, so that little is allocated
  map.inputs = weight.size(1);
  map.outputs = outputs;
  map.weight = read<float>(weight);
  std::copy_n(read<float>(bias), bias.numel(), map.bias.reserve(bias.numel()));
  for (int64_t p = 0; p < map.panels(); ++p) {
    map.valid.reserve(map.panels())[p] = valid_bits(outputs, p);
  }
  return map;
}

namespace {

Tensor unpacked(const Tensor& bits, int64_t C) {
  auto shape = bits.sizes().vec();
  const int64_t W = shape.back(), rows = W ? bits.numel() / W : 0;
  shape.back() = C;
  Tensor x = at::empty(shape, bits.options().dtype(at::kFloat));
  const Kernels& k = level_kernels();
  each_row(rows, [&](int64_t r) {
    k.unpack(reinterpret_cast<const uint64_t*>(read<int64_t>(bits)) + r * W, C,
             write<float>(x) + r * C);
  });
  return x;
}

Tensor pack_spikes(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "pack_spikes: x must have shape [..., C], got ", x.sizes());
  check_dtype("pack_spikes", "x", x, at::kFloat);
  bool binary = false;
  return packed(x.contiguous(), &binary);
}

Tensor unpack_spikes(const Tensor& bits, int64_t channels) {
  const char* op = "unpack_spikes";
  check_dtype(op, "bits", bits, at::kLong);
  TORCH_CHECK_VALUE(bits.dim() >= 1 && bits.size(-1) == words(channels), op,
                    ": bits must have shape [..., ", words(channels), "] for ", channels,
                    " channels, got ", bits.sizes());
  return unpacked(bits.contiguous(), channels);
}

std::tuple<Tensor, Tensor> pack_linear(const Tensor& weight, const OptionalTensor& bias) {
  const char* op = "pack_linear";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": weight must have shape [outputs, inputs], got ",
                    weight.sizes());
  check_dtype(op, "weight", weight, at::kFloat);
  if (bias) {
    check_shape(op, "bias", *bias, {weight.size(0)});
    check_dtype(op, "bias", *bias, at::kFloat);
  }
  const Tensor w = weight.contiguous();
  const OptionalTensor b = contiguous(bias);
  const PackedLinear map(read<float>(w), read_or_null<float>(b), w.size(0), w.size(1));
  Tensor all = at::empty({map.panels(), map.inputs, panel}, w.options());
  Tensor biases = at::empty({map.panels(), panel}, w.options());
  std::copy_n(map.weight, map.weights(), write<float>(all));
  std::copy_n(map.bias.data(), map.panels() * panel, write<float>(biases));
  return {all, biases};
}

std::tuple<Tensor, Tensor> spike_linear_lif(
    const Tensor& spikes, const Tensor& weight, const Tensor& bias, const OptionalTensor& v,
    const OptionalTensor& token, const OptionalTensor& offsets, int64_t outputs,
    c10::string_view kind, double tau, std::optional<double> inv_tau, double v_threshold,
    std::optional<double> v_reset, bool decay_input, bool keep) {
  const char* op = "spike_linear_lif";
  TORCH_CHECK_VALUE(token.has_value() == offsets.has_value(), op,
                    ": a layout needs both token and offsets");
  const bool as_bits = spikes.scalar_type() == at::kLong;
  if (!as_bits) check_dtype(op, "spikes", spikes, at::kFloat);
  const int64_t lead = token || offsets ? 1 : 2;
  TORCH_CHECK_VALUE(spikes.dim() >= lead && (lead == 2 || spikes.dim() == 2), op,
                    ": spikes must have shape [T, ..., inputs] or, packed, [R, inputs], got ",
                    spikes.sizes());
  check_packed(op, weight, bias, outputs);
  const int64_t K = weight.size(1);
  const int64_t last = as_bits ? words(K) : K;
  TORCH_CHECK_VALUE(spikes.size(-1) == last, op, ": spikes must have ", last,
                    " in their last dimension, got ", spikes.sizes());
  const int64_t rows = spikes.numel() / last;
  // A dense input is one image, whose tokens are all that is neither time nor channel.
  auto state_shape = spikes.sizes().slice(1).vec();
  state_shape.back() = outputs;
  const HeldLayout layout =
      lead == 1 ? HeldLayout(op, *token, *offsets, rows)
                : HeldLayout(spikes.size(0), 1, c10::multiply_integers(state_shape) / outputs);
  if (lead == 1) state_shape = {layout.view.B, layout.view.N, outputs};
  TORCH_CHECK_VALUE(layout.view.T <= 4096, op, ": spikes must have at most 4096 timesteps, got ",
                    layout.view.T);
  // Without a state neurons start at rest and what is left of them is dropped.
  Tensor state;
  if (v) {
    check_shape(op, "v", *v, state_shape);
    check_dtype(op, "v", *v, at::kFloat);
    state = at::empty(state_shape, weight.options());
    state.copy_(*v);
  } else if (keep) {
    state = at::full(state_shape, v_reset.value_or(0.0), weight.options());
  }
  const Tensor x = spikes.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  RowInput in{K};
  Tensor bits = x, counts;
  bool binary = true;
  if (!as_bits) bits = packed(x, &binary);
  if (binary) {
    in.bits = reinterpret_cast<const uint64_t*>(read<int64_t>(bits));
    in.stride = words(K);
    if (as_bits) check_bits(op, bits, K);
  } else {
    counts = counted_rows(x);
    in.counts = counts.defined() ? read<uint8_t>(counts) : nullptr;
    in.values = counts.defined() ? nullptr : read<float>(x);
  }
  const PackedLinear& map = map_of(w, b, outputs);
  auto out_shape = spikes.sizes().vec();
  out_shape.back() = map.panels();
  Tensor out = at::empty(out_shape, spikes.options().dtype(at::kLong));
  thread_local Columns columns;
  columns.set(layout.view);
  const Charge charge = charge_of(std::string_view(kind.data(), kind.size()), decay_input);
  run_linear_lif({in, &map, neuron_settings(charge, tau, inv_tau, v_threshold, v_reset),
                  layout.view, &columns, reinterpret_cast<uint64_t*>(write<int64_t>(out)),
                  state.defined() ? write<float>(state) : nullptr},
                 level_kernels(), scratch());
  if (!keep) state = at::empty({0}, weight.options());
  return {as_bits ? out : unpacked(out, outputs), state};
}

}  // namespace
}  // namespace atsnn

TORCH_LIBRARY_IMPL(atsnn, CPU, m) {
  m.impl("pack_spikes", &atsnn::pack_spikes);
  m.impl("unpack_spikes", &atsnn::unpack_spikes);
  m.impl("pack_linear", &atsnn::pack_linear);
  m.impl("spike_linear_lif", &atsnn::spike_linear_lif);
}
