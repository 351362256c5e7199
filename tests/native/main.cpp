// Runs the tests whose name contains the argument (all without one).
#include <sanitizer/common_interface_defs.h>

#include <chrono>

#include "inputs.h"

namespace atsnn {

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
