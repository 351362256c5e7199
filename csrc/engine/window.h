// Where a convolution, or pooling, looks, and for which pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace atsnn {

// Pixel (y, x) of the output reads pixels (y * stride_y - pad_y + ky, x * stride_x - pad_x + kx) of
// the input. Spikformer's as it stands.
struct Window {
  int64_t kernel_y = 3, kernel_x = 3, stride_y = 1, stride_x = 1, pad_y = 1, pad_x = 1;

  bool operator==(const Window&) const = default;

  constexpr int64_t taps() const { return kernel_y * kernel_x; }
  int64_t height(int64_t input) const { return (input + 2 * pad_y - kernel_y) / stride_y + 1; }
  int64_t width(int64_t input) const { return (input + 2 * pad_x - kernel_x) / stride_x + 1; }

  // The pixels x of a row of the output, [begin, end), whose tap `kx` lies inside the input.
  struct Range {
    int64_t begin, end;
  };
  Range inside_x(int64_t kx, int64_t input) const {
    const int64_t shift = kx - pad_x;
    return {shift < 0 ? (stride_x - 1 - shift) / stride_x : 0,
            std::min(width(input), (input - shift + stride_x - 1) / stride_x)};
  }
};

constexpr int64_t most_taps = 64;

// A piece of one image: rows of pixels of the output, and which of the image's pixels are wanted.
struct Strip {
  int64_t image, top, bottom;
  const uint8_t* wanted;  // null: all

  bool wants(int64_t pixel) const { return !wanted || wanted[pixel]; }
  int64_t pixels(int64_t width) const {
    if (!wanted) return (bottom - top) * width;
    return std::count_if(wanted + top * width, wanted + bottom * width,
                         [](uint8_t pixel) { return pixel != 0; });
  }
};

// What a pixel of the output reads: pixels of the input. Where all exist they are those of the
// pixel before, moved on; nothing is written that would be read back at once.
struct Taps {
  static constexpr int64_t none = std::numeric_limits<int64_t>::min();
  int64_t first;
  const int64_t* offset;
  int64_t centre;  // as below

  // The pixel, or -1 where there is none.
  int64_t operator[](int64_t tap) const { return offset[tap] == none ? -1 : first + offset[tap]; }
};

// Calls f(pixel, taps) for the wanted pixels of a strip, in order. Pixels of the input, a map of
// [height, width], are counted from row `above` on. Inlined, so that it is compiled for the
// instruction set of whoever calls it.
template <class F>
inline __attribute__((always_inline)) void each_window(const Window& window, int64_t height,
                                                       int64_t width, Strip strip, int64_t above,
                                                       F f) {
  const Window w = window;  // a copy, which what f stores cannot alias
  const int64_t taps = w.taps(), places = w.width(width);
  int64_t dy[most_taps], dx[most_taps], offset[most_taps], edge[most_taps];
  for (int64_t tap = 0; tap < taps; ++tap) {
    dy[tap] = tap / w.kernel_x;
    dx[tap] = tap % w.kernel_x;
    offset[tap] = dy[tap] * width + dx[tap];
  }
  const int64_t centre = w.pad_y * w.kernel_x + w.pad_x;
  const bool has_centre = centre < taps;
  const int64_t to_centre = has_centre ? offset[centre] : 0;
  for (int64_t y = strip.top; y < strip.bottom; ++y) {
    const int64_t top = y * w.stride_y - w.pad_y;
    const bool rows_inside = top >= 0 && top + w.kernel_y <= height;
    for (int64_t x = 0; x < places; ++x) {
      if (!strip.wants(y * places + x)) continue;
      const int64_t left = x * w.stride_x - w.pad_x, first = (top - above) * width + left;
      if (rows_inside && left >= 0 && left + w.kernel_x <= width) {
        f(y * places + x, Taps{first, offset, has_centre ? first + to_centre : -1});
        continue;
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t ny = top + dy[tap], nx = left + dx[tap];
        const bool inside = ny >= 0 && ny < height && nx >= 0 && nx < width;
        edge[tap] = inside ? offset[tap] : Taps::none;
      }
      const Taps at{first, edge, -1};
      f(y * places + x, Taps{first, edge, has_centre ? at[centre] : -1});
    }
  }
}

}  // namespace atsnn
