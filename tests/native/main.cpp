// Runs the tests whose name contains the argument (all without one).
#include <sanitizer/common_interface_defs.h>

#include <chrono>

#include "inputs.h"

namespace atsnn {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

bool add_test(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

static std::string current;
void describe(const std::string& what) { current = what; }
const std::string& described() { return current; }

void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n  in %s\n", file, line, what.c_str(), described().c_str());
  throw Failed();
}

static bool passes(const Test& test) {
  const auto begin = std::chrono::steady_clock::now();
  describe(test.name);
  try {
    test.run();
  } catch (const Failed&) {
    std::printf("FAILED %s\n", test.name);
    return false;
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::printf("%-32s %5.1f s\n", test.name, took.count());
  std::fflush(stdout);
  return true;
}

}  // namespace atsnn

// UBSan ends the process by a signal, which ASan reports with the stack and what was tested.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __asan_default_options() {
  return "handle_abort=1:detect_stack_use_after_return=1";
}

int main(int argc, char** argv) {
  using namespace atsnn;
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "  in %s\n", described().c_str()); });
  for (Level level : {Level::portable, Level::avx2, Level::avx512}) {
    const bool has = std::find(levels().begin(), levels().end(), level) != levels().end();
    std::printf("%-8s %s\n", level_name(level), has ? "tested" : "skipped: not on this processor");
  }
  int ran = 0, failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && std::string(test.name).find(argv[1]) == std::string::npos) continue;
    ++ran;
    failed += !passes(test);
  }
  std::printf("%d tests, %d failed\n", ran, failed);
  return failed || ran == 0;
}
