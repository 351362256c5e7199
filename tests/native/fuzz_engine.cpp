// Runs random cases of the engine's tests until time is up: fuzz [seconds] [first seed]. Iteration
// i has seed `first + i`, so a failing one is run again by `fuzz 0 SEED`.
#include <sanitizer/common_interface_defs.h>

#include <chrono>

#include "engine_inputs.h"

namespace atsnn {
namespace {

// Whether every kind of case passes.
bool passes(uint64_t seed) {
  bool all = true;
  for (const auto check :
       {check_lists, check_add_rows, check_add_groups, check_fire, check_attention,
        check_spike_driven_attention, check_linear, check_conv, check_network}) {
    try {
      check(seed);
    } catch (const Failed&) {
      all = false;
    }
  }
  return all;
}

}  // namespace
}  // namespace atsnn

int main(int argc, char** argv) {
  using namespace atsnn;
  using Clock = std::chrono::steady_clock;
  const double seconds = argc > 1 ? std::atof(argv[1]) : 60;
  // Other cases every time, far from those of the tests.
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 0)
                                  : std::chrono::system_clock::now().time_since_epoch().count();
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "  in %s\n", described().c_str()); });
  std::printf("fuzzing for %g s from seed %llu\n", seconds, static_cast<unsigned long long>(first));
  std::fflush(stdout);
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  uint64_t ran = 0, failed = 0;
  do {
    if (!passes(first + ran)) {
      ++failed;
      std::printf("FAILED seed %llu\n", static_cast<unsigned long long>(first + ran));
    }
    ++ran;
  } while (Clock::now() < end);
  std::printf("%llu iterations, %llu failed\n", static_cast<unsigned long long>(ran),
              static_cast<unsigned long long>(failed));
  return failed > 0;
}
