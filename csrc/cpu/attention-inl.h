// The spiking attention kernels, written once and compiled for each instruction set.
//
// Of the products only those with what fired are taken: a bit for each value says what did, and a
// row is added (or, where values are not 0 and 1, multiplied and added) for each set bit. Vectors
// run along the channels, so the order of every sum depends on the values alone.

#include "attention_counts-inl.h"
#include "simd-inl.h"

namespace atsnn {
namespace ATSNN_LEVEL {

// Rows of one head: `wide` channels each, `stride` apart, zeros behind the last real one.
template <class A>
struct Head {
  const A* rows;
  int64_t stride;
  uint64_t* bits;  // [n, words], what is not zero
  uint8_t* ones;   // [n], whether all of it is 1

  const A* row(int64_t r) const { return rows + r * stride; }
};

// The memory of one (run, head) item and its shape.
template <class A>
struct Room {
  int64_t n, d, wide, words;
  char* free;

  template <class T>
  T* take(int64_t count) {
    T* const p = reinterpret_cast<T*>(free);
    free += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

template <class A>
Room<A> make_room(void* scratch, int64_t n, int64_t d) {
  const int64_t wide = padded<A>(d);
  return {n, d, wide, (wide + 63) / 64, static_cast<char*>(scratch)};
}

template <class A, class S>
Head<A> head_rows(const S* x, int64_t C, Room<A>& room) {
  constexpr int64_t width = Simd<A>::width;
  // In place where every vector is whole; `wide` is then more than a narrow set of vectors needs.
  if constexpr (std::is_same<S, A>::value) {
    if (room.d % (64 / sizeof(A)) == 0) return {x, C, nullptr, nullptr};
  }
  static_assert(64 / sizeof(A) % width == 0);
  A* const copy = room.template take<A>(room.n * room.wide);
  for (int64_t r = 0; r < room.n; ++r) {
    A* const row = copy + r * room.wide;
    for (int64_t c = 0; c < room.d; ++c) row[c] = widen(x[r * C + c]);
    std::fill(row + room.d, row + room.wide, A(0));
  }
  return {copy, room.wide, nullptr, nullptr};
}

template <class A>
void find_spikes(Head<A>& head, Room<A>& room) {
  constexpr int64_t width = Simd<A>::width;
  head.bits = room.template take<uint64_t>(room.n * room.words);
  head.ones = room.template take<uint8_t>(room.n);
  for (int64_t r = 0; r < room.n; ++r) {
    const A* row = head.row(r);
    uint64_t other = 0;
    for (int64_t w = 0; w < room.words; ++w) {
      uint64_t word = 0;
      const int64_t end = std::min<int64_t>(room.wide, (w + 1) * 64);
      for (int64_t c = w * 64; c < end; c += width) {
        const vec<A> v = load(row + c);
        const uint64_t fired = differs<A>(v, A(0));
        word |= fired << (c % 64);
        other |= fired & differs<A>(v, A(1));
      }
      head.bits[r * room.words + w] = word;
    }
    head.ones[r] = other == 0;
  }
}

template <class A, class S>
Head<A> spiking_rows(const S* x, int64_t C, Room<A>& room) {
  Head<A> head = head_rows<A>(x, C, room);
  find_spikes(head, room);
  return head;
}

// Calls f(i) for every set bit, lowest first.
template <class F>
ATSNN_INLINE void each_bit(const uint64_t* bits, int64_t words, F f) {
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t left = bits[w]; left; left &= left - 1) {
      f(w * 64 + __builtin_ctzll(left));
    }
  }
}

// Calls f(first channel, number of vectors as a constant) for channels in blocks that fit
// registers.
template <class A, class F>
ATSNN_INLINE void each_block(int64_t wide, F f) {
  constexpr int64_t width = Simd<A>::width;
  int64_t c = 0;
  for (; c + 4 * width <= wide; c += 4 * width) f(c, std::integral_constant<int, 4>{});
  for (; c + 2 * width <= wide; c += 2 * width) f(c, std::integral_constant<int, 2>{});
  for (; c < wide; c += width) f(c, std::integral_constant<int, 1>{});
}

// Adds `row` to the rows of `table` at which `spikes` fires.
template <class A>
ATSNN_INLINE void scatter(A* table, const Room<A>& room, const Head<A>& spikes, int64_t r,
                          const A* row) {
  constexpr int64_t width = Simd<A>::width;
  const uint64_t* bits = spikes.bits + r * room.words;
  const A* value = spikes.row(r);
  each_block<A>(room.wide, [&](int64_t c, auto vectors) {
    vec<A> add[vectors.value];
    for (int k = 0; k < vectors.value; ++k) add[k] = load(row + c + k * width);
    if (spikes.ones[r]) {
      each_bit(bits, room.words, [&](int64_t i) {
        A* at = table + i * room.wide + c;
        for (int k = 0; k < vectors.value; ++k)
          store(at + k * width, load(at + k * width) + add[k]);
      });
    } else {
      each_bit(bits, room.words, [&](int64_t i) {
        A* at = table + i * room.wide + c;
        for (int k = 0; k < vectors.value; ++k) {
          store(at + k * width, load(at + k * width) + value[i] * add[k]);
        }
      });
    }
  });
}

// out = scale * the sum of the rows of `table` at which `spikes` fires.
template <class A>
ATSNN_INLINE void gather(A* out, A scale, const A* table, const Room<A>& room,
                         const Head<A>& spikes, int64_t r) {
  constexpr int64_t width = Simd<A>::width;
  const uint64_t* bits = spikes.bits + r * room.words;
  const A* value = spikes.row(r);
  each_block<A>(room.wide, [&](int64_t c, auto vectors) {
    vec<A> sum[vectors.value] = {};
    if (spikes.ones[r]) {
      each_bit(bits, room.words, [&](int64_t i) {
        const A* at = table + i * room.wide + c;
        for (int k = 0; k < vectors.value; ++k) sum[k] += load(at + k * width);
      });
    } else {
      each_bit(bits, room.words, [&](int64_t i) {
        const A* at = table + i * room.wide + c;
        for (int k = 0; k < vectors.value; ++k) sum[k] += value[i] * load(at + k * width);
      });
    }
    for (int k = 0; k < vectors.value; ++k) store(out + c + k * width, scale * sum[k]);
  });
}

// For each of ROWS outputs, `wide` apart: the sum over i < count of factor[row * apart + i * step]
// times row i of `rows`. Several at a time, so that a loaded row serves all and sums do not wait
// for each other.
template <int ROWS, class A>
ATSNN_INLINE void weigh(A* out, const A* factor, int64_t apart, int64_t step, int64_t count,
                        const A* rows, int64_t stride, int64_t wide) {
  constexpr int64_t width = Simd<A>::width;
  each_block<A>(wide, [&](int64_t c, auto vectors) {
    constexpr int n = std::min<int>(vectors.value, 2);  // 2 vectors of 4 rows fit the registers
    for (int64_t from = c; from < c + vectors.value * width; from += n * width) {
      vec<A> sum[ROWS][n] = {};
      for (int64_t i = 0; i < count; ++i) {
        vec<A> row[n];
        for (int k = 0; k < n; ++k) row[k] = load(rows + i * stride + from + k * width);
        for (int r = 0; r < ROWS; ++r) {
          const A f = factor[r * apart + i * step];
          for (int k = 0; k < n; ++k) sum[r][k] += f * row[k];
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < n; ++k) store(out + r * wide + from + k * width, sum[r][k]);
      }
    }
  });
}

template <class A>
ATSNN_INLINE const A* scaled(const A* row, A factor, A* room, int64_t wide) {
  for (int64_t c = 0; c < wide; ++c) room[c] = factor * row[c];
  return room;
}

template <class S>
ATSNN_INLINE void put_row(S* out, const arithmetic_t<S>* row, int64_t d) {
  for (int64_t c = 0; c < d; ++c) out[c] = narrow<S>(row[c]);
}

template <class A>
ATSNN_INLINE A dot(const Head<A>& q, int64_t a, const Head<A>& k, int64_t b, int64_t words) {
  const uint64_t *x = q.bits + a * words, *y = k.bits + b * words;
  if (q.ones[a] && k.ones[b]) {
    int64_t count = 0;
    for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(x[w] & y[w]);
    return static_cast<A>(count);
  }
  A sum = 0;
  each_bit(x, words, [&](int64_t i) { sum += q.row(a)[i] * k.row(b)[i]; });
  return sum;
}

// What an item reads of the layout.
struct Item {
  int64_t first, n, b, channel;
};

ATSNN_INLINE Item item_of(const Layout& layout, int64_t heads, int64_t d, int64_t item) {
  const int64_t run = item / heads;
  return {layout.offsets[run], layout.offsets[run + 1] - layout.offsets[run], run % layout.B,
          item % heads * d};
}

template <class A>
ATSNN_INLINE A size_at(const float* sizes, const Layout& layout, int64_t b, int64_t rank) {
  return sizes ? static_cast<A>(sizes[b * layout.N + layout.token_at(b, rank)]) : A(1);
}

template <class S>
void forward_item(const AttentionForward<S>& a, const Item& item, void* scratch) {
  using A = arithmetic_t<S>;
  const int64_t d = a.C / a.heads, at = item.first * a.C + item.channel;
  const A scale = static_cast<A>(a.scale);
  Room<A> room = make_room<A>(scratch, item.n, d);
  const auto q = spiking_rows<A>(a.q + at, a.C, room);
  const auto k = spiking_rows<A>(a.k + at, a.C, room);
  const auto v = head_rows<A>(a.v + at, a.C, room);
  A* const row = room.template take<A>(room.wide);
  if (keys_first(item.n, d)) {
    A* const kv = room.template take<A>(d * room.wide);
    std::fill(kv, kv + d * room.wide, A(0));
    for (int64_t r = 0; r < item.n; ++r) {
      const A size = size_at<A>(a.sizes, a.layout, item.b, r);
      scatter(kv, room, k, r, a.sizes ? scaled(v.row(r), size, row, room.wide) : v.row(r));
    }
    for (int64_t r = 0; r < item.n; ++r) {
      gather(row, scale, kv, room, q, r);
      put_row(a.out + at + r * a.C, row, d);
    }
  } else {
    A* const product = room.template take<A>(item.n);
    for (int64_t r = 0; r < item.n; ++r) {
      for (int64_t s = 0; s < item.n; ++s) {
        product[s] = dot(q, r, k, s, room.words) * size_at<A>(a.sizes, a.layout, item.b, s);
      }
      weigh<1>(row, product, 0, 1, item.n, v.rows, v.stride, room.wide);
      put_row(a.out + at + r * a.C, scaled(row, scale, row, room.wide), d);
    }
  }
}

template <class A>
void transpose(const A* from, A* to, int64_t d, int64_t wide) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) to[j * wide + i] = from[i * wide + j];
    std::fill(to + i * wide + d, to + (i + 1) * wide, A(0));
  }
}

constexpr int together = 4;  // rows of a gradient that are taken at a time

// With g = scale * grad_out:  grad_q = g (k^T v)^T,  G = q^T g,  grad_v = k G,  grad_k = v G^T.
template <class S>
void backward_keys_first(const AttentionBackward<S>& a, const Item& item,
                         Room<arithmetic_t<S>>& room) {
  using A = arithmetic_t<S>;
  const int64_t d = room.d, wide = room.wide, at = item.first * a.C + item.channel;
  const A scale = static_cast<A>(a.scale);
  const auto q = spiking_rows<A>(a.q + at, a.C, room);
  const auto k = spiking_rows<A>(a.k + at, a.C, room);
  const auto v = spiking_rows<A>(a.v + at, a.C, room);
  const auto grad = head_rows<A>(a.grad_out + at, a.C, room);
  A* const vk = room.template take<A>(d * wide);
  A* const G = room.template take<A>(d * wide);
  A* const GT = room.template take<A>(d * wide);
  A* const row = room.template take<A>(together * wide);
  A* const g = room.template take<A>(together * wide);
  std::fill(g, g + together * wide, A(0));
  std::fill(vk, vk + d * wide, A(0));
  std::fill(G, G + d * wide, A(0));
  for (int64_t r = 0; r < item.n; ++r) {
    const A size = size_at<A>(a.sizes, a.layout, item.b, r);
    scatter(vk, room, v, r, a.sizes ? scaled(k.row(r), size, row, wide) : k.row(r));
  }
  for (int64_t first = 0; first < item.n; first += together) {
    const int64_t some = std::min<int64_t>(together, item.n - first);
    for (int64_t i = 0; i < some; ++i) {
      scatter(G, room, q, first + i, scaled(grad.row(first + i), scale, g + i * wide, wide));
    }
    // Past the last row stands what was there before: it is computed and not used.
    weigh<together>(row, g, wide, 1, d, vk, wide, wide);
    for (int64_t i = 0; i < some; ++i) {
      put_row(a.grad_q + at + (first + i) * a.C, row + i * wide, d);
    }
  }
  transpose(G, GT, d, wide);
  for (int64_t r = 0; r < item.n; ++r) {
    const A size = size_at<A>(a.sizes, a.layout, item.b, r);
    gather(row, size, G, room, k, r);
    put_row(a.grad_v + at + r * a.C, row, d);
    gather(row, size, GT, room, v, r);
    put_row(a.grad_k + at + r * a.C, row, d);
  }
}

// With P = q k^T and D = scale * grad_out v^T diag(size):  grad_v = scale * diag(size) P^T
// grad_out, grad_q = D k,  grad_k = D^T q.
template <class S>
void backward_products_first(const AttentionBackward<S>& a, const Item& item,
                             Room<arithmetic_t<S>>& room) {
  using A = arithmetic_t<S>;
  const int64_t d = room.d, n = room.n, wide = room.wide, at = item.first * a.C + item.channel;
  const A scale = static_cast<A>(a.scale);
  const auto q = spiking_rows<A>(a.q + at, a.C, room);
  const auto k = spiking_rows<A>(a.k + at, a.C, room);
  const auto v = spiking_rows<A>(a.v + at, a.C, room);
  const auto grad = head_rows<A>(a.grad_out + at, a.C, room);
  A* const P = room.template take<A>(n * n);
  A* const D = room.template take<A>(n * n);
  A* const row = room.template take<A>(wide);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t s = 0; s < n; ++s) {
      const A size = size_at<A>(a.sizes, a.layout, item.b, s);
      P[r * n + s] = dot(q, r, k, s, room.words) * (scale * size);
      A sum = 0;
      each_bit(v.bits + s * room.words, room.words,
               [&](int64_t i) { sum += grad.row(r)[i] * v.row(s)[i]; });
      D[r * n + s] = sum * (scale * size);
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    weigh<1>(row, D + r * n, 0, 1, n, k.rows, k.stride, wide);
    put_row(a.grad_q + at + r * a.C, row, d);
    weigh<1>(row, D + r, 0, n, n, q.rows, q.stride, wide);
    put_row(a.grad_k + at + r * a.C, row, d);
    weigh<1>(row, P + r, 0, n, n, grad.rows, grad.stride, wide);
    put_row(a.grad_v + at + r * a.C, row, d);
  }
}

template <class S>
void attention_forward(const AttentionForward<S>& a, void* scratch, int64_t item_begin,
                       int64_t item_end) {
  const int64_t d = a.C / a.heads;
  for (int64_t i = item_begin, end; i < item_end; i = end) {
    const Item item = item_of(a.layout, a.heads, d, i);
    // Heads that lie side by side are read together: whole lines, one after the other.
    const int64_t head = i % a.heads;
    end = i + std::min({count_heads(d), a.heads - head, item_end - i});
    if constexpr (std::is_same<S, float>::value) {
      if (keys_first(item.n, d) && try_counts(a, item.first, item.n, head, end - i, scratch)) {
        continue;
      }
    }
    for (int64_t j = i; j < end; ++j) {
      forward_item(a, item_of(a.layout, a.heads, d, j), scratch);
    }
  }
}

template <class S>
void attention_backward(const AttentionBackward<S>& a, void* scratch, int64_t item_begin,
                        int64_t item_end) {
  using A = arithmetic_t<S>;
  const int64_t d = a.C / a.heads;
  for (int64_t i = item_begin; i < item_end; ++i) {
    const Item item = item_of(a.layout, a.heads, d, i);
    Room<A> room = make_room<A>(scratch, item.n, d);
    if (keys_first(item.n, d)) {
      backward_keys_first(a, item, room);
    } else {
      backward_products_first(a, item, room);
    }
  }
}

#define ATSNN_INSTANTIATE(S)                                                               \
  template void attention_forward<S>(const AttentionForward<S>&, void*, int64_t, int64_t); \
  template void attention_backward<S>(const AttentionBackward<S>&, void*, int64_t, int64_t);
ATSNN_INSTANTIATE(float)
ATSNN_INSTANTIATE(double)
ATSNN_INSTANTIATE(bfloat16)
ATSNN_INSTANTIATE(float16)
#undef ATSNN_INSTANTIATE

}  // namespace ATSNN_LEVEL
}  // namespace atsnn
