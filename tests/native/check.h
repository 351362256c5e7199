// A small test harness: named tests, and checks that say where, what was expected and what came.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/storage.h"

namespace atsnn {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();
bool add_test(const char* name, void (*run)());

#define TEST(NAME)                                        \
  static void NAME();                                     \
  static const bool NAME##_added = add_test(#NAME, NAME); \
  static void NAME()

// Ends a test; the first fault is the one to read.
struct Failed {};
[[noreturn]] void fail(const char* file, int line, const std::string& what);

// What is being tested right now, which failed checks and the sanitizers' reports end with.
void describe(const std::string& what);
const std::string& described();

inline std::string shown(int64_t x) { return std::to_string(x); }
inline std::string shown(uint8_t x) { return std::to_string(x); }
inline std::string shown(uint16_t x) { return std::to_string(x); }
inline std::string shown(uint64_t x) {  // spikes
  char text[32];
  std::snprintf(text, sizeof text, "0x%016llx", static_cast<unsigned long long>(x));
  return text;
}
inline std::string shown(double x) {
  char text[64];
  std::snprintf(text, sizeof text, "%.17g (%a)", x, x);
  return text;
}
inline std::string shown(float x) { return shown(double(x)); }
inline std::string shown(bfloat16 x) { return shown(widen(x)); }
inline std::string shown(float16 x) { return shown(widen(x)); }

template <class Got, class T>
void check_same(const char* file, int line, const char* name, const Got& got,
                const std::vector<T>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    static_assert(std::is_same<std::decay_t<decltype(got[i])>, T>::value, "compares bits");
    if (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
    fail(file, line,
         std::string(name) + "[" + std::to_string(i) + "]: expected " + shown(want[i]) + ", got " +
             shown(got[i]));
  }
}

template <class Got>
void check_near(const char* file, int line, const char* name, const Got& got,
                const std::vector<double>& want, double relative, double absolute) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = widen(got[i]);
    // Written so that a value that is not a number fails.
    if (value == want[i] || std::abs(value - want[i]) <= absolute + relative * std::abs(want[i])) {
      continue;
    }
    fail(file, line,
         std::string(name) + "[" + std::to_string(i) + "]: expected about " + shown(want[i]) +
             ", got " + shown(value));
  }
}

#define CHECK(CONDITION) ((CONDITION) ? void() : fail(__FILE__, __LINE__, "expected " #CONDITION))
// Bit for bit, the first want.size() elements.
#define CHECK_SAME(GOT, WANT) check_same(__FILE__, __LINE__, #GOT, GOT, WANT)
#define CHECK_NEAR(GOT, WANT, RELATIVE, ABSOLUTE) \
  check_near(__FILE__, __LINE__, #GOT, GOT, WANT, RELATIVE, ABSOLUTE)

}  // namespace atsnn
