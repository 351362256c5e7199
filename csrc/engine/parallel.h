// Work items over threads. The runtime is the one PyTorch has loaded (see setup.py); without
// OpenMP, as in the kernels' own tests, items run one after the other.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace atsnn {

// Calls f(item, thread) for every item, thread below `threads`. f must not throw.
template <class F>
void parallel(int threads, int64_t items, F f) {
#if defined(_OPENMP)
  if (threads > 1 && items > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < items; ++i) f(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) f(i, 0);
}

}  // namespace atsnn
