// Spikes as bits, and memory that is kept from call to call.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace atsnn {

// Rows of spikes are whole words: bit c % 64 of word c / 64 is channel c, bits past the last
// channel are zero.
constexpr int64_t word_bits = 64;
constexpr int64_t words(int64_t channels) { return (channels + word_bits - 1) / word_bits; }

// The bits of the last word that are channels.
constexpr uint64_t valid_bits(int64_t channels, int64_t word) {
  const int64_t left = channels - word * word_bits;
  return left >= word_bits ? ~uint64_t(0) : left <= 0 ? 0 : (uint64_t(1) << left) - 1;
}

inline int64_t count_bits(uint64_t word) { return __builtin_popcountll(word); }

// Calls f(i) for every set bit, lowest first.
template <class F>
inline void each_bit(uint64_t word, F f) {
  for (; word; word &= word - 1) f(__builtin_ctzll(word));
}

// Whole lines of memory, freed by std::free. Large pieces are asked for in huge pages, where the
// system has them: weights are read row by row in no order, and the small ones' addresses do not
// fit the processor's tables.
inline void* allocate(size_t bytes) {
  constexpr size_t huge = size_t(2) << 20, line = 64;
  const size_t step = bytes >= huge ? huge : line, whole = (bytes + step - 1) / step * step;
  void* p = std::aligned_alloc(step, std::max(whole, step));
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (step == huge) madvise(p, whole, MADV_HUGEPAGE);  // a wish; without it all works as well
#endif
  return p;
}

// Memory that grows and is never given back before the end, so that a repeated shape allocates
// nothing. Lines are whole; growing loses what was in it.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(p_); }
  Buffer(Buffer&& other) noexcept : p_(other.p_), capacity_(other.capacity_) {
    other.p_ = nullptr;
    other.capacity_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(p_, other.p_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  T* reserve(int64_t n) {
    if (n > capacity_) {
      std::free(p_);
      p_ = nullptr;
      capacity_ = 0;
      p_ = static_cast<T*>(allocate(n * sizeof(T)));
      capacity_ = n;
    }
    return p_;
  }
  T* reserve_zeros(int64_t n) {
    T* p = reserve(n);
    if (n) std::memset(static_cast<void*>(p), 0, n * sizeof(T));
    return p;
  }
  T* data() const { return p_; }
  int64_t capacity() const { return capacity_; }

 private:
  T* p_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace atsnn
