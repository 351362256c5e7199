// Where a convolution, or pooling, looks, and for which pixels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace atsnn {

// Pixel (y, x) of the output reads pixels (y * stride_y - pad_y + ky, x * stride_x - pad_x + kx) of
// the input. Spikformer's as it stands.
struct Window {
  int64_t kernel_y = 3, kernel_x = 3, stride_y = 1, stride_x = 1, pad_y = 1, pad_x = 1;

  constexpr int64_t taps() const { return kernel_y * kernel_x; }
  int64_t height(int64_t input) const { return (input + 2 * pad_y - kernel_y) / stride_y + 1; }
  int64_t width(int64_t input) const { return (input + 2 * pad_x - kernel_x) / stride_x + 1; }
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

// What a pixel of the output reads: pixels of the input, -1 where there is none.
struct Taps {
  int64_t pixel[most_taps], centre;
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
  int64_t dy[most_taps], dx[most_taps], offset[most_taps];
  for (int64_t tap = 0; tap < taps; ++tap) {
    dy[tap] = tap / w.kernel_x;
    dx[tap] = tap % w.kernel_x;
    offset[tap] = dy[tap] * width + dx[tap];
  }
  const int64_t centre = w.pad_y * w.kernel_x + w.pad_x;
  Taps at;
  for (int64_t y = strip.top; y < strip.bottom; ++y) {
    const int64_t top = y * w.stride_y - w.pad_y;
    const bool rows_inside = top >= 0 && top + w.kernel_y <= height;
    for (int64_t x = 0; x < places; ++x) {
      if (!strip.wants(y * places + x)) continue;
      const int64_t left = x * w.stride_x - w.pad_x, first = (top - above) * width + left;
      if (rows_inside && left >= 0 && left + w.kernel_x <= width) {
        for (int64_t tap = 0; tap < taps; ++tap) at.pixel[tap] = first + offset[tap];
      } else {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t ny = top + dy[tap], nx = left + dx[tap];
          const bool inside = ny >= 0 && ny < height && nx >= 0 && nx < width;
          at.pixel[tap] = inside ? first + offset[tap] : -1;
        }
      }
      at.centre = centre < taps ? at.pixel[centre] : -1;
      f(y * places + x, at);
    }
  }
}

}  // namespace atsnn
