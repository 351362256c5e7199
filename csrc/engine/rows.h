// Rows of spikes added to rows of numbers.
#pragma once

#include <array>

#include "spikes.h"

namespace atsnn {

// Byte i of entry b is bit i of b.
inline const std::array<uint64_t, 256> spread_bits = [] {
  std::array<uint64_t, 256> table{};
  for (uint64_t b = 0; b < 256; ++b) {
    for (uint64_t i = 0; i < 8; ++i) table[b] |= (b >> i & 1) << (8 * i);
  }
  return table;
}();

// x[c] += bit c; the sums must stay below 256.
inline void add_bits(const uint64_t* bits, int64_t channels, uint8_t* x) {
  for (int64_t c = 0; c < channels; c += 8) {
    const uint64_t add = spread_bits[bits[c / word_bits] >> (c % word_bits) & 0xff];
    if (c + 8 <= channels) {
      uint64_t eight;
      std::memcpy(&eight, x + c, 8);
      eight += add;  // no byte overflows into the next
      std::memcpy(x + c, &eight, 8);
    } else {
      for (int64_t i = 0; c + i < channels; ++i) x[c + i] += add >> (8 * i) & 1;
    }
  }
}

inline void add_bits(const uint64_t* bits, int64_t channels, float* x) {
  for (int64_t i = 0; i < words(channels); ++i) {
    each_bit(bits[i], [&](int64_t bit) { x[i * word_bits + bit] += 1.0f; });
  }
}

}  // namespace atsnn
