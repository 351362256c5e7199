#include "check.h"

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

}  // namespace atsnn

// UBSan ends the process by a signal, which ASan reports with the stack and what was tested.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __asan_default_options() {
  return "handle_abort=1:detect_stack_use_after_return=1:max_malloc_fill_size=1048576:malloc_fill_"
         "byte=255";
}
