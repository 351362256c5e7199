#pragma once

#include "../engine/kernels.h"

namespace atsnn {

// The engine's kernels of the level in use.
const Kernels& level_kernels();

}  // namespace atsnn
