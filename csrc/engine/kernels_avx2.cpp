// Every header comes before the target is raised: an inline function of the standard library
// compiled for AVX2 here could otherwise be the copy the linker keeps for everybody.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "../cpu/attention.h"
#include "kernels.h"

#if defined(__x86_64__)
#include "../cpu/target_avx2.h"
#define ATSNN_LEVEL avx2
#define ATSNN_VECTOR_BYTES 32
// clang-format off: the order matters
#include "kernels-inl.h"
#include "../cpu/target_end.h"
// clang-format on
#endif
