#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "../cpu/attention.h"
#include "kernels.h"

#define ATSNN_LEVEL portable
#define ATSNN_VECTOR_BYTES 16
#include "kernels-inl.h"
