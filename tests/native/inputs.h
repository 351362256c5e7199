// What the tests are made of: seeded random numbers, buffers of the exact size, levels, layouts.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <random>
#include <utility>

#include "../../csrc/cpu/layout.h"
#include "check.h"

namespace atsnn {

// The same numbers everywhere: the standard's distributions differ between libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t between(int64_t low, int64_t high) { return low + bits() % uint64_t(high - low + 1); }
  double uniform(double low, double high) { return low + (high - low) * 0x1p-53 * (bits() >> 11); }
  bool chance(double p) { return uniform(0, 1) < p; }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[between(0, from.size() - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

// Exactly n elements on the heap, so that the first one beside them is noticed; null if there are
// none, as an empty tensor is. What nobody wrote is not a number or, of integers, an odd one.
template <class T>
class Array {
 public:
  explicit Array(int64_t n = 0, size_t alignment = 16) : n_(n) {
    if (n == 0) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, n * sizeof(T))) throw std::bad_alloc();
    std::memset(memory, std::is_integral<T>::value ? 0x5a : 0xff, n * sizeof(T));
    p_ = static_cast<T*>(memory);
  }
  explicit Array(const std::vector<T>& from) : Array(from.size()) {
    for (int64_t i = 0; i < n_; ++i) p_[i] = from[i];
  }
  Array(Array&& from) noexcept { *this = std::move(from); }
  Array& operator=(Array&& from) noexcept {
    std::swap(p_, from.p_);
    std::swap(n_, from.n_);
    return *this;
  }
  ~Array() { std::free(p_); }
  T* data() { return p_; }
  const T* data() const { return p_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return p_[i]; }
  const T& operator[](int64_t i) const { return p_[i]; }

 private:
  T* p_ = nullptr;
  int64_t n_ = 0;
};

template <class T>
std::vector<T> copied(const Array<T>& from) {
  return std::vector<T>(from.data(), from.data() + from.size());
}

enum class Level { portable, avx2, avx512 };
// Those this processor has.
const std::vector<Level>& levels();
const char* level_name(Level level);

#if defined(__x86_64__)
#define AT_LEVEL(level, call) \
  ((level) == Level::avx512 ? avx512::call : (level) == Level::avx2 ? avx2::call : portable::call)
#else
#define AT_LEVEL(level, call) ((void)(level), portable::call)
#endif

// Calls f<S>(name) for every storage type.
template <class F>
void each_storage(F f) {
  f.template operator()<float>("float32");
  f.template operator()<double>("float64");
  f.template operator()<bfloat16>("bfloat16");
  f.template operator()<float16>("float16");
}

// Calls f(begin, end) for pieces of 0 .. items, as threads would.
template <class F>
void in_pieces(Random& random, int64_t items, F f) {
  if (items == 0) f(0, 0);
  for (int64_t begin = 0, end; begin < items; begin = end) {
    end = random.between(begin + 1, items);
    f(begin, end);
  }
}

template <class S>
S stored(double x) {
  return narrow<S>(static_cast<arithmetic_t<S>>(x));
}

// Sums of products of spikes and small integers are exact in any order; those of reals are not.
enum class Values { spikes, integers, reals };
double random_value(Random& random, Values values);

template <class S>
Array<S> random_buffer(Random& random, int64_t n, Values values) {
  Array<S> buffer(n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = stored<S>(random_value(random, values));
  return buffer;
}

// Errors of one rounding to storage, and of a sum in the arithmetic type.
template <class S>
constexpr double storage_error = std::is_same<S, bfloat16>::value  ? 0x1p-8
                                 : std::is_same<S, float16>::value ? 0x1p-10
                                                                   : 0;
template <class S>
constexpr double sum_error = std::is_same<S, double>::value ? 1e-11 : 2e-5;

// Bit for bit where every sum is exact, otherwise up to errors relative to the largest value.
template <class S>
void check_values(const char* file, int line, const char* name, const Array<S>& got,
                  const std::vector<double>& want, bool exact) {
  if (exact) {
    std::vector<S> rounded;
    for (double x : want) rounded.push_back(stored<S>(x));
    return check_same(file, line, name, got, rounded);
  }
  double most = 1;
  for (double x : want) most = std::max(most, std::abs(x));
  check_near(file, line, name, got, want, storage_error<S>, sum_error<S> * most);
}
#define CHECK_VALUES(GOT, WANT, EXACT) check_values(__FILE__, __LINE__, #GOT, GOT, WANT, EXACT)

// The results of the first level run, which those of the others must equal bit for bit.
template <class T>
class SameAtAllLevels {
 public:
  void check(const char* file, int line, const char* name, const Array<T>& got) {
    if (known_) return check_same(file, line, name, got, first_);
    first_ = copied(got);
    known_ = true;
  }

 private:
  std::vector<T> first_;
  bool known_ = false;
};
#define CHECK_LEVELS(FIRST, GOT) (FIRST).check(__FILE__, __LINE__, #GOT, GOT)

// A layout and, found the slow way, the row of every cell.
struct Cells {
  int64_t T = 0, B = 0, N = 0, rows = 0;
  bool dense = false;          // the layout's token is null
  std::vector<int64_t> steps;  // [B, N], active timesteps of each token
  std::vector<int64_t> row;    // [T, B, N], -1 where a cell is not active
  Array<int64_t> token, offsets;

  Layout layout() const { return {T, B, N, offsets.data(), dense ? nullptr : token.data()}; }
  int64_t at(int64_t t, int64_t b, int64_t k) const { return row[(t * B + b) * N + k]; }
  int64_t rank(int64_t b, int64_t k) const;
  int64_t most_in_a_run() const;
};

// Calls f(t, b, k, row) for every active cell.
template <class F>
void each_cell(const Cells& cells, F f) {
  for (int64_t t = 0; t < cells.T; ++t) {
    for (int64_t b = 0; b < cells.B; ++b) {
      for (int64_t k = 0; k < cells.N; ++k) {
        if (cells.at(t, b, k) >= 0) f(t, b, k, cells.at(t, b, k));
      }
    }
  }
}

// Tokens of equal lifetime are ranked by index or, with `random`, in any order.
Cells make_cells(int64_t T, int64_t B, int64_t N, const std::vector<int64_t>& steps,
                 Random* random);
Cells dense_cells(int64_t T, int64_t B, int64_t N);
Cells random_cells(Random& random,
                   std::initializer_list<int64_t> tokens = {0, 1, 1, 2, 3, 5, 7, 8, 16, 20});
int64_t random_channels(Random& random);
std::string shown(const Cells& cells);

// [B, N]: how many tokens each one stands for; null for all 1.
struct Sizes {
  std::vector<float> value;
  Array<float> buffer;
  bool given;

  Sizes(Random& random, const Cells& cells);
  const float* data() const { return given ? buffer.data() : nullptr; }
};

}  // namespace atsnn
