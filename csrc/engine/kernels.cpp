#include "kernels.h"

#include <numeric>

#include "../cpu/attention.h"

namespace atsnn {

int64_t heads_together(int64_t head_dim) { return word_bits / std::gcd(head_dim, word_bits); }

int64_t attend_scratch(int64_t tokens, int64_t head_dim) {
  return (head_dim + tokens + 2) * padded<float>(head_dim);
}

}  // namespace atsnn
