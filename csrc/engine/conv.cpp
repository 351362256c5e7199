#include "conv.h"

#include <cstring>
#include <limits>

#include "parallel.h"

namespace atsnn {
namespace {

constexpr int64_t strip_rows = 512;
// What neighbouring strips both read is put together twice.
constexpr int64_t narrow_strip_rows = 2048;
// Weights of a panel that leave room in the second cache for what else is read.
constexpr int64_t second_cache_inputs = 1024;
// Of narrow maps whole taps make a tile, so that a row has enough to add in each.
constexpr int64_t few_inputs = 448;

// How the inputs (tap, channel) are divided into tiles: so many taps, or parts of one.
struct Tiling {
  int64_t taps_a_tile, part;  // `part`: channels of a tile within a tap, a multiple of 64
  int64_t parts(int64_t channels) const { return (channels + part - 1) / part; }
  int64_t tiles(int64_t taps, int64_t channels) const {
    return taps / taps_a_tile * parts(channels);
  }
};

Tiling whole_taps(int64_t n, int64_t channels) { return {n, words(channels) * word_bits}; }

Tiling tiling(double rate, const Window& window, int64_t channels) {
  const bool tiled = rate >= first_cache_rate;
  if (tiled && channels > first_cache_inputs) {
    return {1, tile_inputs(channels, first_cache_inputs)};
  }
  for (int64_t n : {window.taps(), window.kernel_x}) {
    if (n * channels <= (tiled ? few_inputs : second_cache_inputs)) return whole_taps(n, channels);
  }
  return whole_taps(1, channels);
}

// Lists the inputs of the pixels of a strip at timesteps [begin, end), pixel by pixel: of bits or
// of counts.
class SpikeListing {
 public:
  SpikeListing(const ConvLif& a, const Kernels& k, Strip strip, int64_t begin, int64_t end)
      : a_(a),
        k_(k),
        strip_(strip),
        begin_(begin),
        steps_(end - begin),
        stride_(words(a.channels)),
        above_(std::max<int64_t>(strip.top * a.window.stride_y - a.window.pad_y, 0)),
        around_(std::max<int64_t>(below() - above_, 0) * a.width) {}

  // The share of inputs that fire.
  double rate() const {
    int64_t entries = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      if (!a_.counts) entries += k_.count(word(t, 0), around_ * stride_);
      for (int64_t i = 0; a_.counts && i < around_ * a_.channels; ++i) {
        entries += count(t, 0)[i] != 0;
      }
    }
    const int64_t places = around_ * steps_ * a_.channels;
    return places ? double(entries) / places : 0.0;
  }

  // Returns the number of spikes in the strip, where output and input are of one size.
  double list(const Tiling& tile, ChunkScratch& s, Lists& lists) {
    parts_ = tile.parts(a_.channels);
    find(tile, s);
    double input = 0;
    each_window(a_.window, a_.height, a_.width, strip_, above_, [&](int64_t, const Taps& at) {
      for (int64_t t = 0; t < steps_; ++t) {
        const uint32_t* found = s.found.data() + t * around_ * parts_;
        if (at.centre >= 0) input += found[(at.centre + 1) * parts_] - found[at.centre * parts_];
        parts_ == 1 ? list_taps(found, at, tile.taps_a_tile, s, lists)
                    : list_parts(found, at, s, lists);
      }
    });
    return input;
  }

 private:
  // The row of the input past the last that the strip reads.
  int64_t below() const {
    const Window& w = a_.window;
    return std::min((strip_.bottom - 1) * w.stride_y - w.pad_y + w.kernel_y, a_.height);
  }

  // Where a pixel of those around the strip is.
  int64_t place(int64_t t, int64_t pixel) const {
    const int64_t first = ((begin_ + t) * a_.B + strip_.image) * a_.height * a_.width;
    return first + above_ * a_.width + pixel;
  }
  const uint64_t* word(int64_t t, int64_t pixel) const {
    return a_.bits + place(t, pixel) * stride_;
  }
  const uint8_t* count(int64_t t, int64_t pixel) const {
    return a_.counts + place(t, pixel) * a_.channels;
  }

  // The spikes of each pixel, once; a pixel is a neighbour of many.
  void find(const Tiling& tile, ChunkScratch& s) {
    uint32_t* found = s.found.data();
    int64_t n = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      for (int64_t pixel = 0; pixel < around_; ++pixel) {
        for (int64_t c = 0; c < a_.channels; c += tile.part) {
          const int64_t channels = std::min(tile.part, a_.channels - c);
          uint16_t* part = s.part.data() + n;
          *found++ = static_cast<uint32_t>(n);
          n += a_.counts
                   ? k_.list_bytes(count(t, pixel) + c, channels, c, part, s.part_value.data() + n)
                   : k_.list_bits(word(t, pixel) + c / word_bits, words(channels), c, part);
        }
      }
    }
    *found = static_cast<uint32_t>(n);
  }

  void append(const uint32_t* f, int64_t tap, const ChunkScratch& s, Lists& lists) const {
    const uint16_t* part = s.part.data() + f[0];
    const int64_t n = f[1] - f[0], shift = tap * a_.channels;
    a_.counts ? lists.append(part, s.part_value.data() + f[0], n, shift)
              : lists.append(part, n, shift);
  }

  void list_taps(const uint32_t* found, const Taps& at, int64_t taps_a_tile, const ChunkScratch& s,
                 Lists& lists) const {
    int64_t left = taps_a_tile;
    for (int64_t tap = 0; tap < a_.window.taps(); ++tap) {
      if (at[tap] >= 0) append(found + at[tap], tap, s, lists);
      if (--left == 0) {
        lists.end_tile();
        left = taps_a_tile;
      }
    }
  }

  void list_parts(const uint32_t* found, const Taps& at, const ChunkScratch& s,
                  Lists& lists) const {
    for (int64_t tap = 0; tap < a_.window.taps(); ++tap) {
      for (int64_t i = 0; i < parts_; ++i) {
        if (at[tap] >= 0) append(found + at[tap] * parts_ + i, tap, s, lists);
        lists.end_tile();
      }
    }
  }

  const ConvLif& a_;
  const Kernels& k_;
  const Strip strip_;
  const int64_t begin_, steps_, stride_, above_, around_;  // around: pixels with a neighbour in it
  int64_t parts_ = 1;
};

// The same of float images, whose pixels are rarely zero.
double list_floats(const ConvLif& a, const Kernels& k, Strip strip, int64_t begin, int64_t end,
                   float* patch, Lists& lists) {
  double input = 0;
  const int64_t taps = a.window.taps(), pixels = a.height * a.width;
  each_window(a.window, a.height, a.width, strip, 0, [&](int64_t, const Taps& at) {
    for (int64_t t = begin; t < end; ++t) {
      const float* image = a.images + (t * a.B + strip.image) * a.channels * pixels;
      float* to = patch;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < a.channels; ++c) {
          *to++ = at[tap] < 0 ? 0.0f : image[c * pixels + at[tap]];
        }
      }
      for (int64_t c = 0; at.centre >= 0 && c < a.channels; ++c) {
        input += image[c * pixels + at.centre];
      }
      lists.add_floats(k, patch, taps * a.channels, 0);
      lists.end_tile();
    }
  });
  return input;
}

// `rows` of the lists are the wanted pixels of the strip times the timesteps.
Lists list_strip(const ConvLif& a, const Kernels& k, Strip strip, int64_t begin, int64_t end,
                 ChunkScratch& s) {
  const int64_t rows = strip.pixels(a.window.width(a.width)) * (end - begin);
  const int64_t taps = a.window.taps();
  if (a.images) {
    Lists lists(s, rows, taps * a.channels, 1, true);
    s.counted.input += list_floats(a, k, strip, begin, end, s.patch.data(), lists);
    lists.sort();
    return lists;
  }
  SpikeListing listing(a, k, strip, begin, end);
  const Tiling tile = tiling(listing.rate(), a.window, a.channels);
  Lists lists(s, rows, taps * a.channels, tile.tiles(taps, a.channels), a.counts != nullptr);
  s.counted.input += listing.list(tile, s, lists);
  lists.sort();
  return lists;
}

// Memory for strips of so many rows of pixels of the output.
void reserve(const ConvLif& a, int64_t rows, int64_t steps, ChunkScratch& s) {
  const Window& w = a.window;
  const int64_t pixels = rows * w.width(a.width), taps = w.taps(), parts = words(a.channels);
  const int64_t around = std::min((rows - 1) * w.stride_y + w.kernel_y, a.height) * a.width;
  Lists::reserve(s, pixels * steps, taps * a.channels, taps * parts, a.images || a.counts);
  if (a.images) {
    s.patch.reserve(taps * a.channels);
  } else {
    s.part.reserve(around * steps * a.channels + 16);
    if (a.counts) s.part_value.reserve(around * steps * a.channels + 16);
    s.found.reserve(around * steps * parts + 1);
  }
  s.first.reserve(pixels + 1);
  s.row.reserve(pixels * a.T);
  s.state.reserve(pixels);
  s.counted = {};
}

// The columns of the wanted pixels of a strip of an image of `pixels`, each so many timesteps long
// from `from` on; returns how many there are.
int64_t set_columns(const ConvLif& a, Strip strip, int64_t width, int64_t pixels, int64_t from,
                    int64_t steps, ChunkScratch& s) {
  int32_t* const first = s.first.data();
  int32_t* const row = s.row.data();
  int32_t local = 0;
  int64_t columns = 0;
  for (int64_t pixel = strip.top * width; pixel < strip.bottom * width; ++pixel) {
    if (!strip.wants(pixel)) continue;
    first[columns] = local;
    const int64_t place = strip.image * pixels + pixel;
    for (int64_t t = from; t < from + steps; ++t) {
      row[local++] = static_cast<int32_t>(t * a.B * pixels + place);
    }
    if (a.state) s.state.data()[columns] = a.state + place * a.map->outputs;
    ++columns;
  }
  first[columns] = local;
  return columns;
}

// Pixels that are not wanted do not fire. Those that are will be written over, so that whole rows
// are zeroed.
void silence(const ConvLif& a, Strip strip, int64_t width, int64_t pixels, int64_t begin,
             int64_t end) {
  if (!strip.wanted || !a.out) return;
  const int64_t panels = a.map->panels(), count = (strip.bottom - strip.top) * width;
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t row = (t * a.B + strip.image) * pixels + strip.top * width;
    uint64_t* const out = a.out + row * panels;
    if (begin == 0 && end == panels) {
      std::fill_n(out, count * panels, uint64_t(0));
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      std::fill(out + i * panels + begin, out + i * panels + end, uint64_t(0));
    }
  }
}

// Sums of the wanted pixels behind the pooling, one after the other; `row` says where the sums of
// each pixel before it are.
void pool_sums(const float* sums, const int32_t* row, int64_t height, int64_t width, Strip wanted,
               float* out) {
  for (int64_t y = 0; y < halved(height); ++y) {
    for (int64_t x = 0; x < halved(width); ++x) {
      if (!wanted.wants(y * halved(width) + x)) continue;
      std::fill_n(out, panel, -std::numeric_limits<float>::infinity());
      for (int64_t ny = std::max<int64_t>(2 * y - 1, 0); ny <= std::min(2 * y + 1, height - 1);
           ++ny) {
        for (int64_t nx = std::max<int64_t>(2 * x - 1, 0); nx <= std::min(2 * x + 1, width - 1);
             ++nx) {
          const float* in = sums + row[ny * width + nx] * panel;
          for (int64_t c = 0; c < panel; ++c) out[c] = std::max(out[c], in[c]);
        }
      }
      out += panel;
    }
  }
}

// One item: panels [begin, end) of an image, timestep by timestep, as pooling needs all pixels.
void run_pooled(const ConvLif& a, const Kernels& k, int64_t image, int64_t begin, int64_t end,
                ChunkScratch& s) {
  const PackedLinear& map = *a.map;
  const int64_t height = a.window.height(a.height), width = a.window.width(a.width);
  const int64_t pixels = halved(height) * halved(width);
  const Strip neurons{image, 0, halved(height), a.wanted ? a.wanted + image * pixels : nullptr};
  silence(a, neurons, halved(width), pixels, begin, end);
  if (neurons.pixels(halved(width)) == 0) return;
  // What the neurons read, and where its sums are.
  Strip sums{image, 0, height, nullptr};
  if (a.wanted) {
    uint8_t* const read = s.read.data();
    mark_read(neurons.wanted, halving, height, width, read, read + height * width);
    sums.wanted = read;
  }
  int32_t* const sum_of = s.sum_of.data();
  for (int64_t i = 0, n = 0; i < height * width; ++i) {
    sum_of[i] = sums.wants(i) ? static_cast<int32_t>(n++) : 0;
  }
  float* const pooled = s.room.data();
  float* const membranes = pooled + pixels * panel;
  const int64_t shown = a.still ? a.T : 1;
  const double input = s.counted.input;
  if (!a.state) {
    std::fill_n(membranes, (end - begin) * pixels * panel, static_cast<float>(a.neuron.v_reset));
  }
  for (int64_t t = 0; t < (a.still ? 1 : a.T); ++t) {
    const Lists lists = list_strip(a, k, sums, t, t + 1, s);
    const int64_t columns = set_columns(a, neurons, halved(width), pixels, t, shown, s);
    for (int64_t p = begin; p < end; ++p) {
      lists.run(k, map, p, s.acc.data());
      pool_sums(s.acc.data(), sum_of, height, width, neurons, pooled);
      for (int64_t i = 0; !a.state && i < columns; ++i) {
        s.state.data()[i] = membranes + ((p - begin) * pixels + i) * panel;
      }
      s.counted.spikes[0] += k.fire(
          {pooled, a.still, s.first.data(), s.row.data(), columns, a.out + p, map.panels(),
           map.valid.data()[p], s.state.data(), a.state ? p * panel : 0, a.at_rest && t == 0},
          a.neuron);
    }
  }
  if (begin > 0) s.counted.input = input;  // counted once
}

// Maps a word wide, and images of few channels, to one panel of outputs whose weights stay in the
// second cache. With more panels lists serve all of them.
bool is_narrow(const ConvLif& a) {
  if (a.counts || a.sums || a.map->panels() != 1) return false;
  const int64_t inputs = a.window.taps() * a.channels;
  return a.images ? inputs <= word_bits : a.bits && a.channels <= word_bits && inputs <= few_inputs;
}

// Whether the neurons of neighbouring places run side by side.
bool by_neighbours(const ConvLif& a) {
  return a.images && a.still && !a.state && !a.wanted && a.window.stride_x == 1;
}

void run_narrow(const ConvLif& a, const Kernels& k, Strip strip, int64_t pixels, ChunkScratch& s) {
  const PackedLinear& map = *a.map;
  NarrowConv conv{};
  const int64_t size = a.height * a.width * (a.images ? a.channels : 1);
  if (a.images) {
    conv.image = a.images + strip.image * size;
    conv.still = a.still;
  } else {
    conv.bits = a.bits + strip.image * size;
  }
  conv.step = a.B * size;
  conv.height = a.height;
  conv.width = a.width;
  conv.channels = a.channels;
  conv.T = a.T;
  conv.window = a.window;
  conv.strip = strip;
  conv.weight = map.panel_weight(0);
  conv.bias = map.panel_bias(0);
  conv.valid = map.valid.data()[0];
  conv.out = a.out + strip.image * pixels;
  conv.out_step = a.B * pixels;
  if (a.state) conv.state = a.state + strip.image * pixels * map.outputs;
  conv.at_rest = a.at_rest;
  conv.room = s.windows.data();
  if (by_neighbours(a)) conv.padded = s.room.data();
  const NarrowCounts counted = k.conv_narrow(conv, a.neuron);
  s.counted.input += counted.input;
  s.counted.spikes[0] += counted.spikes;
}

// One item: a strip of an image, all timesteps, panels [first, last).
void run_strip(const ConvLif& a, const Kernels& k, Strip strip, int64_t first, int64_t last,
               ChunkScratch& s) {
  const PackedLinear& map = *a.map;
  const double input = s.counted.input;
  const int64_t width = a.window.width(a.width), pixels = a.window.height(a.height) * width;
  if (a.wanted) strip.wanted = a.wanted + strip.image * pixels;
  silence(a, strip, width, pixels, first, last);
  if (is_narrow(a)) return run_narrow(a, k, strip, pixels, s);
  const int64_t columns = set_columns(a, strip, width, pixels, 0, a.T, s);
  if (columns == 0) return;
  const Lists lists = list_strip(a, k, strip, 0, a.still ? 1 : a.T, s);
  for (int64_t p = first; p < last; ++p) {
    lists.run(k, map, p, s.acc.data());
    if (a.sums) {
      write_sums(s.acc.data(), s.row.data(), columns * a.T, map, p, pixels, a.sums);
      continue;
    }
    s.counted.spikes[0] += k.fire(
        {s.acc.data(), a.still, s.first.data(), s.row.data(), columns, a.out + p, map.panels(),
         map.valid.data()[p], a.state ? s.state.data() : nullptr, p * panel, a.at_rest},
        a.neuron);
  }
  if (first > 0) s.counted.input = input;  // counted once
}

}  // namespace

Counted run_conv_lif(const ConvLif& a, const Kernels& k, std::vector<ChunkScratch>& scratch) {
  const int threads = static_cast<int>(scratch.size());
  const int64_t height = a.window.height(a.height), width = a.window.width(a.width);
  if (a.B == 0 || a.T == 0 || height <= 0 || width <= 0) return {};
  if (a.pool) {
    const int64_t pixels = halved(height) * halved(width);
    const int64_t panels = a.map->panels(), shares = shares_of(a.B, panels, threads);
    for (ChunkScratch& s : scratch) {
      reserve(a, height, 1, s);
      s.sum_of.reserve(height * width);
      if (a.wanted) s.read.reserve((height + 1) * width);
      s.room.reserve((1 + (panels + shares - 1) / shares) * pixels * panel);
    }
    parallel(threads, a.B * shares, [&](int64_t item, int thread) {
      const int64_t share = item % shares;
      run_pooled(a, k, item / shares, panels * share / shares, panels * (share + 1) / shares,
                 scratch[thread]);
    });
  } else {
    const int64_t steps = a.still ? 1 : a.T;
    const bool narrow = is_narrow(a);
    const int64_t panels = a.map->panels();
    int64_t rows = (narrow ? narrow_strip_rows : strip_rows) / (width * steps);
    // Where images and panels are few, strips are for all threads.
    if (threads > 1) rows = std::min(rows, a.B * panels * height / (2 * threads));
    rows = std::clamp<int64_t>(rows, 1, height);
    const int64_t strips = (height + rows - 1) / rows;
    const int64_t shares = shares_of(a.B * strips, panels, threads);
    for (ChunkScratch& s : scratch) {
      if (narrow) {
        s.counted = {};
        if (a.bits) s.windows.reserve(NarrowWords(a.window, a.channels).room(rows, width, a.T));
        if (by_neighbours(a)) {
          s.room.reserve(PaddedImage{a.window, a.width, a.channels}.room(rows));
        }
      } else {
        reserve(a, rows, steps, s);
      }
    }
    parallel(threads, a.B * strips * shares, [&](int64_t item, int thread) {
      const int64_t share = item % shares, strip = item / shares % strips, top = strip * rows;
      run_strip(a, k, {item / shares / strips, top, std::min(top + rows, height), nullptr},
                panels * share / shares, panels * (share + 1) / shares, scratch[thread]);
    });
  }
  Counted counted;
  for (const ChunkScratch& s : scratch) counted += s.counted;
  return counted;
}

namespace {

// The OR of 3 x 3 words around every second one of a row, of which `n` rows of words lie inside.
void pool_row_of_words(const uint64_t* const* rows, int64_t n, int64_t width, uint64_t* to) {
  const int64_t places = halved(width);
  std::fill_n(to, places, uint64_t(0));
  for (int64_t row = 0; row < n; ++row) {
    const uint64_t* const from = rows[row];
    for (int64_t x = 0; x < width / 2; ++x) to[x] |= from[2 * x] | from[2 * x + 1];
    for (int64_t x = 1; x < places; ++x) to[x] |= from[2 * x - 1];
    if (width % 2) to[places - 1] |= from[width - 1];
  }
}

}  // namespace

void pool_bits(const uint64_t* bits, int64_t maps, int64_t height, int64_t width, int64_t stride,
               const Window& window, uint64_t* out, int threads, const uint8_t* wanted) {
  const int64_t h = window.height(height), w = window.width(width);
  const bool halves = window == halving && stride == 1;
  parallel(threads, maps, [&](int64_t map, int) {
    const uint64_t* in = bits + map * height * width * stride;
    const uint8_t* wants = wanted ? wanted + map * h * w : nullptr;
    uint64_t* to = out + map * h * w * stride;
    for (int64_t y = 0; y < h; ++y, to += w * stride, wants = wants ? wants + w : nullptr) {
      if (wants && !std::memchr(wants, 1, w)) {
        std::fill_n(to, w * stride, uint64_t(0));
        continue;
      }
      const int64_t first_y = y * window.stride_y - window.pad_y;
      const int64_t top = std::max<int64_t>(first_y, 0);
      const int64_t bottom = std::min(first_y + window.kernel_y, height);
      if (halves) {
        const uint64_t* rows[3];
        for (int64_t ny = top; ny < bottom; ++ny) rows[ny - top] = in + ny * width;
        pool_row_of_words(rows, bottom - top, width, to);
        for (int64_t x = 0; wants && x < w; ++x) to[x] &= -uint64_t(wants[x]);
        continue;
      }
      for (int64_t x = 0; x < w; ++x) {
        uint64_t* const place = to + x * stride;
        const int64_t first_x = x * window.stride_x - window.pad_x;
        const int64_t left = std::max<int64_t>(first_x, 0);
        const int64_t right = std::min(first_x + window.kernel_x, width);
        std::fill_n(place, stride, uint64_t(0));
        if (wants && !wants[x]) continue;
        for (int64_t ny = top; ny < bottom; ++ny) {
          for (int64_t nx = left; nx < right; ++nx) {
            const uint64_t* from = in + (ny * width + nx) * stride;
            for (int64_t i = 0; i < stride; ++i) place[i] |= from[i];
          }
        }
      }
    }
  });
}

void mark_read(const uint8_t* wanted, const Window& window, int64_t height, int64_t width,
               uint8_t* read, uint8_t* row) {
  const Window w = window;
  const int64_t places = w.width(width);
  std::fill_n(read, height * width, uint8_t(0));
  for (int64_t y = 0; y < w.height(height); ++y, wanted += places) {
    if (!std::memchr(wanted, 1, places)) continue;
    // What a row of windows reads of each row that it looks at.
    std::fill_n(row, width, uint8_t(0));
    for (int64_t kx = 0; kx < w.kernel_x; ++kx) {
      const int64_t shift = kx - w.pad_x;
      const auto [begin, end] = w.inside_x(kx, width);
      if (w.stride_x == 1) {
        for (int64_t x = begin; x < end; ++x) row[x + shift] |= wanted[x];
      } else {
        for (int64_t x = begin; x < end; ++x) row[x * w.stride_x + shift] |= wanted[x];
      }
    }
    const int64_t top = y * w.stride_y - w.pad_y;
    for (int64_t ny = std::max<int64_t>(top, 0); ny < std::min(top + w.kernel_y, height); ++ny) {
      uint8_t* const to = read + ny * width;
      for (int64_t x = 0; x < width; ++x) to[x] |= row[x];
    }
  }
}

}  // namespace atsnn
